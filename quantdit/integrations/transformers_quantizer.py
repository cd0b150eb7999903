"""`quant_method: quantdit` for transformers, whose models quantdit does not quantize: a refusal that says what to do.

diffusers' `PipelineQuantizationConfig(quant_backend="quantdit")` asks both libraries for a configuration of the same arguments.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantdit.integrations.import_hooks import watch

METHOD = "quantdit"


class TextEncoderConfig(QuantizationConfigMixin):
    """Takes what QuantDiTConfig takes, and refuses it.

    Raises:
        ValueError: always.
    """

    def __init__(
        self,
        bits: str | None = None,
        recipe: object | dict | str | Path | None = None,
        weight_format: str | None = None,
        modules_to_not_convert: list[str] | None = None,
        seed: int = 0,
        method: str = "best",
        **state: object,
    ) -> None:
        raise ValueError(
            "quantdit quantizes diffusion transformers, not models of transformers; name the part:"
            " PipelineQuantizationConfig(quant_mapping={'transformer': QuantDiTConfig(bits='w4a8')})"
        )


def register(auto: ModuleType) -> None:
    """Enter the refusal into the tables of `transformers.quantizers.auto`."""
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = HfQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = TextEncoderConfig


watch()
