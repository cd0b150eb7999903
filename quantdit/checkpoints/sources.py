"""What a full-precision source may hold: every way of loading one asks here before it takes a tensor for a weight.

Integer codes that another tool wrote are refused. Float8 weights are read: plain ones as they are; those with a scale beside them
(`weight_scale` of Hugging Face, `scale_weight` of ComfyUI; one for the whole weight or for each output channel) times that scale.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from quantdit.checkpoints.checkpoint import METHOD, quantized_by
from quantdit.checkpoints.libraries import aliases
from quantdit.system.files import Advice, CheckpointError, Stored

FLOAT8 = ("F8_E4M3", "F8_E5M2")
FLOATS = ("F64", "F32", "F16", "BF16", *FLOAT8)
SCALES = ("weight_scale", "scale_weight")
OF_INPUTS = ("input_scale", "scale_input")  # of activations: nothing that a weight needs
MARKS = ("comfy_quant",)  # beside a float8 weight it says that it is one
FILE_MARK = "scaled_fp8"  # of ComfyUI: an empty tensor, says that weights have scales
REMEDY = "give the full-precision model"

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def check_method(config: Mapping, where: Path) -> None:
    """Refuse a transformer or an encoder that its config.json says another tool quantized.

    Raises:
        CheckpointError: naming the tool.
    """
    tool = quantized_by(config)
    if tool not in (None, METHOD):
        raise CheckpointError(f"{where}: the weights were quantized by {tool}, whose codes quantdit does not read; {REMEDY}")


def check_safetensors(folder: Path) -> None:
    """Refuse the folder of a model without safetensors weights.

    Raises:
        CheckpointError: its weights are pickled, or not there.
    """
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} has no safetensors weights, and pickled ones (.bin) are not read: they can run any code")


def check(model: nn.Module, stored: Mapping[str, Stored]) -> None:
    """Refuse tensors that are not the weights of a full-precision model.

    Superfluous tensors that are no part of a layer of the model are named in an Advice.

    Args:
        model: the full-precision model; parameters on the meta device, computed buffers not.
        stored: its tensors, and perhaps scales and marks beside them.

    Raises:
        CheckpointError: a tensor is missing, has another shape, holds integers where the model has floats (or the reverse), is an
            extra one of a linear layer, or belongs to a block that the config does not have; or `check_scales` refuses a scale.
    """
    expected = model.state_dict()
    check_scales(stored, expected)
    needed = expected.keys() - aliases(model).keys() - stored.keys()
    missing = sorted(key for key in needed if expected[key].device.type == "meta")
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{_folder(stored)}: tensor {missing[0]} is missing{more}; copy it again")
    _check_superfluous(model, stored, [key for key in stored if key not in expected and not is_beside(key)])
    for key, tensor in expected.items():
        if key not in stored:
            continue
        found = stored[key]
        if (found.dtype in FLOATS) != tensor.is_floating_point():
            kind = "floats" if tensor.is_floating_point() else "integers"
            raise CheckpointError(
                f"{found.path}: tensor {key} is {found.dtype} {found.shape}, but {type(model).__name__} has {kind} there;"
                f" codes of another tool are no weights, {REMEDY}"
            )
        if found.shape != tuple(tensor.shape):
            raise CheckpointError(f"{found.path}: tensor {key} is {found.shape}, expected {tuple(tensor.shape)}")


def check_scales(stored: Mapping[str, Stored], own: Container[str] = ()) -> None:
    """Refuse scales of float8 weights that quantdit cannot apply.

    It applies one scale for the whole weight or one for each output channel. Scales of inputs are ignored with an Advice.

    Args:
        stored: tensors by name, scales and marks included.
        own: names of tensors that the model itself has; they are not looked at.

    Raises:
        CheckpointError: a scale for blocks, under an unknown name, or without a float8 weight beside it.
    """
    float8 = {key.removesuffix("weight") for key, t in stored.items() if t.dtype in FLOAT8 and key.endswith(".weight")}
    known = {"weight", "bias", *SCALES, *OF_INPUTS, *MARKS}
    for key, found in stored.items():
        if key in own:
            continue
        stem, field = _split(key)
        if stem in float8 and field not in known:
            raise CheckpointError(
                f"{found.path}: tensor {key} says how its float8 weight is read, which quantdit cannot; {REMEDY}"
            )
        if field in SCALES:
            if stem not in float8:
                raise CheckpointError(f"{found.path}: tensor {key} has no float8 weight beside it; {REMEDY}")
            out = stored[f"{stem}weight"].shape[0]
            if found.dtype not in FLOATS or found.shape not in ((), (1,), (out,), (1, 1), (out, 1)):
                raise CheckpointError(
                    f"{found.path}: tensor {key} is {found.dtype} {found.shape}; quantdit reads one scale for the whole weight or"
                    f" one for each of its {out} output channels; {REMEDY}"
                )
    if inputs := [key for key in stored if _split(key)[1] in OF_INPUTS]:
        _advise(f"scales of inputs are ignored, calibration finds its own: {_few(inputs)}")


def is_beside(key: str) -> bool:
    """Return whether a tensor's name is that of a scale or a mark beside the weights, or of the mark of the whole file."""
    return _split(key)[1] in (*SCALES, *OF_INPUTS, *MARKS, FILE_MARK)


def scale_of(key: str, names: Container[str]) -> str | None:
    """Return the name of the scale that a float8 weight is multiplied by, None for a plain one."""
    stem, field = _split(key)
    return next((f"{stem}{scale}" for scale in SCALES if f"{stem}{scale}" in names), None) if field == "weight" else None


def scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    """Return the float32 values of a float8 weight `[out, ...]` and its scale: one number, or one for each output channel."""
    values = weight.float()
    if scale is None:
        return values
    return values * scale.to(values.device, torch.float32).reshape(-1, *[1] * (weight.ndim - 1))


def described(state: Mapping[str, Tensor], where: Path) -> dict[str, Stored]:
    """Return what `stored_tensors` would say of tensors that are in memory."""
    return {key: Stored(where, _NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for key, t in state.items()}


def _check_superfluous(model: nn.Module, stored: Mapping[str, Stored], superfluous: list[str]) -> None:
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    modules, others, computed = dict(model.named_modules()), [], {name for name, _ in model.named_buffers()}
    for key in superfluous:
        if key in computed or any(re.search(pattern, key) for pattern in patterns):
            continue
        parts = key.split(".")
        owner = next((path for i in range(len(parts) - 1, 0, -1) if (path := ".".join(parts[:i])) in modules), "")
        if isinstance(modules[owner], nn.Linear):
            raise CheckpointError(
                f"{stored[key].path}: tensor {key} is neither weight nor bias of layer {owner}: another tool quantized or changed"
                f" it; {REMEDY}"
            )
        if isinstance(blocks := modules[owner], nn.ModuleList) and parts[owner.count(".") + 1].isdigit():
            raise CheckpointError(
                f"{stored[key].path}: tensor {key} is of a block that config.json does not have: config.json gives"
                f" {len(blocks)} blocks in {owner}; copy both files again"
            )
        others.append(key)
    if others:
        _advise(f"{_folder(stored)}: ignored, {type(model).__name__} has no such tensors: {_few(others)}")


def _split(key: str) -> tuple[str, str]:
    stem, dot, field = key.rpartition(".")
    return stem + dot, field


def _folder(stored: Mapping[str, Stored]) -> Path:
    """Return the folder that the tensors lie in, or what `described` was told."""
    path = next((found.path for found in stored.values()), Path("the source"))
    return path.parent if path.suffix else path


def _few(names: Iterable[str]) -> str:
    first, *more = sorted(names)
    return f"{first} and {len(more)} more" if more else first


def _advise(text: str) -> None:
    warnings.warn(Advice(text), stacklevel=2)
