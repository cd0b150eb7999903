"""What a step plan is held against: the same number of computed steps spent otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantdit.evaluation.apply_metrics import psnr_of
from quantdit.evaluation.samples import Samples, Sampling, sample
from quantdit.pipelines.source import Source
from quantdit.pipelines.step_plans import following
from quantdit.step_plans.forecasts import polynomial
from quantdit.step_plans.step_plan import StepPlan

Model = tuple[Any, Source]


def rows_of(
    reference: Model, candidate: Model, plans: Mapping[str, StepPlan], asked: Sampling, first: Samples, second: Samples
) -> dict:
    """Return what the report says of a candidate's step plan: each row's PSNR against full precision that computes every step.

    Args:
        reference: pipeline in full precision, and its source.
        candidate: the quantized pipeline, and its source.
        plans: by the names of its transformers.
        asked: what every model is sampled with.
        first: samples of the reference.
        second: of the candidate, by its plans.
    """
    computed, steps = (sum(of) for of in zip(*((len(p.computed), len(p.times)) for p in plans.values()), strict=True))
    fewer = max(1, round(asked.steps * computed / steps))
    fewer_steps = replace(asked, steps=fewer)
    reuse = {part: polynomial("reuse", plan.times, plan.computed) for part, plan in plans.items()}
    every = sample(*candidate, asked, None, "candidate, every step")
    in_fewer = sample(*reference, fewer_steps, None, f"reference in {fewer} steps")
    both = sample(*candidate, fewer_steps, None, f"candidate in {fewer} steps")
    with following(candidate[0], reuse):
        reused = sample(*candidate, asked, None, "candidate, outputs reused")
    rows = (
        ("candidate, every step", steps, every),
        ("candidate, step plan", computed, second),
        ("candidate, latest outputs reused", computed, reused),
        (f"candidate, {fewer} steps", computed, both),
        (f"reference, {fewer} steps", computed, in_fewer),
    )
    found = [{"what": what, "computed": n, "PSNR": psnr_of(first, made.images)} for what, n, made in rows]
    return {"plans": {part: str(plan) for part, plan in plans.items()}, "of": steps, "rows": found}
