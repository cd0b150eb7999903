"""The compiler: pipeline and recipe in, quantized diffusers folder out, block by block and resumable."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
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
from quantdit.calibration import capture
from quantdit.calibration.quantize import output_error, quantize_weight
from quantdit.calibration.stats import Stats
from quantdit.formats import QSpec
from quantdit.linear import QuantLinear, weight_bits
from quantdit.models import adapter as adapters
from quantdit.pipeline import Source, generate
from quantdit.qtensor import FIELDS, QTensor
from quantdit.recipe import LayerPlan, Recipe

REPORT = "calibration_report.json"
HISTOGRAM_BINS = 97


@dataclass(frozen=True)
class Settings:
    """What calibration data is made of: `samples` images of `steps` sampling steps; statistics in `buckets` of timesteps."""

    samples: int = 32
    steps: int = 20
    seed: int = 0
    guidance: float | None = None
    buckets: int = 10


def calibrate(
    pipeline,
    source: Source,
    plan_recipe: Recipe,
    output: Path,
    settings: Settings = Settings(),
    resume: bool = False,
    overwrite: bool = False,
) -> dict:
    """Quantize the pipeline's transformer and write the quantized pipeline folder; returns the calibration report.

    Work goes on in `OUTPUT.partial` beside the output and is renamed at the end, so the final name never holds half a model.
    Each finished block is stored there; `resume=True` continues after the last one. The same source, recipe, settings and
    versions give the same bytes of `transformer/`.

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
    plans = recipe.resolve(plan_recipe, adapters.layers(transformer, adapter))
    if not plans:
        raise ValueError(f"recipe {plan_recipe.name} leaves every layer dense, so there is nothing to quantize")
    _check_weights(transformer)
    provenance = {
        "quantdit": quantdit.__version__,
        "source": source.label,
        "source_sha256": _source_digest(source.folder),
        "calibration": asdict(settings),
    }
    identity = {"recipe": plan_recipe.to_dict(), "provenance": provenance}
    partial = _open_partial(output, identity, resume, overwrite)

    def sample() -> None:
        generate(pipeline, settings.samples, settings.seed, settings.steps, settings.guidance, description="sample the model")

    calls = capture.transformer_calls(sample, transformer, settings.steps, settings.buckets)
    captured = time.perf_counter()
    reports: dict[str, dict] = {}
    for unit, sign_seed in _units(transformer, adapter, plans, calls, settings.buckets):
        reports.update(_quantize_unit(transformer, unit, plans, partial, sign_seed, settings.seed))
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
        "size": size_of(transformer, partial / "transformer" / checkpoint.WEIGHTS),
        "layers": reports,
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


def _units(
    transformer: nn.Module, adapter: adapters.Adapter, plans: dict[str, LayerPlan], calls: list[capture.Call], buckets: int
) -> Iterator[tuple[_Unit, int]]:
    """Yield block after block with its inputs, as left by the blocks quantized before it; the rest of the model last."""
    chain = adapters.blocks(transformer, adapter)
    block_calls = capture.first_block_calls(transformer, chain[0][1], calls)
    done: set[str] = set()
    for index, (path, block) in enumerate(tqdm(chain, desc="quantize", unit="block")):
        linears = {n: transformer.get_submodule(n) for n in plans if n.startswith(f"{path}.")}
        done |= linears.keys()
        yield _Unit(path, linears, block_calls, block, buckets), index
        if index + 1 < len(chain):
            block_calls = [capture.next_block_call(call, capture.run_call(block, call), adapter.carry) for call in block_calls]
    rest = {n: transformer.get_submodule(n) for n in plans if n not in done}
    if rest:
        yield _Unit("outside", rest, calls, transformer, buckets), len(chain)


def _quantize_unit(
    transformer: nn.Module, unit: _Unit, plans: dict[str, LayerPlan], partial: Path, sign_seed: int, seed: int
) -> dict[str, dict]:
    """Replace the unit's linears by QuantLinears, from the partial folder if they are there, and return their reports."""
    if not unit.linears:
        return {}
    tensors_path = partial / "blocks" / f"{unit.path}.safetensors"
    report_path = tensors_path.with_suffix(".json")
    if report_path.exists():
        finished = checkpoint.read_json(report_path)
        if not tensors_path.exists() or checkpoint.sha256(tensors_path) != finished.get("sha256"):
            raise ValueError(
                f"{tensors_path} is not what the interrupted run wrote; drop --resume and begin again with --overwrite"
            )
        stored, reports = load_file(tensors_path), finished["layers"]
        for name, linear in unit.linears.items():
            plan = plans[name]
            spec = QSpec(**reports[name]["spec"])
            q = QTensor(spec, **{f: stored[f"{name}.{f}"] for f in FIELDS if f"{name}.{f}" in stored})
            _replace(transformer, name, linear, q, plan, stored.get(f"{name}.sign"))
        return reports
    stats: dict[str, Stats] = {}
    with capture.collecting(unit.linears, unit.buckets, stats) as set_bucket:
        for call in unit.calls:
            set_bucket(call.bucket)
            capture.run_call(unit.run, call)
    stored, reports = {}, {}
    for name, linear in unit.linears.items():
        if name not in stats:
            raise ValueError(f"layer {name} was never called while sampling; leave it out with an earlier rule weight = 'dense'")
        if not bool(torch.isfinite(stats[name].gram.diagonal()).all()):
            raise ValueError(f"layer {name}: its inputs are so large that their squares overflow float32; the model is broken")
        plan = plans[name]
        sign = hadamard.random_sign(linear.in_features, seed * 1009 + sign_seed) if plan.hadamard_block > 1 else None
        q, report = quantize_layer(linear, stats[name], plan, sign, seed)
        stored.update({f"{name}.{field}": t.contiguous() for field, t in q.tensors().items()})
        if sign is not None:
            stored[f"{name}.sign"] = sign
        layer = _replace(transformer, name, linear, q, plan, sign)
        reports[name] = report | {
            "bits_per_weight": round(weight_bits(layer), 4),
            "rel_rmse": _layer_error(linear, layer, stats[name]),
        }
    part = tensors_path.with_suffix(".part")
    part.parent.mkdir(exist_ok=True)
    save_file(stored, part)
    os.replace(part, tensors_path)
    checkpoint.write_json(report_path, {"sha256": checkpoint.sha256(tensors_path), "layers": reports})
    return reports


def quantize_layer(linear: nn.Linear, stats: Stats, plan: LayerPlan, sign: Tensor | None, seed: int) -> tuple[QTensor, dict]:
    """Quantize one linear from its statistics; returns the weight (in the rotated space) and its report."""
    rule, block = plan.rule, plan.hadamard_block
    weight, gram = linear.weight.detach().float(), stats.gram
    if sign is not None:
        weight, gram = hadamard.rotate(weight, sign, block), hadamard.rotate_gram(gram, sign, block)
    q = quantize_weight(weight, gram, rule.weight, plan.group_size, rule.method, rule.table, seed)
    normal = weight / torch.where(q.scale > 0, q.scale, torch.ones_like(q.scale))[:, None]
    reach = float(normal.abs().max())
    report = {
        "spec": asdict(q.spec),
        "activation_bits": rule.activation_bits,
        "hadamard_block": block,
        "method": rule.method,
        "rms": stats.rms,
        "weight_only_rel_rmse": output_error(q.dequantize() - weight, weight, gram),
        "activation_absmax": [round(float(v), 5) for v in stats.absmax.amax(dim=1)],
        "weight_histogram": {
            "reach": reach,
            "counts": torch.histc(normal, HISTOGRAM_BINS, -reach, reach).long().tolist(),
        },
    }
    return q, report


def _layer_error(linear: nn.Linear, layer: QuantLinear, stats: Stats) -> float:
    """Return rel_rmse of the layer's output on sampled calibration rows, quantized activations included."""
    with torch.no_grad():
        bias = 0 if linear.bias is None else linear.bias
        reference = linear(stats.rows.to(linear.weight.dtype)) - bias
        difference = layer(stats.rows.to(linear.weight.dtype)) - bias - reference
    return float(difference.norm() / reference.norm().clamp_min(1e-30))


def _replace(
    transformer: nn.Module, name: str, linear: nn.Linear, q: QTensor, plan: LayerPlan, sign: Tensor | None
) -> QuantLinear:
    layer = QuantLinear.from_qtensor(q, plan.rule.activation_bits, plan.hadamard_block, sign, linear.bias)
    parent, _, child = name.rpartition(".")
    setattr(transformer.get_submodule(parent), child, layer)
    return layer


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
    shutil.rmtree(partial / "blocks", ignore_errors=True)
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
