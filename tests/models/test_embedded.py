"""The embedded models: clothes and clips that low bits keep. reports/ has the figures; these bounds only hold them up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fashion_classifier import recognised
from quantdit.compiling.compile import compile
from quantdit.compiling.plan import Plan
from quantdit.evaluation.metrics.paired import psnr
from quantdit.pipelines.generate import generate
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.presets import from_bits
from quantdit.recipes.rules import Recipe
from quantdit.recipes.sampling_plan import SamplingPlan

IMAGES, STEPS = 40, 10


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    return generate(load_pipeline("fashion-dit")[0], IMAGES, 5, STEPS, 2.0)


def test_it_draws_the_class_it_is_asked_for(reference: torch.Tensor) -> None:
    # 90 % is the bar on 1000 images (reports/); 40 images at 90 % stay above 75 % with probability 0.998.
    assert recognised(reference, torch.arange(IMAGES) % 10) >= 0.75


def mean_psnr(reference: torch.Tensor, rules: Recipe, folder: Path) -> float:
    pipeline, source = load_pipeline("fashion-dit")
    compile(pipeline, source, Plan(rules, SamplingPlan(samples=8, steps=STEPS, guidance=2.0)), folder)
    return float(psnr(reference, generate(load_pipeline(str(folder))[0], IMAGES, 5, STEPS, 2.0)).mean())


@pytest.mark.slow
def test_w4a8_keeps_the_pictures_and_needs_its_error_feedback(reference: torch.Tensor, tmp_path: Path) -> None:
    from dataclasses import replace

    preset = from_bits("w4a8")
    rtn = Recipe("rtn", tuple(replace(rule, method="rtn") for rule in preset.rules))
    feedback, nearest = mean_psnr(reference, preset, tmp_path / "gptq"), mean_psnr(reference, rtn, tmp_path / "rtn")
    assert feedback > 36
    assert feedback > nearest + 2


@pytest.mark.slow
def test_the_video_model_keeps_its_clips_in_w4a8(cli, tmp_path: Path) -> None:
    ran = cli(
        "calibrate", "--model", "emoji-wan", "--bits", "w4a8", "--samples", "4", "--steps", "6", "--output", tmp_path / "out"
    )
    assert ran.code == 0, ran.err
    clips = [generate(load_pipeline(str(name))[0], 3, 5, 6, 3.0) for name in ("emoji-wan", tmp_path / "out")]
    assert clips[0].shape == (3, 16, 3, 32, 32)
    assert float(psnr(clips[0].flatten(1, 2), clips[1].flatten(1, 2)).min()) > 20
