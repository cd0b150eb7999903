"""`calibrate`, the library's call behind the command line: what it takes and returns, and that both entry points agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quantdit
from quantdit.compiling.compile import calibrate
from quantdit.compiling.report import REPORT, from_json, read, to_json
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.finetuning import FineTuning
from quantdit.recipes.presets import finetuning_for, from_bits
from quantdit.recipes.rules import Recipe, Rule
from quantdit.system import files

ONE = Recipe("one", (Rule("*.0.attn1.to_q", "table4", activation_bits=8), Rule("*", "dense")))
FEW = {"samples": 1, "steps": 1}


def test_calibrate_gives_the_bytes_of_the_command_line(cli, pixel_dit: Path, tmp_path: Path):
    given = ("--samples", 1, "--steps", 1, "--seed", 3, "--tokens", 4)
    assert cli("calibrate", "--model", pixel_dit, "--bits", "w8a8", "--output", tmp_path / "cli", *given).code == 0
    made = calibrate(pixel_dit, "w8a8", tmp_path / "python", seed=3, tokens=4, **FEW)
    assert made.sha256 == read(tmp_path / "cli").sha256
    assert made.output == tmp_path / "python" and made.recipe == from_bits("w8a8").to_dict() and not made.already_finished
    assert calibrate(pixel_dit, "w8a8", tmp_path / "python", seed=3, tokens=4, resume=True, **FEW).already_finished


def test_a_result_is_what_its_report_says(pixel_dit: Path, tmp_path: Path):
    made = calibrate(pixel_dit, ONE, tmp_path / "out", **FEW)
    content = files.read_json(tmp_path / "out" / REPORT)
    assert content == to_json(made) and read(tmp_path / "out") == made
    assert made.mean_error() == ("rel_rmse", content["layers"]["transformer_blocks.0.attn1.to_q"]["rel_rmse"])
    assert "allocation" not in content and "warning" not in content and content["dense_layers"] == made.dense_layers
    content.pop("sha256")
    with pytest.raises(files.CheckpointError, match="has no sha256"):
        from_json(content, tmp_path / "out")


def test_known_models_have_their_own_sampling_and_what_is_given_replaces_it(tmp_path: Path):
    made = calibrate("fashion-dit", ONE, tmp_path / "out", **FEW)
    sampling = made.provenance["calibration"]
    assert sampling["guidance"] == 2.0 and sampling["samples"] == 1


@pytest.mark.parametrize(
    ("recipe", "given", "words"),
    [
        ("w8a8", {"step": 1}, "calibrate has no option 'step'; did you mean steps"),
        ("w8a8", {"samples": 1.5}, "samples is 1.5, expected a whole number"),
        ("w8a8", {"steps": 0}, "steps is 0, expected at least 1"),
        ("w5a8", {}, "unknown bits 'w5a8'"),
        (ONE, {"weight_format": "vq"}, "--weight-format goes with --bits"),
        (ONE, {"method": "vq4dit"}, "leave out --recipe"),
        (ONE, {"size_budget": 0.5}, "fixes the weight of every layer"),
        ("auto", {}, "--size-budget 0.25, or how good with --max-output-error 0.05"),
    ],
)
def test_what_cannot_be_is_refused_by_name(pixel_dit: Path, tmp_path: Path, recipe: object, given: dict, words: str):
    with pytest.raises(ValueError, match=words):
        calibrate(pixel_dit, recipe, tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())


def test_former_flags_are_still_taken(cli, pixel_dit: Path, tmp_path: Path):
    few = ("calibrate", "--model", pixel_dit, "--output", tmp_path / "out", "--samples", 1, "--steps", 1)
    ran = cli(*few, "--bits", "auto", "--max-drift", "0")
    assert ran.code == 1 and "a largest output error is a positive number" in ran.error
    ran = cli(*few, "--bits", "w8a8", "--calibration-steps", "2", "--calibration-mode", "block")
    assert ran.code == 1 and "fine-tuning trains codebooks" in ran.error
    assert not {"--max-drift", "--calibration-steps", "--calibration-mode"} & set(cli("calibrate", "--help").out.split())


def test_steps_outside_the_presets_choose_among_two_candidates_through_both_entry_points(pixel_dit: Path, tmp_path: Path):
    """`quantdit calibrate --finetune-steps` and quantize(finetune_steps=) are of one function."""
    recipe = Recipe("one", (Rule("*.0.attn1.to_q", "vq256x4"), Rule("*", "dense")))
    made = calibrate(pixel_dit, recipe, tmp_path / "out", finetune_steps=1, **FEW)
    pipeline, _ = load_pipeline(str(pixel_dit))
    generator = torch.Generator().manual_seed(0)
    run = lambda: pipeline([0], num_inference_steps=1, generator=generator)  # noqa: E731
    model = quantdit.quantize(pipeline.transformer, recipe, run, calibration_steps=1)
    trained = model.config.quantization_config.state["provenance"]["training"]
    assert trained == made.provenance["training"] and trained["candidates"] == FineTuning().candidates == 2
    assert finetuning_for(recipe, None, steps=None) is None and finetuning_for(recipe, FineTuning(), steps=0) is None


@pytest.mark.parametrize("shown", [True, False])
def test_the_bars_of_diffusers_are_afterwards_as_they_were(pixel_dit: Path, tmp_path: Path, monkeypatch, shown: bool):
    from diffusers.utils import logging

    monkeypatch.setattr(logging, "_tqdm_active", shown)
    calibrate(str(pixel_dit), ONE, tmp_path / "out", samples=0)
    assert logging.is_progress_bar_enabled() is shown
    with pytest.raises(ValueError, match="frames"):
        calibrate(str(pixel_dit), ONE, tmp_path / "refused", frames=7, **FEW)
    assert logging.is_progress_bar_enabled() is shown
