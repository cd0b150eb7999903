"""The README's Python runs as it stands, one block after the other, where its folders are."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny_pipelines

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def place(plain_dit: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what the README's command lines make, without calibration data.

    `fashion-dit` is one of two narrow blocks here: what the README's lines do is the same, in a tenth of the time.
    """
    from quantdit.models import known_models

    embedded = tmp_path_factory.mktemp("embedded")
    write_narrow(known_models.EMBEDDED / "fashion-dit", embedded / "fashion-dit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known_models, "EMBEDDED", embedded)
        yield written(tmp_path_factory.mktemp("readme"), plain_dit)


def write_narrow(source: Path, target: Path) -> None:
    """Write a pipeline whose transformer has two blocks of width 32, and random weights."""
    import torch
    from diffusers import DiTTransformer2DModel

    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "transformer" / "config.json").read_text())
    torch.manual_seed(0)
    narrow = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    DiTTransformer2DModel.from_config(config | narrow).save_pretrained(target / "transformer")


def written(place: Path, plain_dit: Path) -> Path:
    """Write what the README's command lines do; returns the folder."""
    from quantdit.cli import main

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
