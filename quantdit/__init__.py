"""quantdit: post-training quantization and compression compiler for Diffusion Transformers.

Importing it makes diffusers' `from_pretrained` read quantized folders.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

# In a clone the packages calibration, kernels and exporters lie beside this folder; an installation has them inside.
if not _Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(_Path(__file__).parents[1]))

from quantdit.formats import FORMATS, Format, QSpec
from quantdit.integrations.import_hooks import watch as _watch
from quantdit.recipes.rules import Recipe, Rule
from quantdit.system.version import VERSION as _VERSION
from quantdit.tensors.qtensor import QTensor

if _TYPE_CHECKING:  # what _LATER imports
    from quantdit.api import export, generate
    from quantdit.compiling.compile import calibrate
    from quantdit.compiling.in_memory import load, quantize
    from quantdit.evaluation.gate.judge import gate
    from quantdit.evaluation.run import evaluate
    from quantdit.inspection.inspection import inspect
    from quantdit.integrations.quantdit_config import QuantDiTConfig
    from quantdit.step_plans.following import step_plan

__version__ = _VERSION
__all__ = [
    "FORMATS",
    "Format",
    "QSpec",
    "QTensor",
    "QuantDiTConfig",
    "Recipe",
    "Rule",
    "calibrate",
    "evaluate",
    "export",
    "gate",
    "generate",
    "inspect",
    "load",
    "quantize",
    "step_plan",
]

# Imported when they are asked for: they bring diffusers along.
_LATER = {
    "calibrate": "quantdit.compiling.compile",
    "QuantDiTConfig": "quantdit.integrations.quantdit_config",
    "evaluate": "quantdit.evaluation.run",
    "export": "quantdit.api",
    "gate": "quantdit.evaluation.gate.judge",
    "generate": "quantdit.api",
    "inspect": "quantdit.inspection.inspection",
    "load": "quantdit.compiling.in_memory",
    "quantize": "quantdit.compiling.in_memory",
    "step_plan": "quantdit.step_plans.following",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module 'quantdit' has no attribute {name!r}")
    return getattr(_import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_watch()
