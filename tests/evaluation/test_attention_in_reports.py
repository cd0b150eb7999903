"""8-bit attention from calibrate to the gate: modules of attention are probed, and a baseline remembers how they compute."""

from __future__ import annotations

from pathlib import Path

import pytest

import quantdit
import tiny_pipelines
from quantdit.layers.quant_attention import modules_of

SIZE = {"height": 32, "width": 32, "frames": 5}


def test_attention_is_probed_and_part_of_the_identity(tmp_path: Path, cli) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    wan, made = tiny_pipelines.write_tiny("WanPipeline", tmp_path / "wan"), tmp_path / "attention"
    quantdit.calibrate(wan, "w4a8", made, samples=1, steps=2, attention="int8", **SIZE)
    report = quantdit.evaluate(wan, made, tmp_path / "drift", samples=4, steps=2, probes=2, noise_floor=True, **SIZE)
    modules = set(modules_of(quantdit.load(made).transformer))
    assert modules
    assert modules <= report["probe"]["layers"].keys()
    assert all(-90 < error < -10 for name in modules for error in report["probe"]["layers"][name])
    assert report["identity"]["attention"] == ["int8 auto rotated smooth"]
    baseline = tmp_path / "baseline.json"
    assert cli("gate", tmp_path / "drift", "--baseline", baseline, "--update-baseline").code == 0
    assert cli("gate", tmp_path / "drift", "--baseline", baseline).code == 0
    del report["identity"]["attention"]
    with pytest.raises(ValueError, match="attention: the baseline's is"):
        quantdit.gate(report, baseline)
    assert f"8-bit attention of transformer: {len(modules)} modules int8 auto rotated smooth" in cli("inspect", made).out
