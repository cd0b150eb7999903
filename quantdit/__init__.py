"""quantdit: post-training quantization and compression compiler for Diffusion Transformers."""

from __future__ import annotations

from importlib.metadata import version as _version

from quantdit.formats import FORMATS, Format, QSpec
from quantdit.qtensor import QTensor
from quantdit.recipe import Recipe, Rule

__version__ = _version("quantdit")
__all__ = ["FORMATS", "Format", "QSpec", "QTensor", "Recipe", "Rule"]
