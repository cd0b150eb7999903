"""What diffusers' own classes learn of quantdit: its pipelines by name, to count quantized weights, and to refuse in time.

`DiffusionPipeline.from_pretrained` looks for the class that model_index.json names in the module `diffusers`. `save_pretrained`
of a model writes config.json, and that of a pipeline whole components, before the quantizer is asked; a refusal would leave
behind a folder that is no longer what it was. `fuse_lora` goes from layer to layer, where the last may refuse.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from types import ModuleType

from torch import nn

from quantdit.checkpoints import checkpoint
from quantdit.integrations.diffusers_quantizer import QuantDiTQuantizer
from quantdit.integrations.import_hooks import watch
from quantdit.layers.quant_linear import QuantLinear

# Each enters its class into the module `diffusers`.
PIPELINES = ("quantdit.models.pixel_dit", "quantdit.models.pixel_wan")


def register(module: ModuleType) -> None:
    """Bring in quantdit's pipelines once there are diffusers', and have `save_pretrained` refuse first.

    Args:
        module: `diffusers.models.modeling_utils`, `diffusers.pipelines.pipeline_utils` or `diffusers.loaders.peft`.
    """
    if hasattr(module, "PeftAdapterMixin"):
        _wrap(module.PeftAdapterMixin, "fuse_lora", _checks_before_fusing)
    elif hasattr(module, "DiffusionPipeline"):
        for name in PIPELINES:
            importlib.import_module(name)
        _wrap(module.DiffusionPipeline, "save_pretrained", _checks_before_saving)
    else:
        _wrap(module.ModelMixin, "save_pretrained", _checks_before_saving)
        _wrap(module.ModelMixin, "num_parameters", _counts_quantized)


def _wrap(cls: type, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Put `wrapper(method)` in the place of a method, once."""
    method = getattr(cls, name)
    if hasattr(method, "quantdit"):
        return
    wrapped = functools.wraps(method)(wrapper(method))
    vars(wrapped)["quantdit"] = True
    setattr(cls, name, wrapped)


def _checks_before_saving(save: Callable) -> Callable:
    def checked(self: object, *args: object, **kwargs: object) -> object:
        given = inspect.signature(save).bind(self, *args, **kwargs).arguments
        wanted = {name: given[name] for name in ("safe_serialization", "use_flashpack") if name in given}
        for part in (self,) if isinstance(self, nn.Module) else vars(self).values():
            model = getattr(part, "_orig_mod", part)  # of torch.compile
            if isinstance(quantizer := getattr(model, "hf_quantizer", None), QuantDiTQuantizer):
                quantizer.check_savable(model, **wanted)
                quantizer.config = checkpoint.config_of(model)
        return save(self, *args, **kwargs)

    return checked


def _counts_quantized(count: Callable) -> Callable:
    def counted(self: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        # Quantized weights are no parameters to torch; they are frozen, and none is an embedding's.
        layers = () if only_trainable else (m for m in self.modules() if isinstance(m, QuantLinear))
        return count(self, only_trainable, exclude_embeddings) + sum(m.out_features * m.in_features for m in layers)

    return counted


def _checks_before_fusing(fuse: Callable) -> Callable:
    def checked(self: nn.Module, *args: object, **kwargs: object) -> object:
        if hasattr(self, "peft_config"):
            from quantdit.integrations.peft_lora import (
                check_fusing,  # PEFT, which is there by now, is not needed by whoever loads no adapter
            )

            check_fusing(self, inspect.signature(fuse).bind(self, *args, **kwargs).arguments.get("adapter_names"))
        return fuse(self, *args, **kwargs)

    return checked


watch()
