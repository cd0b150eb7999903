"""The step plan of a quantized pipeline: candidates are sampled with, closed-loop, and the best is kept.

Held-out samples are drawn from the quantized pipeline with every step computed, then with each candidate's forecasts, from the
same noise. A candidate is worth having only if it is nearer to the whole trajectory than sampling with as many fewer steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantdit.models.call_view import view
from quantdit.models.prediction import prediction_of
from quantdit.pipelines.call_arguments import sampling_arguments
from quantdit.pipelines.generate import generate, sample_seed
from quantdit.pipelines.source import BareTransformer
from quantdit.pipelines.step_plans import following
from quantdit.recipes.sampling_plan import SamplingPlan
from quantdit.recipes.steps import AUTO_FORECAST, Steps
from quantdit.step_plans.following import carry
from quantdit.step_plans.forecasts import LEAST, fit, placed, polynomial
from quantdit.step_plans.step_plan import StepPlan
from quantdit.system.files import Advice

# Forecast, and where computed steps lie: how much denser at both ends, and which they lean to (forecasts.placed). The first of
# equals is taken.
CANDIDATES = (
    ("reuse", 0.0, 1.0),
    ("taylor1", 0.0, 1.0),
    ("taylor2", 0.0, 1.0),
    ("fit", 0.0, 1.0),
    ("fit", 0.75, 1.0),
    ("fit", 0.75, 0.85),
    ("fit", 0.75, 1.15),
    ("fit", 0.5, 0.85),
)
HELD_OUT, FITTED = 2, 4  # samples that candidates are judged by, and that weights are fitted to; of prompts all over the list
LISTED = 1000  # prompts or classes at most that are looked at
# Numbers of the samples, of which calibration takes the first.
FIRST_HELD_OUT, FIRST_FITTED = 100_003, 200_003


@dataclass
class Trajectory:
    """What a transformer returned along one run of its pipeline: times of the steps, and by call of a step all outputs."""

    times: list[float] = field(default_factory=list)
    streams: list[list[Tensor]] = field(default_factory=list)
    calls: int = 0

    def add(self, time: float | None, output: object) -> None:
        """Take note of a call."""
        prediction = prediction_of(output)
        if time is None or prediction is None:
            raise ValueError("a step plan needs a time and a prediction in every call, and this transformer's have none")
        if not self.times or time != self.times[-1]:
            self.times.append(time)
            self.calls = 0
        if self.calls == len(self.streams):
            self.streams.append([])
        self.streams[self.calls].append(prediction.detach())
        self.calls += 1


def check(pipeline: object, steps: Steps, sampling: SamplingPlan, is_streamed: bool) -> None:
    """Refuse before any work what no plan can be chosen for.

    Raises:
        ValueError: nothing can be sampled from the quantized pipeline, or too few steps are computed.
    """
    remedy = "leave out --steps-plan (the recipe's [steps])"
    if isinstance(pipeline, BareTransformer):
        raise ValueError(
            f"a step plan is chosen by sampling, and a transformer alone cannot be sampled; give its pipeline or {remedy}"
        )
    if is_streamed:
        raise ValueError(f"a step plan is chosen by sampling with the whole model in memory; raise --memory-budget or {remedy}")
    count = steps.count or sampling.steps
    if round(steps.compute * count) < LEAST:
        raise ValueError(
            f"{steps.compute:g} of {count} steps is fewer than the {LEAST} that a plan computes; raise --steps-plan or --steps"
        )


def choose(pipeline: Any, transformers: Mapping[str, nn.Module], steps: Steps, sampling: SamplingPlan) -> dict:
    """Choose a plan for each transformer of a quantized pipeline and let it carry it; returns what the report says.

    Args:
        pipeline: quantized, in memory.
        transformers: of it, by name; each sees its part of the trajectory.
        steps: what is asked for.
        sampling: guidance, size, seed and prompts are those of calibration.

    Nothing is carried, and a warning says so, where fewer steps without a plan are as good.
    """
    count = steps.count or sampling.steps

    held_out, fitted = _conditions(pipeline, sampling)

    def sampled(first: int, given: dict[str, list], of_steps: int, what: str) -> Tensor:
        options = {name: v for name in ("height", "width", "frames") if (v := getattr(sampling, name)) is not None} | given
        number, seed = len(next(iter(given.values()))), sample_seed(sampling.seed, first)
        return generate(pipeline, number, seed, of_steps, sampling.guidance, number, description=what, **options)

    with _recorded(transformers) as trajectories:
        sampled(FIRST_FITTED, fitted, count, "steps: fit")
    whole = sampled(FIRST_HELD_OUT, held_out, count, "steps: every step")
    tried: list[dict] = []
    plans: list[dict[str, StepPlan]] = []
    for forecast, ends, lean in CANDIDATES:
        if steps.forecast not in (AUTO_FORECAST, forecast):
            continue
        made = {part: _plan(forecast, (ends, lean), steps.compute, found) for part, found in trajectories.items()}
        if forecast == "fit":
            # Weights fitted to outputs along the whole trajectory meet others along their own: these are led back to it.
            with following(pipeline, made), _recorded(transformers) as followed:
                sampled(FIRST_FITTED, fitted, count, "steps: fit")
            made = {
                part: fit(plan.times, plan.computed, trajectories[part].streams, followed[part].streams)
                for part, plan in made.items()
            }
        with following(pipeline, made):
            psnr = _psnr(whole, sampled(FIRST_HELD_OUT, held_out, count, f"steps: {forecast}"))
        plans.append(made)
        tried.append({"forecast": forecast, "ends": ends, "lean": lean, "psnr": round(psnr, 2)})
    fewer = round(steps.compute * count)
    of_fewer = round(_psnr(whole, sampled(FIRST_HELD_OUT, held_out, fewer, f"steps: {fewer} instead")), 2)
    best = max(range(len(tried)), key=lambda i: tried[i]["psnr"])
    is_kept = tried[best]["psnr"] > of_fewer
    for part, transformer in transformers.items():
        carry(transformer, plans[best][part] if is_kept else None)
    if not is_kept:
        text = (
            f"no step plan is kept: the best ({tried[best]['forecast']}) is {tried[best]['psnr']:.1f} dB from every step,"
            f" sampling in {fewer} steps {of_fewer:.1f} dB; compute more of them"
        )
        warnings.warn(Advice(text), stacklevel=2)
    return {
        "asked": steps.to_dict() | {"count": count},
        "candidates": tried,
        "fewer_steps": {"steps": fewer, "psnr": of_fewer},
        "chosen": tried[best] if is_kept else None,
        "computed": {part: list(plan.computed) for part, plan in plans[best].items()} if is_kept else None,
    }


def _conditions(pipeline: Any, sampling: SamplingPlan) -> tuple[dict[str, list], dict[str, list]]:
    """Return prompts or classes, as `generate` takes them, to judge by and to fit to: from all over the list, in turns."""
    ((kind, values),) = sampling_arguments(pipeline, LISTED, sampling.prompts or None).items()
    known = list(dict.fromkeys(values))
    chosen = [known[i * len(known) // (HELD_OUT + FITTED)] for i in range(HELD_OUT + FITTED)]
    judges = range(1, len(chosen), len(chosen) // HELD_OUT)
    name = "classes" if kind == "class_labels" else "prompts"
    return {name: [chosen[i] for i in judges]}, {name: [c for i, c in enumerate(chosen) if i not in judges]}


def _plan(forecast: str, where: tuple[float, float], share: float, found: Trajectory) -> StepPlan:
    """Return a candidate for one transformer; one that has too few steps computes all of them."""
    steps = len(found.times)
    computed = placed(steps, max(min(LEAST, steps), round(share * steps)), *where)
    if forecast == "fit":
        return fit(found.times, computed, found.streams)
    return polynomial(forecast, found.times, computed)


@contextmanager
def _recorded(transformers: Mapping[str, nn.Module]) -> Iterator[dict[str, Trajectory]]:
    """Yield what is filled with the trajectories of all transformers while the body samples."""
    found = {part: Trajectory() for part in transformers}

    def hook(part: str) -> Any:
        def record(transformer: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            found[part].add(view(transformer, args, kwargs).time, output)

        return record

    handles = [t.register_forward_hook(hook(part), with_kwargs=True) for part, t in transformers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _psnr(whole: Tensor, other: Tensor) -> float:
    """Return the mean PSNR in dB of samples in [-1, 1]; each counts for 100 dB at most."""
    error = (whole - other).double().flatten(1).square().mean(1)
    return float((10 * torch.log10(4 / error.clamp_min(4e-10))).mean())
