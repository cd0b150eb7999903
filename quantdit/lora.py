"""PEFT's LoRA on a QuantLinear: fused into the layer's low-rank branch, where it keeps its values, instead of into its codes.

PEFT merges an adapter by writing to `base_layer.weight.data`. The weight of a QuantLinear is decoded anew each time, so that
would be lost without a word. The branch is there for such a thing: a fused adapter is more columns and rows of it, bfloat16.
"""

from __future__ import annotations

from types import ModuleType

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from quantdit.after_import import watch
from quantdit.linear import QuantLinear


class QuantLoraLinear(Linear):
    """PEFT's layer around a QuantLinear. Unfused it is PEFT's own; fusing and unfusing leave the quantized weight as it is.

    Once the model is dequantized, there is an ordinary linear in it, and it is PEFT's own throughout.
    """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fuse adapters.

        Raises:
            ValueError: one that is more than a product of two matrices (DoRA, a bias), or too large, or not finite.
        """
        if not isinstance(self.get_base_layer(), QuantLinear):
            super().merge(safe_merge, adapter_names)
            return
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            if name in self.lora_variant or self.lora_bias[name]:
                raise ValueError(
                    f"adapter {name!r} is DoRA or has a bias, which is not fused into a quantized layer; run it unfused"
                )
            up, down = self.lora_B[name].weight.detach() * self.scaling[name], self.lora_A[name].weight.detach()
            if not bool(torch.isfinite(up).all() and torch.isfinite(down).all()):
                raise ValueError(f"adapter {name!r} has NaN or infinite entries; it is broken")
            self.get_base_layer().extend_branch(up, down)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo all fusing; the layer has the bits it had before."""
        base = self.get_base_layer()
        if not isinstance(base, QuantLinear):
            super().unmerge()
            return
        fused = sum(self.lora_A[name].weight.shape[0] for name in self.merged_adapters)
        if fused:
            base.shorten_branch(base.layer_spec.rank - fused)
        self.merged_adapters.clear()


def register(module: ModuleType) -> None:
    """Have PEFT take QuantLoraLinear for a QuantLinear, and refuse to merge what is no LoRA.

    Args:
        module: `peft.tuners.lora.model`, or `peft.tuners.lycoris_utils`, the base of LoHa and LoKr.
    """
    if hasattr(module, "LycorisLayer"):
        _refuse_merge(module.LycorisLayer)
    else:
        _dispatch_first(module)


def _dispatch_first(module: ModuleType) -> None:
    others = module.dispatch_default
    if hasattr(others, "quantdit"):
        return

    def dispatch(target: nn.Module, adapter_name: str, config: object, **kwargs: object) -> nn.Module | None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, QuantLinear) and kwargs.get("parameter_name") is None:
            return QuantLoraLinear(target, adapter_name, config=config, **kwargs)
        return others(target, adapter_name, config=config, **kwargs)

    dispatch.quantdit = True
    module.dispatch_default = dispatch


def _refuse_merge(cls: type) -> None:
    merge = cls.merge
    if hasattr(merge, "quantdit"):
        return

    def checked(self: nn.Module, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if isinstance(self.get_base_layer(), QuantLinear):
            raise ValueError("only LoRA is fused into a quantized layer; run this adapter unfused")
        merge(self, safe_merge=safe_merge, adapter_names=adapter_names)

    checked.quantdit = True
    cls.merge = checked


watch()
