"""The state dict that diffusers' loader of Flux LoRAs compares shapes with: quantized layers have no weight in theirs."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from quantdit.linear import QuantLinear


class _WithWeights:
    """A transformer in whose state dict quantized layers have weights, of a shape and a device but without memory."""

    def __init__(self, transformer: nn.Module) -> None:
        self._transformer = transformer

    def __getattr__(self, name: str) -> object:
        return getattr(self._transformer, name)

    def state_dict(self) -> dict[str, Tensor]:
        layers = {n: m for n, m in self._transformer.named_modules() if isinstance(m, QuantLinear)}
        shapes = {n: torch.empty((), device=m.data.device).expand(m.out_features, m.in_features) for n, m in layers.items()}
        return self._transformer.state_dict() | {f"{name}.weight": shape for name, shape in shapes.items()}


def register(module: ModuleType) -> None:
    """Show the loader of `diffusers.loaders.lora_pipeline` such a state dict."""
    loader = module.FluxLoraLoaderMixin
    expand = loader._maybe_expand_lora_state_dict.__func__
    if hasattr(expand, "quantdit"):
        return

    def with_weights(cls: type, transformer: nn.Module, lora_state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return expand(cls, _WithWeights(transformer), lora_state_dict)

    with_weights.quantdit = True
    loader._maybe_expand_lora_state_dict = classmethod(with_weights)
