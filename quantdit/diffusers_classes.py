"""What diffusers' own classes learn of quantdit: its pipelines by name, and to refuse a save before anything is written.

`DiffusionPipeline.from_pretrained` looks for the class that model_index.json names in the module `diffusers`. `save_pretrained`
of a model writes config.json, and that of a pipeline whole components, before the quantizer is asked; a refusal would leave
behind a folder that is no longer what it was.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from types import ModuleType

from torch import nn

from quantdit import checkpoint
from quantdit.after_import import watch
from quantdit.diffusers_quantizer import QuantDiTQuantizer

# Each enters its class into the module `diffusers`.
PIPELINES = ("quantdit.models.pixel_dit", "quantdit.models.pixel_wan")


def register(module: ModuleType) -> None:
    """Bring in quantdit's pipelines once there are diffusers', and have `save_pretrained` refuse first.

    Args:
        module: `diffusers.models.modeling_utils` or `diffusers.pipelines.pipeline_utils`.
    """
    if hasattr(module, "DiffusionPipeline"):
        for name in PIPELINES:
            importlib.import_module(name)
        _check_before_saving(module.DiffusionPipeline)
    else:
        _check_before_saving(module.ModelMixin)


def _check_before_saving(cls: type) -> None:
    save = cls.save_pretrained
    if hasattr(save, "quantdit"):
        return

    @functools.wraps(save)
    def checked(self: object, *args: object, **kwargs: object) -> object:
        given = inspect.signature(save).bind(self, *args, **kwargs).arguments
        wanted = {name: given[name] for name in ("safe_serialization", "use_flashpack") if name in given}
        for part in (self,) if isinstance(self, nn.Module) else vars(self).values():
            model = getattr(part, "_orig_mod", part)  # of torch.compile
            if isinstance(quantizer := getattr(model, "hf_quantizer", None), QuantDiTQuantizer):
                quantizer.check_savable(model, **wanted)
                quantizer.config = checkpoint.config_of(model)
        return save(self, *args, **kwargs)

    checked.quantdit = True
    cls.save_pretrained = checked


watch()
