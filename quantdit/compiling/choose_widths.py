"""Choosing weight formats: the best that a size budget allows, or the smallest that keep within an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from torch import nn

from quantdit.calibration import allocate
from quantdit.calibration.allocate import Attempt, Option
from quantdit.calibration.observe import block_order, sensitivity
from quantdit.calibration.observe import recorded_calls as call_files
from quantdit.checkpoints import checkpoint
from quantdit.compiling import quantize_blocks
from quantdit.compiling.block_inputs import walk
from quantdit.compiling.job import Job, linear_of
from quantdit.compiling.plan import Component, Target, check_budget
from quantdit.compiling.quantize_blocks import QuantizedTransformer
from quantdit.layers.quant_linear import QuantLinear
from quantdit.recipes.rules import LayerPlan
from quantdit.system import checksummed_json, progress
from quantdit.tensors.layer_spec import stored_bytes

Chosen = dict[str, Option]  # by layer


@dataclass(frozen=True)
class _Choice:
    """What was chosen, what became of it, what was tried, and the size budget in bytes, if there was one."""

    chosen: Chosen
    made: QuantizedTransformer
    attempts: list[Attempt]
    budget: int | None = None


def quantize_to_target(job: Job, component: Component, target: Target) -> tuple[QuantizedTransformer, dict]:
    """Choose each layer's weight format for the target and quantize the transformer so; returns the report's allocation too.

    Raises:
        ValueError: the target is out of reach.
    """
    widths = _sensitivities(job, component.options)
    choices = {name: tuple(Option(w, e["bytes"], e["error"]) for w, e in of.items()) for name, of in widths.items()}
    full = {name: linear_of(job.model, name) for name in component.options}
    tried: list[Chosen] = []

    def quantize(chosen: Chosen) -> QuantizedTransformer:
        # Each attempt keeps its blocks: a later one may turn out worse, and an interrupted run goes through them again.
        if chosen not in tried:
            tried.append(chosen)
        block_order.put(job.model, full)
        plans = {name: plans[chosen[name].weight] for name, plans in component.options.items()}
        return quantize_blocks.quantize(job, plans, job.folder / f"blocks-{tried.index(chosen)}")

    if target.size_budget is not None:
        found = _within_budget(job.model, choices, target.size_budget, component.bytes_in_16_bits, quantize)
    else:
        assert target.max_output_error is not None
        found = _within_error(choices, target.max_output_error, quantize)
    return found.made, {
        **asdict(target),
        "bytes_in_16_bits": component.bytes_in_16_bits,
        "budget_bytes": found.budget,
        "bytes": _stored_bytes(job.model),
        "predicted_model_rel_rmse": allocate.total_error(found.chosen),
        "model_rel_rmse": found.made.model_error,
        "attempts": [
            {"bytes": allocate.total_bytes(a.chosen), "predicted": a.predicted, "measured": a.measured} for a in found.attempts
        ],
        "layers": {name: {"chosen": found.chosen[name].weight, "weights": of} for name, of in widths.items()},
    }


def _within_budget(
    transformer: nn.Module,
    choices: Mapping[str, tuple[Option, ...]],
    size_budget: float,
    whole: int,
    quantize: Callable[[Chosen], QuantizedTransformer],
) -> _Choice:
    budget = check_budget(size_budget, sum(min(o.bytes for o in c) for c in choices.values()), whole)
    limit, excess = budget, 0
    for _ in range(allocate.ATTEMPTS):
        chosen = allocate.allocate(choices, limit)
        made = quantize(chosen)
        # Rotations and low-rank branches that calibration chooses may come out larger than they did alone.
        excess = _stored_bytes(transformer) - budget
        if excess <= 0:
            return _Choice(chosen, made, [Attempt(chosen, allocate.total_error(chosen), error_of(made))], budget)
        limit -= excess
    raise ValueError(f"a size budget of {size_budget:g} is exceeded by {excess:,} bytes; fix the recipe's rotation")


def _within_error(
    choices: Mapping[str, tuple[Option, ...]], bound: float, quantize: Callable[[Chosen], QuantizedTransformer]
) -> _Choice:
    try:
        attempts = allocate.within(choices, bound, lambda chosen: error_of(quantize(chosen)))
    except ValueError as error:
        raise ValueError(
            f"an output error of at most {bound:g} is out of reach: {error}; allow more with --max-output-error, or give the"
            " activations more bits (--bits autoa16)"
        ) from error
    best = min((a for a in attempts if a.measured <= bound), key=lambda a: allocate.total_bytes(a.chosen))
    return _Choice(best.chosen, quantize(best.chosen), attempts)


def error_of(made: QuantizedTransformer) -> float:
    """Return model_rel_rmse of a transformer that has calls."""
    assert made.model_error is not None
    return made.model_error


def _stored_bytes(transformer: nn.Module) -> int:
    return sum(stored_bytes(m.layer_spec) for m in checkpoint.quant_layers(transformer).values())


def _sensitivities(job: Job, options: Mapping[str, Mapping[str, LayerPlan]]) -> dict[str, dict[str, dict]]:
    """Return what `sensitivity` finds for each layer and weight format, block by block; finished blocks are kept."""
    if all(entry.output is None for entry in job.calls.entries):
        raise ValueError(
            "the transformer returns no tensor, so what a layer does to its output cannot be measured; fix all weights"
        )
    folder = job.folder / "sensitivity"
    calls = call_files.recorded(folder / "calls") or call_files.store(sensitivity.few(job.calls), folder / "calls")
    found: dict[str, dict[str, dict]] = {}
    with progress.bar(len(options), "measure what each layer's weight does", "layer") as bar:
        for segment in walk(job, options, calls, folder):
            if not segment.names:
                continue
            path = folder / f"{segment.path}.json"
            if path.exists():
                bar.update(len(segment.names))
            else:
                if segment.calls is None:
                    raise ValueError(f"{folder} lacks the finished block {segment.path}; {checksummed_json.REMEDY}")
                stats = quantize_blocks.statistics_of(job, segment)
                part = sensitivity.MeasuredBlock(segment.run, segment.linears, list(sensitivity.measured(segment.calls)), stats)
                result = sensitivity.sensitivity(
                    part,
                    options,
                    job.model,
                    list(sensitivity.measured(calls)),
                    lambda made: QuantLinear.from_tensors(made.spec, made.tensors, made.bias),
                    job.seed_of(segment),
                    bar.update,
                )
                checksummed_json.write(path, result, job.run)
            found |= checksummed_json.read(path, job.run)
    return {name: found[name] for name in options}
