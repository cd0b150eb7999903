"""The state dict that diffusers' loader of Flux LoRAs compares shapes with: quantized layers have no weight in theirs."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from quantdit.layers.quant_linear import QuantLinear

REPLACED = "_quantdit_replaced"  # attribute of a transformer: its quantized layers by path that a control LoRA replaced


class _WithWeights:
    """A transformer in whose state dict quantized layers have weights, of a shape and a device but without memory."""

    def __init__(self, transformer: nn.Module) -> None:
        self._transformer = transformer

    def __getattr__(self, name: str) -> object:
        return getattr(self._transformer, name)

    def state_dict(self) -> dict[str, Tensor]:
        layers = {n: m for n, m in self._transformer.named_modules() if isinstance(m, QuantLinear)}
        shapes = {
            n: torch.empty((), device=m.qtensor.data.device).expand(m.out_features, m.in_features) for n, m in layers.items()
        }
        return self._transformer.state_dict() | {f"{name}.weight": shape for name, shape in shapes.items()}


def register(module: ModuleType) -> None:
    """Show the loader of `diffusers.loaders.lora_pipeline` such a state dict; have it put back quantized layers it replaced."""
    loader = module.FluxLoraLoaderMixin
    expand = loader._maybe_expand_lora_state_dict.__func__
    if hasattr(expand, "quantdit"):
        return

    def with_weights(cls: type, transformer: nn.Module, lora_state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return expand(cls, _WithWeights(transformer), lora_state_dict)

    vars(with_weights)["quantdit"] = True
    loader._maybe_expand_lora_state_dict = classmethod(with_weights)
    _put_back(loader)


def _put_back(loader: type) -> None:
    """A control LoRA replaces the first layer by a wider, ordinary one; unloading with reset_to_overwritten_params undoes it."""
    widen, unload = loader._maybe_expand_transformer_param_shape_or_error_.__func__, loader.unload_lora_weights

    @functools.wraps(widen)
    def remembering(cls: type, transformer: nn.Module, *args: object, **kwargs: object) -> bool:
        before = {name: m for name, m in transformer.named_modules() if isinstance(m, QuantLinear)}
        widened = widen(cls, transformer, *args, **kwargs)
        replaced = {n.replace(".base_layer", ""): m for n, m in before.items() if transformer.get_submodule(n) is not m}
        transformer.__dict__[REPLACED] = transformer.__dict__.get(REPLACED, {}) | replaced
        return widened

    @functools.wraps(unload)
    def unloading(self: Any, reset_to_overwritten_params: bool = False) -> None:
        unload(self, reset_to_overwritten_params)
        if not reset_to_overwritten_params:
            return
        transformer = getattr(self, self.transformer_name) if not hasattr(self, "transformer") else self.transformer
        for name, layer in transformer.__dict__.pop(REPLACED, {}).items():
            transformer.set_submodule(name, layer.to(transformer.get_submodule(name).weight.device))

    loader._maybe_expand_transformer_param_shape_or_error_ = classmethod(remembering)
    loader.unload_lora_weights = unloading
