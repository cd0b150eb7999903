"""Step plans of a whole pipeline: those that its transformers carry, and sampling that follows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from quantdit.pipelines.components import TRANSFORMER_NAMES
from quantdit.step_plans.following import disable, enable, hook_of
from quantdit.step_plans.step_plan import StepPlan


def carried(pipeline: Any, label: str) -> dict[str, StepPlan]:
    """Return the plans that a pipeline's transformers carry, by their names.

    Args:
        pipeline: of diffusers.
        label: names it in the error.

    Raises:
        ValueError: none carries one.
    """
    found = {
        part: plan
        for part in TRANSFORMER_NAMES
        if isinstance(plan := getattr(getattr(pipeline, part, None), "step_plan", None), StepPlan)
    }
    if not found:
        raise ValueError(
            f"{label} has no step plan to follow; quantdit calibrate --steps-plan 0.5 makes one, or leave out --steps-plan"
        )
    return found


def followed(pipeline: Any) -> dict[str, StepPlan]:
    """Return the plans that a pipeline follows now, by the names of its transformers."""
    hooks = {part: hook_of(model) for part in TRANSFORMER_NAMES if isinstance(model := getattr(pipeline, part, None), nn.Module)}
    return {part: hook.plan for part, hook in hooks.items() if hook is not None}


@contextmanager
def following(pipeline: Any, plans: Mapping[str, StepPlan]) -> Iterator[None]:
    """Sample by plans, by the names of the transformers, in the body."""
    with ExitStack() as stack:
        for part, plan in plans.items():
            transformer = getattr(pipeline, part)
            enable(transformer, plan)
            stack.callback(disable, transformer)
        yield
