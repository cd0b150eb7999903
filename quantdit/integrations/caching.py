"""What diffusers' caches do not say: that they hook no module of a quantized model, and so skip nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType

from torch import nn

from quantdit.integrations.import_hooks import watch
from quantdit.integrations.quantizer import Quantizer
from quantdit.integrations.wrappers import wrap
from quantdit.system.files import Advice

# What to give a cache whose own patterns fit other names of modules.
REMEDIES = {"TaylorSeerCacheConfig": r"; give it use_lite_mode=True, or cache_identifiers=[r'.*blocks\.\d+\.attn\d?']"}


def register(module: ModuleType) -> None:
    """Have `enable_cache` of `diffusers.models.cache_utils` warn."""
    wrap(module.CacheMixin, "enable_cache", warns_of_nothing)


def warns_of_nothing(enable: Callable) -> Callable:
    """Return `enable_cache` that warns where a cache hooks nothing of a quantized model."""

    def warned(self: nn.Module, config: object) -> object:
        found = enable(self, config)
        from quantdit.step_plans.following import cache_of  # brings diffusers' hooks along

        if isinstance(getattr(self, "hf_quantizer", None), Quantizer) and cache_of(self) is None:
            name = type(config).__name__
            text = f"{name} hooks no module of {type(self).__name__}, so every step is computed{REMEDIES.get(name, '')}"
            warnings.warn(Advice(text), stacklevel=2)
        return found

    return warned


watch()
