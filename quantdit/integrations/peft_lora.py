"""PEFT's LoRA on a QuantLinear: fused into the layer's low-rank branch, where it keeps its values, instead of into its codes.

PEFT merges an adapter by writing to `base_layer.weight.data`. The weight of a QuantLinear is decoded anew each time, so that
would be lost without a word. The branch is there for such a thing: a fused adapter is more columns and rows of it, bfloat16.
"""

from __future__ import annotations

import functools
import inspect
from types import ModuleType
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from quantdit.integrations.import_hooks import watch
from quantdit.layers.quant_linear import QuantLinear


class QuantLoraLinear(Linear):
    """PEFT's layer around a QuantLinear. Unfused it is PEFT's own; fusing and unfusing leave the quantized weight as it is.

    Once the model is dequantized, there is an ordinary linear in it, and it is PEFT's own throughout.
    """

    # The layer's branch before the first adapter was fused: unfusing needs no adapter, which may be deleted by then.
    _unfused: dict[str, Tensor] | None = None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fuse adapters.

        Raises:
            ValueError: as `check_fusing`, before anything is fused.
        """
        base = self.get_base_layer()
        if not isinstance(base, QuantLinear):
            super().merge(safe_merge, adapter_names)
            return
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        self.check_fusing(names)
        for name in names:
            if self._unfused is None:
                self._unfused = base.branch
            base.extend_branch(*self._factors(name))
            self.merged_adapters.append(name)

    def check_fusing(self, adapter_names: list[str] | None) -> None:
        """Refuse adapters that `merge` could not fuse into a quantized layer.

        Args:
            adapter_names: of them; None for those that are active.

        Raises:
            ValueError: one is more than a product of two matrices (DoRA, a bias), or not finite.
        """
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name not in self.lora_A or name in self.merged_adapters:
                continue
            if name in self.lora_variant or self.lora_bias[name]:
                raise ValueError(
                    f"adapter {name!r} is DoRA or has a bias, which is not fused into a quantized layer; run it unfused"
                )
            if not all(bool(torch.isfinite(factor).all()) for factor in self._factors(name)):
                raise ValueError(f"adapter {name!r} has NaN or infinite entries; it is broken")

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return an adapter as `up` `[out, r]`, scaled, and `down` `[r, in]`."""
        up, down = self.lora_B[name].weight, self.lora_A[name].weight
        assert isinstance(up, Tensor) and isinstance(down, Tensor)  # of linears
        return up.detach() * self.scaling[name], down.detach()

    def unmerge(self) -> None:
        """Undo all fusing; the layer has the bits it had before."""
        base = self.get_base_layer()
        if not isinstance(base, QuantLinear):
            super().unmerge()
            return
        if self._unfused is not None:
            base.branch, self._unfused = self._unfused, None
        self.merged_adapters.clear()


def check_fusing(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Refuse to fuse adapters into a model where one of its quantized layers could not take them, before any layer has.

    Raises:
        ValueError: as `QuantLoraLinear.check_fusing`, or the adapter is no LoRA.
    """
    for module in model.modules():
        if not isinstance(module, BaseTunerLayer) or not isinstance(module.get_base_layer(), QuantLinear):
            continue
        if not isinstance(module, QuantLoraLinear):
            raise ValueError("only LoRA is fused into a quantized layer; run this adapter unfused")
        module.check_fusing(adapter_names)


def register(module: ModuleType) -> None:
    """Have PEFT take QuantLoraLinear for a QuantLinear, and check all layers before it merges an adapter into the first.

    Args:
        module: `peft.tuners.lora.model`.
    """
    _dispatch_first(module)
    for name in ("merge_adapter", "_unload_and_optionally_merge"):
        _check_first(name)


def _dispatch_first(module: ModuleType) -> None:
    others = module.dispatch_default
    if hasattr(others, "quantdit"):
        return

    def dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, QuantLinear) and kwargs.get("parameter_name") is None:
            return QuantLoraLinear(target, adapter_name, config=config, **kwargs)
        return others(target, adapter_name, config=config, **kwargs)

    vars(dispatch)["quantdit"] = True
    vars(module)["dispatch_default"] = dispatch


def _check_first(method: str) -> None:
    merge = getattr(BaseTuner, method)
    if hasattr(merge, "quantdit"):
        return

    @functools.wraps(merge)
    def checked(self: BaseTuner, *args: object, **kwargs: object) -> object:
        given = inspect.signature(merge).bind(self, *args, **kwargs).arguments
        if given.get("merge", True):
            check_fusing(self.model, given.get("adapter_names"))
        return merge(self, *args, **kwargs)

    vars(checked)["quantdit"] = True
    setattr(BaseTuner, method, checked)


watch()
