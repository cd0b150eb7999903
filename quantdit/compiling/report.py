"""`CompileResult`: what came of a run; its form as calibration_report.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypedDict

from torch import nn

from quantdit.checkpoints import checkpoint
from quantdit.system import files
from quantdit.tensors.layer_spec import layer_fields

REPORT = "calibration_report.json"
RANDOM_WARNING = "RANDOM WEIGHTS: this checkpoint measures time, memory and size; its pictures mean nothing"


class Size(TypedDict):
    """What a written transformer holds: bytes in all, and stored bits per weight of the quantized layers."""

    file_bytes: int
    quantized_weights: int
    bits_per_weight: float
    dense_values: int


class Memory(TypedDict):
    """What the run was to stay within, what it took at most, and whether blocks were read one at a time."""

    budget_bytes: int | None
    peak_bytes: int
    streamed: bool


@dataclass(frozen=True)
class CompileResult:
    """What came of a run. All but `output` and `already_finished` is kept in calibration_report.json.

    Attributes:
        output: the folder that was written.
        recipe: in its dictionary form.
        provenance: versions, source, and what was asked for.
        source_config_sha256: of the configs of the source.
        sha256: of the first transformer as written.
        machine: platform and versions.
        seconds: by stage: sample, quantize, write.
        seconds_of_quantize: the second of these by what was done.
        memory: of the process.
        blocks: by transformer how many blocks it has, and of how many the inputs had to be replayed; None without calls.
        model_rel_rmse: error of the first transformer's output on calibration data; None without.
        size: of all transformers.
        files: that the run wrote, by their paths in `output`.
        layers: what is known of each quantized layer; names in a second transformer begin with its own.
        dense_layers: how many linears were left as they are; None in reports of versions that did not count.
        allocation: how open weights were chosen for the plan's target; None without one.
        model_rel_rmse_of_parts: by transformer, where there are several.
        model_rel_rmse_together: by transformer, the error where it reads quantized text encoders' embeddings; None where none is
            quantized, blocks are streamed, or steps were left out.
        step_plan: what step plans were tried and which is kept; None if none was asked for.
        warning: what a user must know of the output.
        already_finished: a run before made it; nothing was done.
    """

    output: Path
    recipe: dict
    provenance: dict
    source_config_sha256: str
    sha256: str
    machine: dict[str, str]
    seconds: dict[str, float]
    seconds_of_quantize: dict[str, float]
    memory: Memory
    blocks: dict[str, dict | None]
    model_rel_rmse: float | None
    size: Size
    files: list[str]
    layers: dict[str, dict]
    dense_layers: int | None = None
    allocation: dict | None = None
    model_rel_rmse_of_parts: dict[str, float | None] | None = None
    model_rel_rmse_together: dict[str, float] | None = None
    step_plan: dict | None = None
    warning: str | None = None
    already_finished: bool = False

    def mean_error(self) -> tuple[str, float]:
        """Return the layers' mean error, and its name: of their outputs, or without calibration data of their weights."""
        kind = "rel_rmse" if any("rel_rmse" in layer for layer in self.layers.values()) else "weight_rel_rmse"
        errors = [layer[kind] for layer in self.layers.values() if kind in layer]
        return kind, sum(errors) / max(1, len(errors))


_APART = ("output", "already_finished")
_FIELDS = {field.name: field.default is None for field in fields(CompileResult) if field.name not in _APART}


def to_json(result: CompileResult) -> dict:
    """Return the content of calibration_report.json; what a run has nothing to say of is left out."""
    return {name: v for name, may_lack in _FIELDS.items() if (v := getattr(result, name)) is not None or not may_lack}


def from_json(content: Mapping[str, object], output: Path, already_finished: bool = False) -> CompileResult:
    """Return the result that a report speaks of.

    Raises:
        files.CheckpointError: it lacks something.
    """
    if missing := [name for name, may_lack in _FIELDS.items() if not may_lack and name not in content]:
        raise files.CheckpointError(f"{output / REPORT} has no {missing[0]}; it is not of a finished run")
    found = {name: content[name] for name in _FIELDS if name in content}
    return CompileResult(output=output, already_finished=already_finished, **found)  # pyright: ignore[reportArgumentType] - JSON


def read(output: Path) -> CompileResult:
    """Return the result of the run that wrote a folder.

    Raises:
        files.CheckpointError: no report, or a damaged one.
    """
    return from_json(files.read_json(output / REPORT), output)


def size_of(transformer: nn.Module, folder: Path) -> Size:
    """Count what a written transformer folder holds."""
    layers = checkpoint.quant_layers(transformer)
    weights_count = sum(m.in_features * m.out_features for m in layers.values())
    sizes, own = files.tensor_bytes(folder), checkpoint.own_keys(transformer)
    stored = 8 * sum(size for key, size in sizes.items() if key in own)
    own_values = sum(math.prod(field.shape) for m in layers.values() for field in layer_fields(m.layer_spec).values())
    return {
        "file_bytes": sum(path.stat().st_size for path in files.weight_files(folder)),
        "quantized_weights": weights_count,
        "bits_per_weight": round(stored / max(1, weights_count), 4),
        "dense_values": sum(t.numel() for t in transformer.state_dict().values()) - own_values,
    }


def added(sizes: Sequence[Size]) -> Size:
    """Return the sizes of several transformers as one."""
    weights_count = sum(size["quantized_weights"] for size in sizes)
    bits = sum(size["bits_per_weight"] * size["quantized_weights"] for size in sizes)
    return {
        "file_bytes": sum(size["file_bytes"] for size in sizes),
        "quantized_weights": weights_count,
        "bits_per_weight": round(bits / max(1, weights_count), 4),
        "dense_values": sum(size["dense_values"] for size in sizes),
    }
