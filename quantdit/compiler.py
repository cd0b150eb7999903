"""The compiler: pipeline and recipe in, quantized diffusers folder out, block by block and resumable."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import quantdit
from quantdit import checkpoint, hadamard, recipe
from quantdit.calibration import allocate, capture, sensitivity
from quantdit.calibration.allocate import Option
from quantdit.calibration.layer import quantize_layer
from quantdit.calibration.stats import Stats
from quantdit.formats import QSpec
from quantdit.layer_spec import LayerSpec, layer_fields
from quantdit.linear import QuantLinear, follow_timesteps, weight_bits
from quantdit.models import adapter as adapters
from quantdit.pipeline import Source, generate
from quantdit.recipe import LayerPlan, Recipe
from quantdit.timesteps import edges_of, timestep_of

REPORT = "calibration_report.json"
MEASURED_CALLS = 8
HALF = 2  # bytes of a weight in 16 bits


@dataclass(frozen=True)
class Settings:
    """What calibration data is made of: `samples` images of `steps` sampling steps; statistics in `buckets` of timesteps."""

    samples: int = 32
    steps: int = 20
    seed: int = 0
    guidance: float | None = None
    buckets: int = 10


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
    settings: Settings = Settings(),
    resume: bool = False,
    overwrite: bool = False,
    target: Target | None = None,
) -> dict:
    """Quantize the pipeline's transformer and write the quantized pipeline folder; returns the calibration report.

    Work goes on in `OUTPUT.partial` beside the output and is renamed at the end, so the final name never holds half a model.
    Each finished block is stored there; `resume=True` continues after the last one. The same source, recipe, settings, target
    and versions give the same bytes of `transformer/`. A recipe with `auto` weights needs a target.

    Raises:
        ValueError: output not empty, a recipe that does not fit, NaN or infinite weights or activations (the layer is named),
            or a partial run of other settings.
        OSError: the output cannot be written.
    """
    began = time.perf_counter()
    transformer = pipeline.transformer.eval()
    if checkpoint.quant_layers(transformer):
        raise ValueError(f"{source.folder} is quantized already; calibrate from the full-precision model")
    if output.resolve().is_relative_to(source.folder.resolve()):
        raise ValueError(f"output {output} lies inside the source {source.folder}; choose a folder outside")
    adapter = adapters.adapter_for(transformer)
    options = recipe.options(plan_recipe, adapters.layers(transformer, adapter))
    if not options:
        raise ValueError(f"recipe {plan_recipe.name} leaves every layer dense, so there is nothing to quantize")
    _check_target(plan_recipe, options, target, transformer)
    _check_weights(transformer)
    provenance = {
        "quantdit": quantdit.__version__,
        "source": source.label,
        "source_sha256": _source_digest(source.folder),
        "calibration": asdict(settings),
    }
    if target is not None:
        provenance["target"] = asdict(target)
    identity = {"recipe": plan_recipe.to_dict(), "provenance": provenance}
    partial = _open_partial(output, identity, resume, overwrite)

    def sample() -> None:
        generate(pipeline, settings.samples, settings.seed, settings.steps, settings.guidance, description="sample the model")

    calls = capture.transformer_calls(sample, transformer, settings.steps, settings.buckets)
    captured = time.perf_counter()
    job = _Job(transformer, adapter, calls, settings, partial)
    if target is None:
        made = _quantize(job, {name: next(iter(plans.values())) for name, plans in options.items()}, partial / "blocks")
        extra = {}
    else:
        made, allocation = _quantize_to_target(job, options, target)
        extra = {"allocation": allocation}
    quantized = time.perf_counter()

    copy_rest(source.folder, partial)
    digest = checkpoint.write_transformer(transformer, partial / "transformer", plan_recipe.to_dict(), provenance)
    report = {
        "recipe": plan_recipe.to_dict(),
        "provenance": provenance,
        "sha256": digest,
        "machine": {"platform": platform.platform(), "torch": torch.__version__, "diffusers": version("diffusers")},
        "seconds": {
            "sample": round(captured - began, 1),
            "quantize": round(quantized - captured, 1),
            "write": round(time.perf_counter() - quantized, 1),
        },
        "model_rel_rmse": made.drift,
        "size": size_of(transformer, partial / "transformer" / checkpoint.WEIGHTS),
        **extra,
        "layers": made.reports,
    }
    checkpoint.write_json(partial / REPORT, report)
    _publish(partial, output)
    return report


def size_of(transformer: nn.Module, weights: Path) -> dict:
    """Count what the written file holds: bytes in all, and stored bits per weight of the quantized layers."""
    layers = checkpoint.quant_layers(transformer).values()
    weights_count = sum(m.in_features * m.out_features for m in layers)
    stored = sum(weight_bits(m) * m.in_features * m.out_features for m in layers)
    return {
        "file_bytes": weights.stat().st_size,
        "quantized_weights": weights_count,
        "bits_per_weight": round(stored / max(1, weights_count), 4),
        "dense_values": sum(t.numel() for t in transformer.state_dict().values()) - _own_values(transformer),
    }


def _own_values(transformer: nn.Module) -> int:
    return sum(b.numel() for m in checkpoint.quant_layers(transformer).values() for b in m.buffers(recurse=False))


@dataclass(frozen=True)
class _Unit:
    """A part of the model that is calibrated at once: a block, or everything outside the blocks."""

    path: str
    linears: dict[str, nn.Linear]
    calls: list[capture.Call]
    run: nn.Module
    buckets: int


@dataclass(frozen=True)
class _Job:
    """What a run works on and with."""

    transformer: nn.Module
    adapter: adapters.Adapter
    calls: list[capture.Call]
    settings: Settings
    partial: Path


@dataclass(frozen=True)
class _Made:
    """The layers' reports of a quantized transformer, and its model_rel_rmse."""

    reports: dict[str, dict]
    drift: float | None


def _quantize(job: _Job, plans: dict[str, LayerPlan], folder: Path) -> _Made:
    """Quantize the transformer as planned; finished blocks are kept in `folder`, and taken from there if they are."""
    transformer, calls, settings = job.transformer, job.calls, job.settings
    reports: dict[str, dict] = {}
    for unit, number in _units(transformer, job.adapter, plans, calls, settings.buckets):
        reports.update(_quantize_unit(transformer, unit, plans, folder, _unit_seed(settings, number)))
    if any(m.layer_spec.activation.buckets for m in checkpoint.quant_layers(transformer).values()):
        follow_timesteps(transformer, _timestep_edges(calls, settings.buckets))
    return _Made(reports, capture.model_error(transformer, calls[:: max(1, len(calls) // MEASURED_CALLS)]))


def _unit_seed(settings: Settings, number: int) -> int:
    return settings.seed * 1009 + number


def _quantize_to_target(job: _Job, options: dict[str, dict[str, LayerPlan]], target: Target) -> tuple[_Made, dict]:
    """Choose each layer's weight format for the target and quantize the transformer so; returns the report's allocation too."""
    widths = _sensitivities(job, options)
    choices = {name: tuple(Option(w, e["bytes"], e["error"]) for w, e in of.items()) for name, of in widths.items()}
    full = {name: job.transformer.get_submodule(name) for name in options}
    whole = HALF * sum(m.in_features * m.out_features for m in full.values())
    tried: list[dict[str, Option]] = []

    def quantize(chosen: dict[str, Option]) -> _Made:
        # Each attempt keeps its blocks: a later one may turn out worse, and an interrupted run goes through them again.
        if chosen not in tried:
            tried.append(chosen)
        sensitivity.put(job.transformer, full)
        plans = {name: plans[chosen[name].weight] for name, plans in options.items()}
        return _quantize(job, plans, job.partial / f"blocks-{tried.index(chosen)}")

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
    return sum(b.nbytes for m in checkpoint.quant_layers(transformer).values() for b in m.buffers(recurse=False))


def _sensitivities(job: _Job, options: dict[str, dict[str, LayerPlan]]) -> dict[str, dict[str, dict]]:
    """Return what `sensitivity` finds for each layer and weight format, block by block; finished blocks are kept."""
    if all(call.output is None for call in job.calls):
        raise ValueError(
            "the transformer returns no tensor, so what a layer does to its output cannot be measured; fix all weights"
        )
    calls = sensitivity.few(job.calls)
    folder = job.partial / "sensitivity"
    folder.mkdir(exist_ok=True)
    found: dict[str, dict[str, dict]] = {}
    for unit, number in _units(job.transformer, job.adapter, options, calls, job.settings.buckets, "sensitivity"):
        path = folder / f"{unit.path}.json"
        if unit.linears and not path.exists():
            part = sensitivity.Part(unit.run, unit.linears, sensitivity.measured(unit.calls), _statistics(unit))
            result = sensitivity.sensitivity(
                part,
                options,
                job.transformer,
                sensitivity.measured(calls),
                lambda made: QuantLinear.from_tensors(made.spec, made.tensors, made.bias),
                _unit_seed(job.settings, number),
            )
            checkpoint.write_json(path, result)
        if unit.linears:
            found |= checkpoint.read_json(path)
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
    block = hadamard.block_size(linear.in_features) if plan.rule.rotation == "hadamard" else 1
    spec = LayerSpec(q, rotation="hadamard", block=block) if block > 1 else LayerSpec(q)
    return sum(math.prod(field.shape) * field.dtype.itemsize for field in layer_fields(spec).values())


def _units(
    transformer: nn.Module,
    adapter: adapters.Adapter,
    plans: Mapping[str, object],
    calls: list[capture.Call],
    buckets: int,
    description: str = "quantize",
) -> Iterator[tuple[_Unit, int]]:
    """Yield block after block with its inputs, as left by the blocks quantized before it; the rest of the model last."""
    chain = adapters.blocks(transformer, adapter)
    block_calls = capture.first_block_calls(transformer, chain[0][1], calls)
    done: set[str] = set()
    for index, (path, block) in enumerate(tqdm(chain, desc=description, unit="block")):
        linears = {n: transformer.get_submodule(n) for n in plans if n.startswith(f"{path}.")}
        done |= linears.keys()
        yield _Unit(path, linears, block_calls, block, buckets), index
        if index + 1 < len(chain):
            block_calls = [capture.next_block_call(call, capture.run_call(block, call), adapter.carry) for call in block_calls]
    rest = {n: transformer.get_submodule(n) for n in plans if n not in done}
    if rest:
        yield _Unit("outside", rest, calls, transformer, buckets), len(chain)


def _quantize_unit(transformer: nn.Module, unit: _Unit, plans: dict[str, LayerPlan], folder: Path, seed: int) -> dict[str, dict]:
    """Replace the unit's linears by QuantLinears, from the folder if they are there, and return their reports."""
    if not unit.linears:
        return {}
    tensors_path = folder / f"{unit.path}.safetensors"
    report_path = tensors_path.with_suffix(".json")
    if report_path.exists():
        finished = checkpoint.read_json(report_path)
        if not tensors_path.exists() or _digest(tensors_path, finished.get("layers")) != finished.get("sha256"):
            raise ValueError(
                f"{tensors_path} is not what the interrupted run wrote; drop --resume and begin again with --overwrite"
            )
        stored, reports = load_file(tensors_path), finished["layers"]
        for name in unit.linears:
            tensors = {k.removeprefix(f"{name}."): t for k, t in stored.items() if k.startswith(f"{name}.")}
            bias = tensors.pop("bias", None)
            _replace(transformer, name, LayerSpec.from_dict(reports[name]["spec"]), tensors, bias)
        return reports
    stats = _statistics(unit)
    stored, reports = {}, {}
    for name, linear in unit.linears.items():
        made = quantize_layer(linear.weight, linear.bias, stats[name], plans[name], seed)
        tensors = made.tensors if made.bias is None else made.tensors | {"bias": made.bias.detach()}
        stored.update({f"{name}.{field}": t for field, t in tensors.items()})
        layer = _replace(transformer, name, made.spec, made.tensors, made.bias)
        reports[name] = made.report | {
            "bits_per_weight": round(weight_bits(layer), 4),
            "rel_rmse": _layer_error(linear, layer, stats[name]),
        }
    part = tensors_path.with_suffix(".part")
    part.parent.mkdir(exist_ok=True)
    save_file(stored, part)
    os.replace(part, tensors_path)
    checkpoint.write_json(report_path, {"sha256": _digest(tensors_path, reports), "layers": reports})
    return reports


def _digest(tensors_path: Path, reports: object) -> str:
    """Return the sha256 of a finished block: its tensors and its reports."""
    return hashlib.sha256((checkpoint.sha256(tensors_path) + json.dumps(reports)).encode()).hexdigest()


def _statistics(unit: _Unit) -> dict[str, Stats]:
    """Return the statistics of the inputs of each of the unit's linears.

    Raises:
        ValueError: a layer that is never called, or inputs that overflow.
    """
    stats: dict[str, Stats] = {}
    with capture.collecting(unit.linears, unit.buckets, stats) as set_bucket:
        for call in unit.calls:
            set_bucket(call.bucket)
            capture.run_call(unit.run, call)
    for name in unit.linears:
        if name not in stats:
            raise ValueError(f"layer {name} was never called while sampling; leave it out with an earlier rule weight = 'dense'")
        if not bool(torch.isfinite(stats[name].gram.diagonal()).all()):
            raise ValueError(f"layer {name}: its inputs are so large that their squares overflow float32; the model is broken")
    return stats


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


def _replace(transformer: nn.Module, name: str, spec: LayerSpec, tensors: dict[str, Tensor], bias: Tensor | None) -> QuantLinear:
    layer = QuantLinear.from_tensors(spec, tensors, bias)
    parent, _, child = name.rpartition(".")
    setattr(transformer.get_submodule(parent), child, layer)
    return layer


def _timestep_edges(calls: list[capture.Call], buckets: int) -> tuple[float, ...]:
    timesteps = [(timestep_of(call.args, call.kwargs), call.bucket) for call in calls]
    return edges_of([(t, bucket) for t, bucket in timesteps if t is not None], buckets)


def _check_weights(transformer: nn.Module) -> None:
    for name, weight in transformer.state_dict().items():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            count = int((~torch.isfinite(weight)).sum())
            layer, _, kind = name.rpartition(".")
            raise ValueError(f"layer {layer}: {count} values of its {kind} are NaN or infinite; the source is damaged")


def _source_digest(folder: Path) -> str:
    """Identify the source's transformer by the sha256 of its files' sha256s."""
    whole = hashlib.sha256()
    for path in sorted((folder / "transformer").glob("*.safetensors")):
        whole.update(checkpoint.sha256(path).encode())
    return whole.hexdigest()


def _open_partial(output: Path, identity: dict, resume: bool, overwrite: bool) -> Path:
    """Return the work folder, fresh or holding the blocks of an interrupted run of the same identity."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; give a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"output {output} is not empty; choose another folder or pass --overwrite")
    partial = output.with_name(output.name + ".partial")
    state = partial / "identity.json"
    stored = json.loads(json.dumps(identity))
    if partial.exists() and resume and state.exists():
        if checkpoint.read_json(state) != stored:
            raise ValueError(f"{partial} was begun with another source, recipe or settings; repeat those, or drop --resume")
        return partial
    if partial.exists():
        if not partial.is_dir() or (not state.exists() and any(partial.iterdir())):
            raise ValueError(f"{partial} is where work on {output.name} would go, but holds something else; move it away")
        if not resume and not overwrite and state.exists():
            raise ValueError(f"{partial} holds an interrupted run; pass --resume to go on with it, or --overwrite to begin again")
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    checkpoint.write_json(state, stored)
    return partial


def copy_rest(source: Path, partial: Path) -> None:
    """Copy the pipeline's other parts, so that the output folder is whole."""
    for path in sorted(source.iterdir()):
        if path.name in ("transformer", REPORT) or path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.copytree(path, partial / path.name, dirs_exist_ok=True)
        else:
            shutil.copy2(path, partial / path.name)


def _publish(partial: Path, output: Path) -> None:
    """Give the finished folder its name; an old one is moved away first and removed last."""
    for work in (*partial.glob("blocks*"), partial / "sensitivity"):
        shutil.rmtree(work, ignore_errors=True)
    (partial / "identity.json").unlink()
    if not output.exists():
        os.replace(partial, output)
        return
    grave = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    os.replace(output, grave / output.name)
    os.replace(partial, output)
    shutil.rmtree(grave, ignore_errors=True)


_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space and run the same command with --resume",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command with --resume",
    errno.EFBIG: "the file would be larger than the system allows (ulimit -f); raise the limit and use --resume",
    errno.EACCES: "no permission to write there; choose another --output",
    errno.EPERM: "no permission to write there; choose another --output",
    errno.EROFS: "the file system is read-only; choose another --output",
    errno.ENOTDIR: "a part of the path is a file; choose another --output",
    errno.EIO: "the disk reports an error of its own; choose another --output",
}


@contextmanager
def clear_disk_errors(output: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one line that says what to do.

    Raises:
        ValueError: no space, no permission, read-only, and the like.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors and shutil.copytree keep the error number only in their text.
        found = re.search(r"(?:os error |\[Errno )(\d+)", str(error))
        number = getattr(error, "errno", None) or (int(found[1]) if found else None)
        if number not in _REMEDIES:
            raise
        raise ValueError(f"cannot write {output}: {_REMEDIES[number]}") from error
