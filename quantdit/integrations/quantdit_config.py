"""`QuantDiTConfig`: how a model of diffusers or of transformers is quantized while it loads, or what a folder says that it is.

Both libraries ask a configuration for attributes and methods, none for its class, so one without a base serves both; and
`PipelineQuantizationConfig(quant_backend="quantdit")` finds the same arguments in both.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

from quantdit.checkpoints.checkpoint import METHOD
from quantdit.recipes.presets import BEST, from_any, from_bits, with_weight_format, with_words
from quantdit.recipes.resolve import without_data
from quantdit.recipes.rules import DENSE, Recipe, Rule

CALIBRATE = "loading has none: give bits such as 'w4a8', or calibrate with quantdit.quantize(model, recipe, inputs=...)"


class Method(str, Enum):  # noqa: UP042 - both libraries ask for `.value`, and for a key of their tables
    """The name that diffusers and transformers know the quantizer by."""

    QUANTDIT = METHOD


class QuantDiTConfig:
    """How a model is quantized while `from_pretrained` loads it, or what a quantized folder says that it is.

    Args:
        bits: a preset, such as `w4a8`.
        recipe: instead of it a Recipe, the path of a TOML file, or a recipe's dictionary.
        weight_format: with bits: a kind of recipe.WEIGHT_FORMATS, instead of what the preset has.
        modules_to_not_convert: parts of names of layers that are left alone.
        seed: of random signs and k-means.
        method: with bits, `best`; those of papers (presets.METHODS) calibrate, which loading cannot.
        state: of a quantized folder, its `quantization_config`.

    Loading needs no data: round to nearest, fixed rotations (`quantdit calibrate --samples 0`). For more, calibrate.

    Raises:
        ValueError: neither bits nor a recipe, or both; or as `recipe.from_bits`, `recipe.from_toml`.
        TypeError: an unknown argument.
    """

    def __init__(
        self,
        bits: str | None = None,
        recipe: Recipe | dict | str | Path | None = None,
        weight_format: str | None = None,
        modules_to_not_convert: list[str] | None = None,
        seed: int = 0,
        method: str = BEST,
        **state: object,
    ) -> None:
        self.quant_method = Method.QUANTDIT
        self.seed = seed
        # Of a later version's folder anything may be there: its spec, checked first, says what to do.
        self.state = {**state, "recipe": recipe} if "spec" in state else None
        if self.state is not None:
            return
        if unknown := sorted(state.keys() - {"quant_method"}):
            raise TypeError(f"QuantDiTConfig takes no {unknown[0]!r}; give bits='w4a8' or recipe='mine.toml'")
        if not isinstance(bits, str | None):
            raise ValueError(
                f"QuantDiTConfig: bits is {bits!r}, expected text such as 'w4a8', 4 bits a weight and 8 an activation"
            )
        if bits is not None and recipe is None:
            wanted = from_bits(bits, method)
        elif recipe is not None and bits is None:
            wanted = from_any(recipe, method)
        else:
            raise ValueError("QuantDiTConfig takes bits='w4a8' or recipe='mine.toml', one of the two")
        if method != BEST:
            raise ValueError(
                f"method {method!r} needs calibration data, and loading has none: calibrate with quantdit calibrate --method"
                f" {method}, or with quantdit.quantize(model, {bits!r}, inputs=..., method={method!r})"
            )
        wanted = without_data(with_weight_format(wanted, weight_format) if weight_format else wanted, CALIBRATE)
        if wanted.steps is not None:
            raise ValueError(f"recipe {wanted.name} asks for a step plan, which loading cannot choose: use quantdit.calibrate")
        left_alone = tuple(Rule(f"*{name}*", weight=DENSE, optional=True) for name in modules_to_not_convert or ())
        self.recipe = replace(wanted, rules=(*left_alone, *wanted.rules))
        # Bits leave open what a text encoder's table of words is stored as.
        of_encoder = wanted if bits is None else with_words(wanted)
        self.encoder_recipe = replace(of_encoder, rules=(*left_alone, *of_encoder.rules))

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs: object) -> Any:
        """Return the configuration that a dictionary, such as that of a folder, is of; with unused keywords if asked for.

        Raises:
            ValueError: it is of none.
        """
        try:
            config = cls(**config_dict)
        except TypeError as error:
            raise ValueError(f"quantization_config of quantdit: {error}") from error
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict:
        """Return the quantization_config of config.json, without the sha256 of weights that are not written yet."""
        if self.state is None:
            return {"quant_method": METHOD, "recipe": self.recipe.to_dict(), "seed": self.seed}
        return {key: value for key, value in self.state.items() if key not in ("sha256",)} | {"quant_method": METHOD}

    def to_diff_dict(self) -> dict:
        """Return `to_dict()`: there are no defaults to leave out."""
        return self.to_dict()

    def __repr__(self) -> str:
        """Name the recipe and the number of layers, not every layer."""
        named = self.recipe.to_dict() if self.state is None else self.state.get("recipe")
        layers = None if self.state is None else self.state.get("layers")
        counted = f", {len(layers)} layers" if isinstance(layers, dict) else ""
        return f"QuantDiTConfig({named.get('name') if isinstance(named, dict) else None!r}{counted})"
