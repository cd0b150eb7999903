"""What diffusers' own classes learn of quantdit: its pipelines by name, to count quantized weights, and to refuse in time.

`DiffusionPipeline.from_pretrained` looks for the class that model_index.json names in the module `diffusers`. `save_pretrained`
of a model writes config.json, and that of a pipeline whole components, before the quantizer is asked; a refusal would leave
behind a folder that is no longer what it was. `fuse_lora` goes from layer to layer, where the last may refuse.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType

from torch import nn

from quantdit.integrations.import_hooks import watch
from quantdit.integrations.wrappers import checks_before_saving, counts_quantized, wrap

# Each enters its class into the module `diffusers`.
PIPELINES = ("quantdit.models.pixel_dit", "quantdit.models.pixel_wan")


def register(module: ModuleType) -> None:
    """Bring in quantdit's pipelines once there are diffusers', and have `save_pretrained` refuse first.

    Args:
        module: `diffusers.models.modeling_utils`, `diffusers.pipelines.pipeline_utils` or `diffusers.loaders.peft`.
    """
    if hasattr(module, "PeftAdapterMixin"):
        wrap(module.PeftAdapterMixin, "fuse_lora", _checks_before_fusing)
    elif hasattr(module, "DiffusionPipeline"):
        for name in PIPELINES:
            importlib.import_module(name)
        wrap(module.DiffusionPipeline, "save_pretrained", checks_before_saving)
    else:
        wrap(module.ModelMixin, "save_pretrained", checks_before_saving)
        wrap(module.ModelMixin, "num_parameters", counts_quantized)


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
