"""`calibrate`, `generate` and `evaluate` on a tiny pipeline of each class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny_pipelines
from quantdit.models import call_view

SAMPLES, STEPS, PROBES = 4, 2, 2
SLOW = ("Flux2KleinPipeline", "MochiPipeline", "PixArtAlphaPipeline")


def strict(path: Path) -> dict:
    """Return what a JSON file holds; NaN and infinities, which JSON does not have, are errors."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} holds {constant}")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in tiny_pipelines.PIPELINES]
)
def test_calibrate_generate_and_evaluate(name: str, tmp_path: Path, cli) -> None:
    """One test rather than three: the folders are made once, whichever process runs it."""
    import diffusers
    from PIL import Image

    pytest.importorskip("efficientnet_lite_pytorch")
    size = tiny_pipelines.PIPELINES[name].options
    full, small = tiny_pipelines.write_tiny(name, tmp_path / "full"), tmp_path / "w8a8"
    ran = cli("calibrate", "--model", full, "--bits", "w8a8", "--samples", 1, "--steps", STEPS, *size, "--output", small)
    assert ran.code == 0, ran.err
    calibrated = strict(small / "calibration_report.json")
    assert all(0 < layer["rel_rmse"] < 0.2 for layer in calibrated["layers"].values())

    ran = cli("generate", small, "--count", 1, "--steps", STEPS, *size, "--output", tmp_path / "made.png")
    assert ran.code == 0, ran.err
    with Image.open(tmp_path / "made.png") as picture:
        assert picture.convert("L").getextrema()[0] < picture.convert("L").getextrema()[1]

    out = tmp_path / "drift"
    how = ("--samples", SAMPLES, "--steps", STEPS, "--probes", PROBES, *size)
    ran = cli("evaluate", full, small, *how, "--output", out)
    assert ran.code == 0, ran.err
    report = strict(out / "report.json")
    assert len(report["samples"]) == SAMPLES and report["drift"]["PSNR"]["identical"] == 0
    assert all(15 < row["psnr"] < 100 for row in report["samples"])
    over, probed = report["over_steps"], report["probe"]
    # Each step once, in the direction that the adapter says, and all start at the same noise.
    first, last = over["timesteps"]
    cls = getattr(diffusers, strict(full / "transformer" / "config.json")["_class_name"])
    assert first != last and (first < last) == call_view.arguments_of(cls).rises
    assert over["median"][0] == 0 < over["median"][1] < 0.1
    assert probed["timesteps"] == over["timesteps"]
    assert len(probed["samples"]) == PROBES and all(-100 < row["output_error"] < -15 for row in probed["samples"])
    assert probed["layers"].keys() == calibrated["layers"].keys()
