"""The compiler: pipeline and recipe in, quantized diffusers folder out, block by block and resumable."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

import quantdit
from quantdit.calibration import allocate
from quantdit.calibration.allocate import Option
from quantdit.calibration.observe import block_order, capture, sensitivity
from quantdit.calibration.observe import recorded_calls as call_files
from quantdit.calibration.observe.recorded_calls import StoredCalls
from quantdit.calibration.observe.timestep_salience import salient_calls
from quantdit.checkpoints import checkpoint, streaming
from quantdit.checkpoints.streaming import Stream
from quantdit.compiling import quantize_blocks, work_folder
from quantdit.compiling.finetune import Training, check_trains
from quantdit.compiling.quantize_blocks import Job, Made
from quantdit.compiling.work_folder import REPORT
from quantdit.formats import QSpec
from quantdit.layers.quant_linear import QuantLinear
from quantdit.models import adapter as adapters
from quantdit.pipelines.pipeline import Source
from quantdit.pipelines.sampling import Settings, conditions, sample, sampled_times
from quantdit.recipes import recipe
from quantdit.recipes.recipe import LayerPlan, Recipe
from quantdit.system import files, memory, progress, sealed
from quantdit.tensors import hadamard
from quantdit.tensors.layer_spec import LayerSpec, layer_fields, stored_bytes
from quantdit.tensors.timesteps import buckets_of, check_edge_steps

ALREADY = "already_finished"
DEFAULTS = Settings()
HALF = 2  # bytes of a weight in 16 bits
RANDOM_WARNING = "RANDOM WEIGHTS: this checkpoint measures time, memory and size; its pictures mean nothing"


@dataclass(frozen=True)
class Target:
    """What the layers whose weight is `auto` are chosen for; one of the two is given.

    Attributes:
        size_budget: largest size of all quantized layers, scales included, as a part of their size in 16 bits.
        max_drift: largest measured model_rel_rmse; as small as it allows.
    """

    size_budget: float | None = None
    max_drift: float | None = None

    def __post_init__(self) -> None:
        """Check the one that is given.

        Raises:
            ValueError: none or both, or not a possible number.
        """
        if (self.size_budget is None) == (self.max_drift is None):
            raise ValueError("give a size budget or a largest drift, one of the two")
        if self.size_budget is not None and not 0 < self.size_budget <= 1:
            raise ValueError(
                f"a size budget is a part of the layers' size in 16 bits, above 0 and at most 1, got {self.size_budget:g};"
                " 0.25 is 4 stored bits a weight"
            )
        if self.max_drift is not None and not 0 < self.max_drift < math.inf:
            raise ValueError(f"a largest drift is a positive number, got {self.max_drift:g}; 0.05 is 5 % of the model's output")


def calibrate(
    pipeline,
    source: Source,
    plan_recipe: Recipe,
    output: Path,
    settings: Settings = DEFAULTS,
    resume: bool = False,
    overwrite: bool = False,
    target: Target | None = None,
    training: Training | None = None,
) -> dict:
    """Quantize the pipeline's transformer and write the quantized pipeline folder; returns the calibration report.

    Work goes on in `OUTPUT.partial` beside the output and is renamed at the end, so the final name never holds half a model.
    Each finished block is stored there; `resume=True` continues after the last one. The same source, recipe, settings, target
    and versions give the same bytes of `transformer/`. A recipe with `auto` weights needs a target. If `resume=True` finds the
    output finished by a run of the same, its report is returned with ALREADY in it.

    Raises:
        ValueError: an output that is not to be replaced, lies where the source does, or is being written by another process; a
            recipe that does not fit, NaN or infinite weights or activations (the layer is named), or a partial run of other
            settings.
        OSError: the output cannot be written.
    """
    work_folder.check_output(output, overwrite, resume)
    if output.resolve().is_relative_to(source.folder.resolve()):
        raise ValueError(f"output {output} lies inside the source {source.folder}; choose a folder outside")
    work_folder.check_apart(output, {"source": work_folder.paths_of(source.folder)})
    if not source.bare:
        work_folder.rest_of(source.folder, _left(source))
    with work_folder.locked(output):
        return _calibrate(pipeline, source, plan_recipe, output, settings, resume, overwrite, target, training)


def _calibrate(
    pipeline: object,
    source: Source,
    plan_recipe: Recipe,
    output: Path,
    settings: Settings,
    resume: bool,
    overwrite: bool,
    target: Target | None,
    training: Training | None,
) -> dict:
    began = time.perf_counter()
    transformers = {part: getattr(pipeline, part).eval() for part in source.parts}
    if any(checkpoint.quant_layers(t) for t in transformers.values()):
        raise ValueError(f"{source.folder} is quantized already; calibrate from the full-precision model")
    if not settings.samples:
        plan_recipe = recipe.without_data(plan_recipe, times_are_known=True)
    check_edge_steps(settings.steps, plan_recipe.edge_steps)
    found = {part: adapters.adapter_for(t) for part, t in transformers.items()}
    linears = {part: adapters.layers(t, found[part]) for part, t in transformers.items()}
    options = {part: recipe.options(plan_recipe, of_part) for part, of_part in linears.items()}
    if not any(options.values()):
        raise ValueError(f"recipe {plan_recipe.name} leaves every layer dense, so there is nothing to quantize")
    for part, transformer in transformers.items():
        _check_target(plan_recipe, options[part], target, transformer)
        for name, tensor in transformer.state_dict().items():
            if tensor.device.type != "meta":
                files.check_finite(name, tensor)
    if target is not None and (len(transformers) > 1 or any(streaming.is_streamed(t) for t in transformers.values())):
        raise ValueError(
            "choosing the layers' weights needs one transformer, in memory as a whole: give a larger --memory-budget,"
            " or fix the weights with --bits"
        )
    _check_training(training, settings, transformers, options)
    provenance = {
        "quantdit": quantdit.__version__,
        "source": source.label,
        "source_sha256": _source_digest(source),
        "calibration": asdict(settings) | {"conditions": conditions(pipeline, settings)},
    }
    if source.random_weights:
        provenance["random_weights"] = True
    if target is not None:
        provenance["target"] = asdict(target)
    if training is not None:
        provenance["training"] = asdict(training)
    identity = {"recipe": plan_recipe.to_dict(), "provenance": provenance, "source_config_sha256": _config_digest(source)}
    partial = work_folder.partial_of(output)
    if resume and work_folder.is_finished(output, identity):
        work_folder.publish(partial, output, identity)
        return files.read_json(output / REPORT)
    if any(streaming.is_streamed(t) for t in transformers.values()):
        memory.give_back_at_once()
    if resume and not overwrite and (report := _finished_before(output, source, identity)) is not None:
        return report | {ALREADY: True}
    work_folder.open_partial(output, identity, resume, overwrite)
    if resume and work_folder.is_finished(partial, identity):
        work_folder.publish(partial, output, identity)
        return files.read_json(output / REPORT)

    work = partial / work_folder.WORK
    run = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    jobs = _jobs(pipeline, source, transformers, found, settings, work, training, run, plan_recipe.edge_steps)
    captured = time.perf_counter()
    made, extra = {}, {}
    for part, job in jobs.items():
        if target is None:
            plans = {name: next(iter(plans.values())) for name, plans in options[part].items()}
            made[part] = quantize_blocks.quantize(job, plans, job.folder / "blocks")
        else:
            made[part], extra["allocation"] = _quantize_to_target(job, options[part], target)
    quantized = time.perf_counter()

    copied = [] if source.bare else work_folder.copy_rest(source.folder, partial, _left(source))
    for part, job in jobs.items():
        read = job.stream.read if job.stream is not None else None
        scheduler = None if source.bare else checkpoint.scheduler_of(source.folder)
        checkpoint.write_transformer(transformers[part], partial / part, plan_recipe.to_dict(), provenance, read, scheduler)
    first = source.parts[0]
    seconds = sum((job.seconds for job in jobs.values()), Counter())
    report = {
        **identity,
        "sha256": files.digest(partial / first),
        "machine": {"platform": platform.platform(), "torch": torch.__version__, "diffusers": version("diffusers")},
        "seconds": {
            "sample": round(captured - began, 1),
            "quantize": round(quantized - captured, 1),
            "write": round(time.perf_counter() - quantized, 1),
        },
        "seconds_of_quantize": {stage: round(spent, 1) for stage, spent in seconds.items()},
        "memory": {
            "budget_bytes": source.memory_budget,
            "peak_bytes": memory.peak(),
            "streamed": any(job.stream is not None for job in jobs.values()),
        },
        "blocks": {part: quantize_blocks.describe_chain(job) for part, job in jobs.items()},
        "model_rel_rmse": made[first].drift,
        "size": added([size_of(t, partial / part) for part, t in transformers.items()]),
        "dense_layers": sum(len(linears[part]) - len(options[part]) for part in linears),
        **extra,
        "layers": {
            name if part == first else f"{part}.{name}": layer
            for part, of_part in made.items()
            for name, layer in of_part.reports.items()
        },
    }
    if len(source.parts) > 1:
        report["model_rel_rmse_of_parts"] = {part: m.drift for part, m in made.items()}
    if source.random_weights:
        report["warning"] = RANDOM_WARNING
    report[work_folder.FILES] = [*copied, *(f"{part}/{name}" for part in jobs for name in work_folder.files_in(partial / part))]
    files.write_json(partial / REPORT, report)
    work_folder.publish(partial, output, identity)
    return report


def _finished_before(output: Path, source: Source, identity: dict) -> dict | None:
    """Return the report of an output that is the whole result of a run of this identity; None if it is not of a finished run.

    Raises:
        ValueError: it is that of a run of another identity; names the settings that differ.
    """
    try:
        report = files.read_json(output / REPORT)
        is_whole = identity.keys() <= report.keys() and report.get("sha256") == files.digest(output / source.parts[0])
    except (files.CheckpointError, OSError):
        return None
    if not is_whole:
        return None
    if other := work_folder.differences({key: report[key] for key in identity}, identity):
        raise ValueError(
            f"output {output} holds a finished run of other settings: {other}; choose another --output, or pass --overwrite to"
            " replace it"
        )
    return report


def size_of(transformer: nn.Module, folder: Path) -> dict:
    """Count what a written transformer folder holds: bytes in all, and stored bits per weight of the quantized layers."""
    layers = checkpoint.quant_layers(transformer)
    weights_count = sum(m.in_features * m.out_features for m in layers.values())
    sizes, own = files.tensor_bytes(folder), checkpoint.own_keys(transformer)
    stored = 8 * sum(size for key, size in sizes.items() if key in own)
    return {
        "file_bytes": sum(path.stat().st_size for path in files.weight_files(folder)),
        "quantized_weights": weights_count,
        "bits_per_weight": round(stored / max(1, weights_count), 4),
        "dense_values": sum(t.numel() for t in transformer.state_dict().values()) - _own_values(transformer),
    }


def added(sizes: list[dict]) -> dict:
    """Return the sizes of several transformers as one."""
    total = {key: sum(size[key] for size in sizes) for key in sizes[0]}
    bits = sum(size["bits_per_weight"] * size["quantized_weights"] for size in sizes)
    return total | {"bits_per_weight": round(bits / max(1, total["quantized_weights"]), 4)}


def _own_values(transformer: nn.Module) -> int:
    layers = checkpoint.quant_layers(transformer).values()
    return sum(math.prod(field.shape) for m in layers for field in layer_fields(m.layer_spec).values())


def _jobs(
    pipeline: object,
    source: Source,
    transformers: dict[str, nn.Module],
    found: dict[str, adapters.Adapter],
    settings: Settings,
    work: Path,
    training: Training | None,
    run: str,
    edge_steps: int,
) -> dict[str, Job]:
    """Sample from the pipeline, and return for each transformer its calls and what is needed to work on it."""
    streams = {
        part: Stream(transformer, files.tensor_files(source.part(part)), shared=found[part].shared)
        for part, transformer in transformers.items()
        if streaming.is_streamed(transformer)
    }
    blocks = {part: quantize_blocks.blocks_of(t, found[part]) for part, t in transformers.items()}
    calls = dict.fromkeys(transformers, StoredCalls(()))
    if settings.samples:
        with ExitStack() as stack:
            for part, stream in streams.items():
                stack.enter_context(stream.following(blocks[part]))
            calls = capture.transformer_calls(
                lambda: sample(pipeline, settings, found),
                transformers,
                settings.steps,
                settings.buckets,
                work / "calls",
                settings.timesteps if settings.timestep_choice == "even" else 0,
                edge_steps,
            )
    elif edge_steps:
        for part, transformer in transformers.items():
            times = sampled_times(pipeline, transformer, found[part], settings.steps)
            calls[part] = StoredCalls((), buckets_of(times, settings.steps, settings.buckets, edge_steps)[1])
    jobs = {}
    for part, transformer in transformers.items():
        folder = work / part
        folder.mkdir(parents=True, exist_ok=True)
        jobs[part] = Job(
            transformer,
            blocks[part],
            calls[part],
            settings.buckets,
            settings.seed,
            folder,
            streams.get(part),
            settings.tokens,
            training,
            run,
        )
        if settings.timestep_choice == "salience" and settings.samples and settings.timesteps:
            jobs[part] = _salient(jobs[part], settings.timesteps)
    return jobs


def _salient(job: Job, count: int) -> Job:
    """Return the job with the calls of its most salient timesteps alone."""
    links = quantize_blocks.links_of(job)
    if not links:
        raise ValueError("the transformer's blocks have no order to choose timesteps by; use --timestep-choice even")
    with job.loaded(links[0].path):
        return replace(job, calls=salient_calls(job.transformer, links[0].path, job.calls, count))


def _quantize_to_target(job: Job, options: dict[str, dict[str, LayerPlan]], target: Target) -> tuple[Made, dict]:
    """Choose each layer's weight format for the target and quantize the transformer so; returns the report's allocation too."""
    widths = _sensitivities(job, options)
    choices = {name: tuple(Option(w, e["bytes"], e["error"]) for w, e in of.items()) for name, of in widths.items()}
    full = {name: job.transformer.get_submodule(name) for name in options}
    whole = HALF * sum(m.in_features * m.out_features for m in full.values())
    tried: list[dict[str, Option]] = []

    def quantize(chosen: dict[str, Option]) -> Made:
        # Each attempt keeps its blocks: a later one may turn out worse, and an interrupted run goes through them again.
        if chosen not in tried:
            tried.append(chosen)
        block_order.put(job.transformer, full)
        plans = {name: plans[chosen[name].weight] for name, plans in options.items()}
        return quantize_blocks.quantize(job, plans, job.folder / f"blocks-{tried.index(chosen)}")

    if target.size_budget is not None:
        budget = math.floor(target.size_budget * whole)
        _check_budget(budget, sum(min(o.bytes for o in c) for c in choices.values()), whole, target)
        limit = budget
        for _ in range(allocate.ATTEMPTS):
            chosen = allocate.allocate(choices, limit)
            made = quantize(chosen)
            # Rotations and low-rank branches that calibration chooses may come out larger than they did alone.
            excess = _stored_bytes(job.transformer) - budget
            if excess <= 0:
                break
            limit -= excess
        else:
            raise ValueError(
                f"a size budget of {target.size_budget:g} is exceeded by {excess:,} bytes; fix the recipe's rotation"
            )
        attempts = [allocate.Attempt(chosen, allocate.total_error(chosen), made.drift)]
    else:
        try:
            attempts = allocate.within(choices, target.max_drift, lambda chosen: quantize(chosen).drift)
        except ValueError as error:
            raise ValueError(
                f"a drift of at most {target.max_drift:g} is out of reach: {error}; allow more with --max-drift, or give the"
                " activations more bits (--bits autoa16)"
            ) from error
        best = min((a for a in attempts if a.measured <= target.max_drift), key=lambda a: allocate.total_bytes(a.chosen))
        chosen, budget = best.chosen, None
        made = quantize(chosen)
    return made, {
        **asdict(target),
        "bytes_in_16_bits": whole,
        "budget_bytes": budget,
        "bytes": _stored_bytes(job.transformer),
        "predicted_model_rel_rmse": allocate.total_error(chosen),
        "model_rel_rmse": made.drift,
        "attempts": [
            {"bytes": allocate.total_bytes(a.chosen), "predicted": a.predicted, "measured": a.measured} for a in attempts
        ],
        "layers": {name: {"chosen": chosen[name].weight, "weights": of} for name, of in widths.items()},
    }


def _stored_bytes(transformer: nn.Module) -> int:
    return sum(stored_bytes(m.layer_spec) for m in checkpoint.quant_layers(transformer).values())


def _sensitivities(job: Job, options: dict[str, dict[str, LayerPlan]]) -> dict[str, dict[str, dict]]:
    """Return what `sensitivity` finds for each layer and weight format, block by block; finished blocks are kept."""
    if all(entry.output is None for entry in job.calls.entries):
        raise ValueError(
            "the transformer returns no tensor, so what a layer does to its output cannot be measured; fix all weights"
        )
    folder = job.folder / "sensitivity"
    calls = call_files.recorded(folder / "calls") or call_files.store(sensitivity.few(job.calls), folder / "calls")
    found: dict[str, dict[str, dict]] = {}
    with progress.bar(len(options), "measure what each layer's weight does", "layer") as bar:
        for unit in quantize_blocks.walk(job, options, calls, folder):
            path = folder / f"{unit.path}.json"
            if unit.names and path.exists():
                bar.update(len(unit.names))
            elif unit.names:
                stats = quantize_blocks.statistics_of(job, unit)
                part = sensitivity.MeasuredBlock(unit.run, unit.linears, list(sensitivity.measured(unit.calls)), stats)
                result = sensitivity.sensitivity(
                    part,
                    options,
                    job.transformer,
                    list(sensitivity.measured(calls)),
                    lambda made: QuantLinear.from_tensors(made.spec, made.tensors, made.bias),
                    job.unit_seed(unit.number),
                    bar.update,
                )
                sealed.write(path, result, job.run)
            if unit.names:
                found |= sealed.read(path, job.run)
    return {name: found[name] for name in options}


def _check_target(
    plan_recipe: Recipe, options: dict[str, dict[str, LayerPlan]], target: Target | None, transformer: nn.Module
) -> None:
    """Refuse what cannot be before any work is done: `auto` without a target or the reverse, a budget that is too small."""
    is_open = any(len(plans) > 1 for plans in options.values())
    if target is None and is_open:
        raise ValueError(
            f'recipe {plan_recipe.name} has weight = "auto": say how small with --size-budget 0.25,'
            " or how good with --max-drift 0.05"
        )
    if target is not None and not is_open:
        raise ValueError(
            f"recipe {plan_recipe.name} fixes the weight of every layer, so there is nothing to choose for a size budget or a"
            ' largest drift; give some rule weight = "auto"'
        )
    if target is not None and target.size_budget is not None:
        linears = {name: transformer.get_submodule(name) for name in options}
        whole = HALF * sum(m.in_features * m.out_features for m in linears.values())
        least = sum(min(_bytes(linears[name], plan) for plan in plans.values()) for name, plans in options.items())
        _check_budget(math.floor(target.size_budget * whole), least, whole, target)


def _check_training(
    training: Training | None, settings: Settings, transformers: dict[str, nn.Module], options: dict[str, dict[str, dict]]
) -> None:
    if training is None:
        return
    if not settings.samples:
        raise ValueError("calibrating assignments needs samples; leave out --samples 0, or --calibration-steps")
    if training.mode == "end-to-end" and any(streaming.is_streamed(t) for t in transformers.values()):
        raise ValueError(
            "calibrating assignments end-to-end needs the transformer in memory as a whole: give a larger --memory-budget, or"
            " --calibration-mode block"
        )
    check_trains(plan.rule for layers in options.values() for of_layer in layers.values() for plan in of_layer.values())


def _check_budget(budget: int, least: int, whole: int, target: Target) -> None:
    if budget < least:
        enough = math.ceil(least / whole * 1000) / 1000
        raise ValueError(
            f"a size budget of {target.size_budget:g} is {budget:,} bytes, but these layers need at least {least:,} with the"
            f" narrowest weights; give at least --size-budget {enough:g}"
        )


def _bytes(linear: nn.Linear, plan: LayerPlan) -> int:
    """Return the stored bytes of a layer so planned, without what only calibration can tell (such as a rank)."""
    q = QSpec(plan.rule.weight, linear.out_features, linear.in_features, plan.group_size)
    block = hadamard.block_size(linear.in_features) if plan.rule.rotation in ("hadamard", "regular", "auto") else 1
    return stored_bytes(LayerSpec(q, rotation="hadamard", block=block) if block > 1 else LayerSpec(q))


def _left(source: Source) -> set[str]:
    """Return what of a pipeline's folder is not copied into the output."""
    return {*source.parts, REPORT}


def _source_digest(source: Source) -> str:
    """Identify the source's transformers by the sha256 of their files' sha256s."""
    whole = hashlib.sha256()
    for part in source.parts:
        for path in sorted(source.part(part).glob("*.safetensors")):
            whole.update(files.sha256(path).encode())
    return whole.hexdigest()


def _config_digest(source: Source) -> str:
    """Identify what else decides on the calls: the configs of the transformers, of the scheduler and of all other parts."""
    found = (path.relative_to(source.folder) for pattern in ("*.json", "*/*.json") for path in source.folder.glob(pattern))
    shown = sorted(path for path in found if not any(part.startswith(".") for part in path.parts))
    return hashlib.sha256("\n".join(f"{path} {files.sha256(source.folder / path)}" for path in shown).encode()).hexdigest()
