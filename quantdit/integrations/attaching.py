"""A model that was quantized in memory becomes what its library's `from_pretrained` returns."""

from __future__ import annotations

from typing import Any

from quantdit.checkpoints.libraries import TRANSFORMERS, library_of


def attach(model: Any, quantization: dict) -> Any:
    """Make a model with QuantLinear layers one that its library can save and dequantize; returns the model.

    Args:
        model: of diffusers or of transformers.
        quantization: what `checkpoint.describe` says of it.
    """
    # Each brings its library along.
    if library_of(model) is TRANSFORMERS:
        from quantdit.integrations import transformers_quantizer as quantizer
    else:
        from quantdit.integrations import diffusers_quantizer as quantizer
    return quantizer.attach(model, quantization)
