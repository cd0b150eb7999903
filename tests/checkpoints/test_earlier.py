"""A checkpoint of every kind of weight that quantdit wrote before its packages and recipe keys had today's names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from diffusers import DiTTransformer2DModel

import quantdit
from quantdit.checkpoints.checkpoint import quant_layers
from quantdit.recipes.rules import from_dict

FOLDER = Path(__file__).parents[1] / "golden" / "earlier"


def test_an_earlier_checkpoint_loads_with_the_same_bits():
    wanted = json.loads((FOLDER / "weights.json").read_text())  # sha256 of each layer's dequantized weight, then
    for load in (quantdit.load, DiTTransformer2DModel.from_pretrained):
        layers = quant_layers(load(FOLDER))
        found = {name: layer.qtensor.dequantize().contiguous().numpy().tobytes() for name, layer in layers.items()}
        assert {name: hashlib.sha256(raw).hexdigest()[:16] for name, raw in found.items()} == wanted


def test_its_recipe_is_read_by_todays_names():
    stored = json.loads((FOLDER / "config.json").read_text())["quantization_config"]["recipe"]
    rules = from_dict(stored).rules
    assert "cd_passes" not in stored["rule"][1] and rules[1].cd_passes == stored["rule"][1]["descent"] == 1
    assert "fallback" not in stored["rule"][3] and rules[3].fallback == stored["rule"][3]["otherwise"] == "table2"
