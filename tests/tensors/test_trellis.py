"""Trellis weights from the command line to a loaded pipeline, and files that are not what they say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import quantdit
from quantdit.calibration import viterbi
from quantdit.checkpoints.checkpoint import CheckpointError, quant_layers, read_transformer
from quantdit.compiling.report import REPORT
from quantdit.system.files import WEIGHTS
from quantdit.system.optional_import import install

ONCE = ("--samples", "1", "--steps", "1", "--calibration-steps", "2")
# Without numba each layer takes a second.
FEW = """
[[rule]]
match = "*.0.attn1.to_q"
weight = "trellis3_l12"
activation_bits = 8
[[rule]]
match = "*.1.ff.net.2"
weight = "trellis3_l12"
[[rule]]
match = "*"
weight = "dense"
"""


def calibrated(cli: Callable, model: Path, output: Path, *arguments: object) -> Path:
    ran = cli("calibrate", "--model", model, "--output", output, "--weight-format", "trellis", *arguments)
    assert ran.code == 0, ran.err
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pixel_dit: Path) -> Path:
    """A pipeline of a few trellis weights, rounded without data; FEW beside it."""
    from quantdit.cli import main

    output = tmp_path_factory.mktemp("trellis") / "w3a8"
    recipe = output.with_name("few.toml")
    recipe.write_text(FEW)
    arguments = ("--recipe", str(recipe), "--samples", "0")
    assert main(["calibrate", "--model", str(pixel_dit), "--output", str(output), *arguments]) == 0
    return output


@pytest.mark.parametrize("bits", ["w2a16", pytest.param("w4a8", marks=pytest.mark.slow)])
def test_what_is_loaded_is_what_was_chosen(bits: str, cli: Callable, pixel_dit: Path, tmp_path: Path):
    """From the file alone, and by the layers that run; at 2 bits the preset trains scales and biases."""
    folder = calibrated(cli, pixel_dit, tmp_path / "out", "--bits", bits, *ONCE)
    layers = quant_layers(quantdit.load(str(folder)).transformer)
    assert {layer.spec.format for layer in layers.values()} == {f"trellis{bits[1]}_l12"}
    with safe_open(folder / "transformer" / WEIGHTS, framework="pt") as file:
        for name, layer in layers.items():
            assert f"{name}.codebook" not in file.keys()  # noqa: SIM118 - no dictionary
            assert torch.equal(file.get_tensor(f"{name}.data"), layer.data)
            assert file.get_slice(f"{name}.scale").get_dtype() == "F16"
            assert torch.equal(layer.decoded(), layer.qtensor.decode8())
    report = json.loads((folder / REPORT).read_text())
    assert all(0 < row["rel_rmse"] < 1 for row in report["layers"].values())


def test_the_same_bytes_again_and_without_numba(
    folder: Path, cli: Callable, pixel_dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = (folder / "transformer" / WEIGHTS).read_bytes()
    monkeypatch.setattr(viterbi, "numba_is_installed", lambda: False)
    recipe, again = folder.with_name("few.toml"), tmp_path / "again"
    ran = cli("calibrate", "--model", pixel_dit, "--output", again, "--recipe", recipe, "--samples", "0")
    assert ran.code == 0 and ran.err.count("quantdit: note: trellis codes take") == 1 and install("fast") in ran.err
    assert (again / "transformer" / WEIGHTS).read_bytes() == whole


def test_other_shapes_and_formats_are_refused(folder: Path, tmp_path: Path):
    """A row less, a format of the same bytes that does not exist, codes of another width: named, before anything is decoded."""
    name = "transformer_blocks.0.attn1.to_q"

    def damaged(number: int, tensor=None, format: str = "") -> Path:
        copy = shutil.copytree(folder / "transformer", tmp_path / str(number))
        if tensor is not None:
            tensors = load_file(copy / WEIGHTS)
            with safe_open(copy / WEIGHTS, framework="pt") as file:
                metadata = file.metadata()
            save_file(tensors | {f"{name}.data": tensor(tensors[f"{name}.data"])}, copy / WEIGHTS, metadata)
        if format:
            text = (copy / "config.json").read_text()
            assert "trellis3_l12" in text
            (copy / "config.json").write_text(text.replace("trellis3_l12", format))
        return copy

    for number, (tensor, format, words) in enumerate(
        [
            (lambda t: t[:-1].clone(), "", "data"),
            (lambda t: t.to(torch.int16), "", "data"),
            (None, "trellis3_l11", "trellis3_l11"),
            (None, "trellis3_l14", "what it says of the layers"),  # the same shapes, other weights
            (None, "trellis4_l12", "data"),
        ]
    ):
        with pytest.raises(CheckpointError, match=words):
            read_transformer(damaged(number, tensor, format))
