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


def test_evaluate_writes_numbers_table_page_and_picture(pair: tuple[Path, Path], tmp_path: Path, cli) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    out = tmp_path / "drift"
    ran = cli("evaluate", *pair, "--samples", SAMPLES, "--steps", STEPS, "--output", out)
    assert ran.code == 0, ran.err
    result = json.loads((out / "report.json").read_text())
    assert result["candidate"]["file_bytes"] < result["reference"]["file_bytes"]
    report = json.loads((pair[1] / "calibration_report.json").read_text())
    assert result["candidate"]["bits_per_weight"] == report["size"]["bits_per_weight"]
    assert result["sampling"] == {
        "samples": 4,
        "seed": 0,
        "steps": 2,
        "guidance": None,
        "prompts": ["class 0", "class 1", "class 2"],
        "batch": 32,
    }
    assert set(result["drift"]) >= {"PSNR", "SSIM", "FD-EffNetLite0", "KID-EffNetLite0"}
    assert "reference_to_real" not in result["drift"]["FD-EffNetLite0"]  # the real set is another model's
    assert set(result["samples"][0]) >= {"prompt", "seed", "psnr", "ssim", "perceptual", "latent_cosine"}
    assert set(result["sets"]) >= {"FD-EffNetLite0", "KID-EffNetLite0", "MMD-EffNetLite0"}
    assert len(result["probe"]["samples"]) == SAMPLES
    assert all(-100 < row["output_error"] < 0 for row in result["probe"]["samples"])
    assert result["probe"]["layers"].keys() == result["layers"].keys() == report["layers"].keys()
    assert (out / "drift.png").stat().st_size > 1000
    assert (out / "report.md").read_text().strip() in ran.out
    page = (out / "report.html").read_text()
    assert page.count("<figure>") == SAMPLES and "http" not in page.replace("http-equiv", "")


def test_mean_of_the_rows_is_the_drift(pair: tuple[Path, Path], tmp_path: Path, cli) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    assert cli("evaluate", *pair, "--seeds", 2, "--steps", STEPS, "--output", tmp_path).code == 0
    result = json.loads((tmp_path / "report.json").read_text())
    assert len(result["samples"]) == 6  # three classes
    for name in ("psnr", "ssim"):
        mean = sum(row[name] for row in result["samples"]) / 6
        assert mean == pytest.approx(result["drift"][name.upper()]["mean"], rel=1e-5)


def test_a_model_does_not_drift_from_itself(pair: tuple[Path, Path], tmp_path: Path, cli) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    assert cli("evaluate", pair[0], pair[0], "--samples", SAMPLES, "--steps", STEPS, "--output", tmp_path).code == 0
    result = json.loads((tmp_path / "report.json").read_text())
    drift = result["drift"]
    assert drift["PSNR"]["identical"] == SAMPLES
    assert drift["FD-EffNetLite0"]["drift"] < 1e-3 * drift["FD-EffNetLite0"]["noise_floor"]
    assert result["probe"]["layers"] == {} and {row["output_error"] for row in result["probe"]["samples"]} == {-100.0}


def test_kept_samples_are_used_and_damaged_ones_made_again(pair: tuple[Path, Path], tmp_path: Path, cli) -> None:
    """Asked again, nothing is sampled; a file cut short is as one that is not there; another seed is another sample."""
    pytest.importorskip("efficientnet_lite_pytorch")
    cache = tmp_path / "kept"
    ask = ("evaluate", *pair, "--samples", SAMPLES, "--steps", STEPS, "--cache", cache, "--output")
    assert cli(*ask, tmp_path / "a").code == 0
    files = {path: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")}
    assert len(files) == 3 * SAMPLES  # reference, its other seeds, candidate
    cut = sorted(files)[0]
    cut.write_bytes(cut.read_bytes()[:100])
    assert cli(*ask, tmp_path / "b").code == 0
    after = {path: path.stat().st_mtime_ns for path in cache.glob("*")}
    assert {path for path in after if after[path] != files.get(path)} == {cut} and cut.stat().st_size > 100
    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in "ab")
    # Made alone rather than in its batch, the one sample differs in its last bits.
    pairs = zip(first["samples"], second["samples"], strict=True)
    assert all(a["psnr"] == pytest.approx(b["psnr"], abs=0.01) for a, b in pairs)
    assert sum(a["psnr"] != b["psnr"] for a, b in zip(first["samples"], second["samples"], strict=True)) <= 1
    assert cli(*ask, tmp_path / "c", "--seed", 5).code == 0
    assert len(list(cache.glob("*"))) == 6 * SAMPLES


def test_models_of_different_shapes_are_refused(pair: tuple[Path, Path], plain_dit: Path, tmp_path: Path, cli) -> None:
    ran = cli("evaluate", pair[0], plain_dit, "--samples", SAMPLES, "--steps", 1, "--output", tmp_path)
    assert ran.code == 1 and "compare models of one kind" in ran.error


def test_a_single_image_is_no_distribution(pixel_dit: Path, tmp_path: Path, cli) -> None:
    ran = cli("evaluate", pixel_dit, pixel_dit, "--samples", 1, "--output", tmp_path)
    assert ran.code == 1 and "at least 4" in ran.error
