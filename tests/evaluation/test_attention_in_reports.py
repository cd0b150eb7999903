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
    wan = tiny_pipelines.write_tiny("WanPipeline", tmp_path / "wan")
    for name, options in (("plain", {}), ("attention", {"attention": "int8"})):
        quantdit.calibrate(wan, "w4a8", tmp_path / name, samples=1, steps=2, **SIZE, **options)
    how = {"samples": 4, "steps": 2, "probes": 2, "noise_floor": True, "cache": tmp_path / "cache", **SIZE}
    reports = {
        name: quantdit.evaluate(wan, tmp_path / name, tmp_path / f"{name}-drift", **how) for name in ("plain", "attention")
    }
    modules = set(modules_of(quantdit.load(tmp_path / "attention").transformer))
    assert modules
    assert not modules & reports["plain"]["probe"]["layers"].keys()
    assert modules <= reports["attention"]["probe"]["layers"].keys()
    assert all(-90 < error < -10 for name in modules for error in reports["attention"]["probe"]["layers"][name])
    assert reports["attention"]["identity"]["attention"] == ["int8 auto rotated smooth"]
    baseline = tmp_path / "baseline.json"
    assert cli("gate", tmp_path / "attention-drift", "--baseline", baseline, "--update-baseline").code == 0
    assert cli("gate", tmp_path / "attention-drift", "--baseline", baseline).code == 0
    assert "attention: the baseline's is" in cli("gate", tmp_path / "plain-drift", "--baseline", baseline).error
    report = cli("inspect", tmp_path / "attention").out
    assert f"8-bit attention of transformer: {len(modules)} modules int8 auto rotated smooth" in report
