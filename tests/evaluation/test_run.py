"""`quantdit evaluate` on tiny pipelines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantdit import recipe
from quantdit.compiler import Settings, calibrate
from quantdit.pipeline import load_pipeline

SAMPLES, STEPS = 4, 2


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of 16 x 16 pixels, which is enough for SSIM's window, and its w4a8 form."""
    from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

    from quantdit.models.pixel_dit import PixelDiTPipeline

    folder = tmp_path_factory.mktemp("pair")
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=1,
        sample_size=16,
        patch_size=4,
        num_embeds_ada_norm=3,
    )
    PixelDiTPipeline(model, FlowMatchEulerDiscreteScheduler()).save_pretrained(folder / "full")
    pipeline, source = load_pipeline(str(folder / "full"))
    calibrate(pipeline, source, recipe.from_bits("w4a8"), folder / "w4a8", Settings(samples=2, steps=STEPS))
    return folder / "full", folder / "w4a8"


def test_evaluate_writes_numbers_table_and_picture(pair: tuple[Path, Path], tmp_path: Path, cli) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    out = tmp_path / "drift"
    ran = cli("evaluate", *pair, "--samples", SAMPLES, "--steps", STEPS, "--output", out)
    assert ran.code == 0, ran.err
    result = json.loads((out / "drift.json").read_text())
    assert result["candidate"]["file_bytes"] < result["reference"]["file_bytes"]
    report = json.loads((pair[1] / "calibration_report.json").read_text())
    assert result["candidate"]["bits_per_weight"] == report["size"]["bits_per_weight"]
    assert result["sampling"] == {"samples": 4, "seed": 0, "steps": 2, "guidance": None}
    assert set(result["drift"]) >= {"PSNR", "SSIM", "FD-EffNetLite0", "KID-EffNetLite0"}
    assert "reference_to_real" not in result["drift"]["FD-EffNetLite0"]  # the real set is another model's
    assert (out / "drift.png").stat().st_size > 1000
    assert (out / "drift.md").read_text().strip() in ran.out


def test_a_model_does_not_drift_from_itself(pair: tuple[Path, Path], tmp_path: Path, cli) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    assert cli("evaluate", pair[0], pair[0], "--samples", SAMPLES, "--steps", STEPS, "--output", tmp_path).code == 0
    drift = json.loads((tmp_path / "drift.json").read_text())["drift"]
    assert drift["PSNR"]["identical"] == SAMPLES
    assert drift["FD-EffNetLite0"]["drift"] < 1e-3 * drift["FD-EffNetLite0"]["noise_floor"]


def test_models_of_different_shapes_are_refused(pixel_dit: Path, plain_dit: Path, tmp_path: Path, cli) -> None:
    ran = cli("evaluate", pixel_dit, plain_dit, "--samples", SAMPLES, "--steps", 1, "--output", tmp_path)
    assert ran.code == 1 and "compare models of one kind" in ran.error


def test_a_single_image_is_no_distribution(pixel_dit: Path, tmp_path: Path, cli) -> None:
    ran = cli("evaluate", pixel_dit, pixel_dit, "--samples", 1, "--output", tmp_path)
    assert ran.code == 1 and "at least 4" in ran.error
