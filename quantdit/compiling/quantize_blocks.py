"""The engine: a transformer quantized block after block, each on what the quantized blocks before it hand on; resumable.

In the work folder of a pass lie the inputs of the next block (block_inputs.py) and, for each finished block, its tensors and its
report. A block is finished once it has its report, so that a process killed at any moment goes on at the last finished block, and
ends with the same bytes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantdit.calibration.data_free import TABLE_ROWS, quantize_table, quantize_without_data
from quantdit.calibration.layer import Quantized, quantize_layers
from quantdit.calibration.observe import capture
from quantdit.calibration.observe.sensitivity import replaced
from quantdit.calibration.stats import Stats
from quantdit.checkpoints import checkpoint
from quantdit.compiling.block_inputs import model_error, walk
from quantdit.compiling.finetune import finetuned
from quantdit.compiling.job import OUTSIDE, Job, Segment, linear_of
from quantdit.layers import quant_attention
from quantdit.layers.quant_embedding import put_layer, quantized_like
from quantdit.layers.quant_linear import QuantLinear, follow_timesteps, weight_bits
from quantdit.models.call_view import view
from quantdit.recipes.finetuning import FineTuning
from quantdit.recipes.resolve import layer_without_data
from quantdit.recipes.rules import LayerPlan
from quantdit.system import checksummed_json, files, progress
from quantdit.system.threads import one_thread
from quantdit.tensors.layer_spec import LayerSpec
from quantdit.tensors.timesteps import edges_of


@dataclass(frozen=True)
class QuantizedTransformer:
    """What became of a transformer.

    Attributes:
        reports: of its layers, by name.
        model_error: model_rel_rmse of its output; None without calls.
    """

    reports: dict[str, dict]
    model_error: float | None


def quantize(job: Job, plans: Mapping[str, LayerPlan], folder: Path) -> QuantizedTransformer:
    """Quantize the transformer as planned; finished blocks are kept in `folder`, and taken from there if they are."""
    reports: dict[str, dict] = {}
    finetuning = job.plan.finetuning
    end_to_end = finetuning is not None and finetuning.mode == "end-to-end" and len(job.calls) > 0
    linears = {name: linear_of(job.model, name) for name in plans} if end_to_end else {}
    attention = quant_attention.attention_of(job.plan.recipe.attention, job.model)
    with progress.bar(len(plans), "quantize", "layer") as bar:
        for segment in walk(job, plans, job.calls, folder):
            reports |= _quantize_segment(job, segment, plans, folder, bar.update)
            # From here on, so that the inputs of the next block have its error.
            quant_attention.put(job.model, {n: s for n, s in attention.items() if _is_in(segment, n, job.blocks)})
    if idle := [name for name, report in reports.items() if not report.get("calibrated", True)]:
        more = f" and {len(idle) - 1} more" if len(idle) > 1 else ""
        text = f"no call reached {idle[0]}{more}, which are quantized from their weights alone; more samples may reach them"
        warnings.warn(files.Advice(text), stacklevel=2)
    if end_to_end:
        assert finetuning is not None
        with job.timed("assignments"):
            _finetune_end_to_end(job, finetuning, linears, reports)
    layers = checkpoint.quant_layers(job.model)
    if any(m.layer_spec.activation.by_time for m in layers.values()):
        follow_timesteps(job.model, _timestep_edges(job))
    with job.timed("measure"):
        error = model_error(job, plans, folder)
    return QuantizedTransformer({name: reports[name] for name in plans}, error)


def _is_in(segment: Segment, name: str, blocks: tuple[str, ...]) -> bool:
    """Return whether a module is part of a segment."""
    if segment.path != OUTSIDE:
        return name.startswith(f"{segment.path}.")
    return not name.startswith(tuple(f"{block}." for block in blocks))


def _quantize_segment(
    job: Job, segment: Segment, plans: Mapping[str, LayerPlan], folder: Path, done: Callable[[int], object]
) -> dict[str, dict]:
    """Replace the segment's linears by QuantLinears, from the folder if they are there, and return their reports.

    `done` is told how many more layers are done.
    """
    if not segment.names:
        return {}
    tensors_path = folder / f"{segment.path}.safetensors"
    report_path = tensors_path.with_suffix(".json")
    if report_path.exists():
        done(len(segment.names))
        return _install(job, tensors_path, report_path)
    if segment.calls is None:
        raise ValueError(f"{folder} lacks the finished block {segment.path}; {checksummed_json.REMEDY}")
    with job.timed("statistics"):
        stats = statistics_of(job, segment) if len(segment.calls) and segment.linears else {}
    with job.timed("layers"):
        made = _quantized(job, segment, stats, plans, done) | _tables(job, segment, plans, done)
    finetuning = job.plan.finetuning
    if finetuning is not None and finetuning.mode == "block" and stats and segment.path != OUTSIDE:
        with job.timed("assignments"):
            made = finetuned(job, finetuning, segment, made, stats)
    reports = _put(job, segment.linears, made, stats)
    _write(job, made, reports, tensors_path, report_path)
    return reports


def _tables(job: Job, segment: Segment, plans: Mapping[str, LayerPlan], done: Callable[[int], object]) -> dict[str, Quantized]:
    """Return the segment's tables of words quantized, row by row, from themselves alone."""
    made = {}
    for name, table in segment.tables.items():
        parts = table.weight.detach().split(TABLE_ROWS)
        if table.weight.device.type == "meta":
            assert job.stream is not None, "what is not in memory is streamed"
            parts = job.stream.rows(f"{name}.weight", TABLE_ROWS)
        rule, rows, width = plans[name].rule, table.num_embeddings, table.embedding_dim
        made[name] = quantize_table(parts, rows, width, rule.weight, plans[name].group_size)
        done(1)
    return made


def _quantized(
    job: Job, segment: Segment, stats: Mapping[str, Stats], plans: Mapping[str, LayerPlan], done: Callable[[int], object]
) -> dict[str, Quantized]:
    """Return the segment's layers quantized as planned; the transformer stays as it is."""
    linears, seed = segment.linears, job.seed_of(segment)
    made: dict[str, Quantized] = {}
    for names in _sharing(linears, stats, plans):
        if names[0] in stats:
            group = {name: (linears[name].weight, linears[name].bias) for name in names}
            made |= quantize_layers(group, stats[names[0]], plans[names[0]], seed)
        else:
            made |= {name: _without_data(job, segment, linears[name], plans[name]) for name in names}
        done(len(names))
    return {name: made[name] for name in linears}


def _put(
    job: Job, linears: Mapping[str, nn.Linear], made: Mapping[str, Quantized], stats: Mapping[str, Stats]
) -> dict[str, dict]:
    """Put quantized layers into the transformer, and return their reports with their size and, where inputs are known, error."""
    reports = {}
    for name, found in made.items():
        layer = _put_layer(job.model, name, found.spec, found.tensors, found.bias)
        error = {"rel_rmse": _layer_error(linears[name], layer, stats[name])} if name in stats else {}
        reports[name] = found.report | {"bits_per_weight": round(weight_bits(layer), 4)} | error
    return reports


def _put_layer(model: nn.Module, name: str, spec: LayerSpec, tensors: dict[str, Tensor], bias: Tensor | None) -> QuantLinear:
    """Put a quantized layer in the place of a linear or of a table of words, and return it."""
    layer = quantized_like(model.get_submodule(name), spec, tensors, bias)
    put_layer(model, name, layer)
    return layer


def _write(job: Job, made: Mapping[str, Quantized], reports: dict[str, dict], tensors_path: Path, report_path: Path) -> None:
    """Keep a finished block: its tensors first, so that the report is the sign that it is whole."""
    stored = {f"{name}.{field}": t for name, found in made.items() for field, t in found.tensors.items()}
    stored |= {f"{name}.bias": found.bias.detach() for name, found in made.items() if found.bias is not None}
    part = tensors_path.with_suffix(".part")
    save_file(stored, part)
    files.fsync(part)
    os.replace(part, tensors_path)
    checksummed_json.write(report_path, {"sha256": files.sha256(tensors_path), "layers": reports}, job.run)
    if job.stream is not None:
        job.stream.adopt(tensors_path, list(stored))


def _sharing(
    linears: Mapping[str, nn.Linear], stats: Mapping[str, Stats], plans: Mapping[str, LayerPlan]
) -> list[tuple[str, ...]]:
    """Return the layers in groups: those of one input (q, k, v), one plan, and all with a bias or all without."""
    groups: dict[tuple, list[str]] = {}
    for name, linear in linears.items():
        of_input = id(stats[name]) if name in stats else name
        groups.setdefault((of_input, plans[name], linear.bias is None), []).append(name)
    return [tuple(names) for names in groups.values()]


def _without_data(job: Job, segment: Segment, linear: nn.Linear, plan: LayerPlan) -> Quantized:
    """Quantize a layer from its weights; if there are calls and none reached it, its report says so."""
    seed, buckets = job.seed_of(segment), job.plan.sampling.buckets
    assert segment.calls is not None, "a finished block is not quantized again"
    if not len(segment.calls):
        return quantize_without_data(linear.weight, linear.bias, plan, seed, buckets)
    made = quantize_without_data(linear.weight, linear.bias, layer_without_data(plan), seed, buckets)
    return replace(made, report=made.report | {"calibrated": False})


def _finetune_end_to_end(job: Job, finetuning: FineTuning, linears: Mapping[str, nn.Linear], reports: dict[str, dict]) -> None:
    """Fine-tune the layers of all blocks at once, in place; needs them in full precision and all statistics."""
    layers = {name: m for name, m in checkpoint.quant_layers(job.model).items() if name.startswith(job.blocks)}
    made = {name: Quantized(layer.layer_spec, layer.tensors(), layer.bias, reports[name]) for name, layer in layers.items()}
    full = {name: linears[name] for name in layers}
    with replaced(job.model, full):
        whole = Segment(OUTSIDE, len(job.blocks), tuple(full), job.model, job.calls)
        stats = statistics_of(job, whole)
        found = finetuned(job, finetuning, whole, made, stats)
    reports |= _put(job, full, found, stats)


def _install(job: Job, tensors_path: Path, report_path: Path) -> dict[str, dict]:
    """Put the layers of a finished block into the transformer."""
    finished = checksummed_json.read(report_path, job.run)
    if not tensors_path.exists() or files.sha256(tensors_path) != finished["sha256"]:
        raise ValueError(f"{tensors_path} is not what the interrupted run wrote; {checksummed_json.REMEDY}")
    stored, reports = load_file(tensors_path), finished["layers"]
    for name in reports:
        tensors = {k.removeprefix(f"{name}."): t for k, t in stored.items() if k.startswith(f"{name}.")}
        bias = tensors.pop("bias", None)
        spec = LayerSpec.from_dict(reports[name]["spec"])
        _put_layer(job.model, name, spec, tensors, bias)
    if job.stream is not None:
        job.stream.adopt(tensors_path, list(stored))
    return reports


def statistics_of(job: Job, segment: Segment) -> dict[str, Stats]:
    """Return the statistics of the inputs of each of the segment's linears; experts that no token reaches have none.

    Raises:
        ValueError: inputs that overflow.
    """
    assert segment.calls is not None, "a finished block is not observed again"
    stats: dict[str, Stats] = {}
    with capture.collecting(segment.linears, job.plan.sampling.buckets, stats, job.plan.sampling.tokens) as set_bucket:
        for call in segment.calls:
            set_bucket(call.bucket)
            capture.run_block(segment.run, call)
    for name, found in stats.items():
        if not bool(torch.isfinite(found.gram.diagonal()).all()):
            raise ValueError(f"layer {name}: its inputs are so large that their squares overflow float32; the model is broken")
    return stats


@one_thread()
def _layer_error(linear: nn.Linear, layer: QuantLinear, stats: Stats) -> float:
    """Return rel_rmse of the layer's output on sampled calibration rows, quantized activations included."""
    error = power = 0.0
    with torch.no_grad():
        for bucket in stats.row_buckets.unique().tolist():
            layer.bucket = bucket
            rows = stats.rows[stats.row_buckets == bucket].to(linear.weight.dtype)
            reference = linear(rows)
            error += float((layer(rows) - reference).square().sum())
            power += float((reference - (0 if linear.bias is None else linear.bias)).square().sum())
    return (error / max(power, 1e-30)) ** 0.5


def _timestep_edges(job: Job) -> tuple[float, ...]:
    times = [(view(job.model, call.args, call.kwargs).time, call.bucket) for call in job.calls]
    known = [(time, bucket) for time, bucket in times if time is not None]
    return edges_of([*known, *job.calls.levels], job.plan.sampling.buckets)
