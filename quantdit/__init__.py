"""quantdit: post-training quantization and compression compiler for Diffusion Transformers.

Importing it makes diffusers' `from_pretrained` read quantized folders.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from importlib.metadata import version as _version

from quantdit.after_import import watch as _watch
from quantdit.formats import FORMATS, Format, QSpec
from quantdit.qtensor import QTensor
from quantdit.recipe import Recipe, Rule

__version__ = _version("quantdit")
__all__ = [
    "FORMATS",
    "Format",
    "QSpec",
    "QTensor",
    "QuantDiTConfig",
    "Recipe",
    "Rule",
    "evaluate",
    "export",
    "gate",
    "generate",
    "load",
    "quantize",
]

# Imported when they are asked for: they bring diffusers along.
_LATER = {
    "QuantDiTConfig": "quantdit.diffusers_quantizer",
    "evaluate": "quantdit.evaluation.run",
    "export": "quantdit.commands",
    "gate": "quantdit.evaluation.gate",
    "generate": "quantdit.commands",
    "load": "quantdit.in_memory",
    "quantize": "quantdit.in_memory",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module 'quantdit' has no attribute {name!r}")
    return getattr(_import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_watch()
