"""The study of models with planted outliers: which rows it makes, what it measures, the page; nothing is calibrated."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import peers
import robust
from quantdit.evaluation.metrics.paired import PSNR_CEILING
from quantdit.models.planted_outliers import SHAPES


def a_row(family: str, model: str, preset: str, psnr: float | None, error: float) -> dict:
    row = {"family": family, "model": model, "preset": preset, "bits_per_weight": 4.17, "moved": 1e-7, "seconds": 40.0}
    row |= {"model_rel_rmse": error, "mean_rel_rmse": error, "worst_rel_rmse": 2 * error, "worst_layer": "blocks.0.ffn.net.2"}
    if psnr is None:
        return row
    interval = [psnr - 1, psnr + 1]
    return row | {"psnr": {"mean": psnr, "interval_95": interval, "worst": psnr - 9}, "samples": 64, "seeds": [1, 2, 3, 4]}


ROWS = [
    a_row("fashion-dit", "tame", "w4a8", 40.7, 0.0142),
    a_row("fashion-dit", "channels x 245", "w4a8", 27.6, 0.0903),
    a_row("fashion-dit", "channels x 30", "w4a8", 38.9, 0.0215) | {"model_rel_rmse": None, "worst_layer": None},
    a_row("SD3Transformer2DModel", "tame", "w4a8", None, 0.10),
    a_row("SD3Transformer2DModel", "channels x 245", "w4a8", None, 0.15),
]


def test_models_have_shapes_that_there_are_and_names_of_their_own() -> None:
    assert {model.shape for model in robust.MODELS} <= {robust.TAME, *SHAPES}
    assert len({model.slug for model in robust.MODELS}) == len(robust.MODELS)
    fashion = [model.shape for model in robust.MODELS if model.family == "fashion-dit"]
    assert set(fashion) == {robust.TAME, *SHAPES}


def test_the_page_says_what_the_rows_say(tmp_path: Path) -> None:
    rows = tmp_path / "robust.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    robust.render(rows, tmp_path / "none.jsonl")
    page = (tmp_path / "robust.md").read_text()
    assert "| w4a8 | 40.70 | 35.73 | 27.60 | channels x 245 |" in page
    assert "| w4a8 | channels x 245 | 4.17 | 27.60 [26.60, 28.60] | 18.6 | -13.10 | 0.0903" in page
    assert page.index("| w4a8 | channels x 30 |") < page.index("| w4a8 | channels x 245 |"), "in the order of MODELS"
    assert "| SD3Transformer2DModel | channels x 245 | w4a8 | 4.17 | 0.1500 | 0.1000 | 1.50 | missed |" in page
    assert (tmp_path / "pictures" / "robust.png").stat().st_size > 1000


def test_only_wants_rows_that_every_pattern_matches() -> None:
    model = robust.Copy("fashion-dit", "channels", 245.0)
    assert robust.wanted(model, "w4a8", [])
    assert robust.wanted(model, "w4a8", ["channels*", "w4a8"])
    assert not robust.wanted(model, "w4a8", ["channels*", "w3a8"])
    assert not robust.wanted(model, "w4a8, no data", ["w4a8"])


def test_frames_of_a_clip_are_taken_together() -> None:
    clips = torch.rand(4, 3, 3, 8, 8) * 2 - 1
    assert robust.paired(clips, clips.clone())["mean"] == PSNR_CEILING
    other = clips.clone()
    other[0, 1] += 0.1
    found = robust.paired(clips, other)
    assert found["worst"] == pytest.approx(10 * torch.log10(torch.tensor(4 / (0.01 / 3))).item(), rel=1e-4)


def test_tiny_models_are_planted_and_say_how_far_they_moved(tmp_path: Path) -> None:
    model = robust.Copy("SD3Transformer2DModel", "channels", 245.0)
    folder = robust.plant_copy(model, tmp_path)
    assert 0 < json.loads((folder / "moved.json").read_text()) < 1e-5
    stamp = (folder / "moved.json").stat().st_mtime_ns
    assert robust.plant_copy(model, tmp_path) == folder and (folder / "moved.json").stat().st_mtime_ns == stamp
    assert robust.plant_copy(robust.Copy("fashion-dit"), tmp_path) == "fashion-dit"


def test_peers_keep_the_inputs_of_another_model_apart(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["peers.py", "hqq", "--model", "planted", "--output", "out"])
    with pytest.raises(SystemExit):
        peers.main()
    assert "--model needs a --work of its own" in capsys.readouterr().err
