"""The README's Python runs as it stands, one block after the other, where its folders are."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import tiny_pipelines

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def place(plain_dit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README's command lines make, without calibration data."""
    from quantdit.cli import main

    place = tmp_path_factory.mktemp("readme")
    shutil.copytree(plain_dit, place / "PATH" / "TO" / "PIPELINE")
    tiny_pipelines.write_tiny("WanPipeline", place / "PATH" / "TO" / "WAN")
    # Eight bits for both: rounding to nearest is the quickest, and what the blocks do is the same.
    for model, output in ((place / "PATH" / "TO" / "PIPELINE", "mine"), ("fashion-dit", "fashion-dit-w4a8")):
        arguments = ["--model", str(model), "--bits", "w8a8", "--samples", "0", "--output", str(place / "out" / output)]
        assert main(["calibrate", *arguments]) == 0
    fast = ["--bits", "w8a8", "--samples", "0", "--steps", "6", "--steps-plan", "0.5", "--output", str(place / "out" / "fast")]
    assert main(["calibrate", "--model", "fashion-dit", *fast]) == 0
    graph = ["export", str(place / "out" / "fashion-dit-w4a8"), "--to", "onnx", "--output", str(place / "out" / "dit.onnx")]
    assert main([*graph, "--no-verify"]) == 0
    return place


def test_there_are_blocks_to_run():
    assert len(BLOCKS) >= 4
    assert any("DiffusionPipeline.from_pretrained" in block for block in BLOCKS)


def test_blocks_run_as_they_stand(place: Path, monkeypatch: pytest.MonkeyPatch):
    """One after another in one folder; then the image and the folder that they save are there."""
    monkeypatch.chdir(place)
    for number, block in enumerate(BLOCKS, 1):
        exec(compile(block, f"README.md, python block {number}", "exec"), {})
    assert (place / "shirt.png").stat().st_size > 0
    assert (place / "out" / "calibrated" / "transformer" / "config.json").exists()


def test_numbers_and_methods_in_the_text_are_those_of_the_code():
    from quantdit.evaluation.run import LEAST_SAMPLES
    from quantdit.recipes.presets import METHODS

    text = README.read_text()
    assert f"`evaluate` needs at least {LEAST_SAMPLES} samples" in text
    assert all(f"--method {name}" in text for name in METHODS if name != "vq4dit") and "lrq-dit, vq4dit" in text
