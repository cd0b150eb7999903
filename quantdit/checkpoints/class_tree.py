"""Is a model what its class builds from its config? If not, a save would not load again, and layers are not where recipes look.

Wrappers of torch.compile, adapters, fused projections, layers that a control LoRA widened, layers that another tool quantized:
each leaves tensors of other names or shapes, which is how they are found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantdit.checkpoints.libraries import config_of, library_of
from quantdit.layers.quant_linear import QuantLinear

# Part of the name of a tensor that the class does not have: what it is, what to do.
KNOWN = {
    "_orig_mod.": (
        "is of a module that torch.compile wrapped",
        "compile modules in place, as module.compile() and compile_repeated_blocks() do, or compile afterwards",
    ),
    "lora_": ("is of an adapter", "unload_lora_weights() first, after fuse_lora() if its effect is to stay"),
    "base_layer.": ("is of a layer with an adapter", "unload_lora_weights() first, after fuse_lora() if its effect is to stay"),
    "to_qkv.": ("is of fused projections", "unfuse_qkv_projections() first"),
    "to_kv.": ("is of fused projections", "unfuse_qkv_projections() first"),
    "to_added_qkv.": ("is of fused projections", "unfuse_qkv_projections() first"),
}
WIDENED = "if a control LoRA widened it, unload_lora_weights(reset_to_overwritten_params=True) first, or load the model anew"
CHANGED = "undo what changed the model, or load it anew"


def difference(model: nn.Module) -> str | None:
    """Return one line: a tensor that the model's class does not build from its config, and the remedy; None if all fit.

    Quantized layers count as the linears that they were. Also None for a class that has no config, or that cannot be built on
    the meta device.
    """
    expected = _built(model)
    if expected is None:
        return None
    found, cls = _tensors(model), type(model).__name__
    for name in sorted(found.keys() - expected.keys(), key=lambda name: (_is_unknown(name), name)):
        what, remedy = next((text for part, text in KNOWN.items() if part in name), (f"is not of a {cls}", CHANGED))
        return f"{name} {what}; {remedy}"
    for name in sorted(found.keys() & expected.keys()):
        if found[name] != expected[name]:
            return f"{name} has shape {found[name]}, but the config gives {expected[name]}; {WIDENED}"
    for name in sorted(expected.keys() - found.keys()):
        return f"{name} is missing, which every {cls} with this config has; {CHANGED}"
    return None


def quantized_by(model: nn.Module) -> str | None:
    """Return in words what another tool quantized a model with; None for a model in full precision, plain float8 included."""
    config = getattr(model, "config", None)
    config = (config if isinstance(config, Mapping) else getattr(config, "__dict__", {})).get("quantization_config")
    if config is not None:
        method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
        return f"{getattr(method, 'value', method) or type(config).__name__}, as its config says"
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        return f"{type(quantizer).__name__}, which loaded it"
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear) or not isinstance(weight, Tensor):
            continue
        if type(weight) not in (Tensor, nn.Parameter):
            return f"{_tool(weight)}: {name}.weight is a {type(weight).__name__}"
        if not weight.is_floating_point():
            tool = _tool(module)
            return f"{'another tool' if tool == 'torch' else tool}: {name}.weight is {str(weight.dtype).removeprefix('torch.')}"
    return None


def _tool(thing: object) -> str:
    return type(thing).__module__.partition(".")[0]


def _is_unknown(name: str) -> bool:
    return not any(part in name for part in KNOWN)


def _built(model: nn.Module) -> dict[str, tuple[int, ...]] | None:
    cls: Any = type(model)
    if not hasattr(model, "config") or not (hasattr(cls, "from_config") or hasattr(cls, "_from_config")):
        return None
    try:
        with torch.device("meta"):
            made = library_of(model).build(cls, config_of(model))
    except Exception:  # a class may fail without memory in any way
        return None
    return {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}


def _tensors(model: nn.Module) -> dict[str, tuple[int, ...]]:
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, QuantLinear):
            for field in layer._buffers:
                found.pop(f"{name}.{field}", None)
            found[f"{name}.weight"] = (layer.out_features, layer.in_features)
    return found
