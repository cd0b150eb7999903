"""Registration with other libraries at the moment they are imported, so that `import quantdit` imports none of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# Once the module on the left is imported, the `register` of ours on the right is called with it.
REGISTER = {
    "diffusers.quantizers.auto": "quantdit.integrations.diffusers_quantizer",
    "transformers.quantizers.auto": "quantdit.integrations.transformers_quantizer",
    "transformers.modeling_utils": "quantdit.integrations.transformers_quantizer",
    "diffusers.models.cache_utils": "quantdit.integrations.caching",
    "diffusers.models.modeling_utils": "quantdit.integrations.diffusers_saving",
    "diffusers.pipelines.pipeline_utils": "quantdit.integrations.diffusers_saving",
    "diffusers.loaders.lora_pipeline": "quantdit.integrations.flux_lora",
    "diffusers.loaders.peft": "quantdit.integrations.diffusers_saving",
    "peft.tuners.lora.model": "quantdit.integrations.peft_lora",
}


class _Finder(MetaPathFinder):
    """Finds the modules of REGISTER as Python would, and has them registered with after they have run."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in REGISTER else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(module)

        spec.loader.exec_module = run_and_register
        return spec


def _register(module: ModuleType) -> None:
    ours = importlib.import_module(REGISTER[module.__name__])
    # Whoever imports ours first has `module` imported halfway through it; then ours ends with `watch()`.
    if hasattr(ours, "register"):
        ours.register(module)


def watch() -> None:
    """Register with what is imported already, now, and with the others when they are. Calling it again changes nothing."""
    for name in REGISTER:
        module = sys.modules.get(name)
        # One that is still running is registered with when it has run.
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _register(module)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
