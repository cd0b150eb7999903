"""The line on tiling the VAE: said where decoding takes more than any component's weights, and there alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import quantdit
import tiny_pipelines
from quantdit.benchmarks.vae_advice import vae_advice

SIZE = {"height": 32, "width": 32, "frames": 5}


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.write_tiny("WanPipeline", tmp_path_factory.mktemp("wan") / "full")


def test_decoding_is_held_against_the_largest_component(wan: Path) -> None:
    said = vae_advice(wan, SIZE, 0)
    assert said is not None
    assert said.startswith("decoding 5 frames of 32 x 32 takes about")
    assert "pipeline.vae.enable_tiling()" in said
    assert vae_advice(wan, SIZE, 2**40) is None
    own = vae_advice(wan, dict.fromkeys(SIZE), 0)
    assert own is not None
    assert own.startswith("decoding 81 frames of 832 x 480"), "the pipeline's own size"


def test_images_have_no_frames(tmp_path: Path) -> None:
    flux = tiny_pipelines.write_tiny("FluxPipeline", tmp_path / "flux")
    said = vae_advice(flux, {"height": 64, "width": 32, "frames": None}, 0)
    assert said is not None
    assert said.startswith("decoding 32 x 64 takes")


def test_a_damaged_config_is_no_reason_to_fail(wan: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(wan, tmp_path / "wan"))
    for content in ("no JSON", '{"_class_name": "AutoencoderKLWan", "z_dim": "x"}', '{"_class_name": "AutoencoderKL"}', "[]"):
        (copied / "vae" / "config.json").write_text(content)
        vae_advice(copied, SIZE, 0)


def test_a_pipeline_without_a_known_vae_is_left_alone(pixel_dit: Path) -> None:
    assert vae_advice(pixel_dit, dict.fromkeys(SIZE), 0) is None


def test_calibrate_says_it(wan: Path, tmp_path: Path, cli) -> None:
    options = [x for name, value in SIZE.items() for x in (f"--{name}", value)]
    ran = cli("calibrate", "--model", wan, "--bits", "w4a8", "--samples", 1, "--steps", 1, *options, "--output", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "enable_tiling()" in ran.out
    assert quantdit.load(tmp_path / "out").vae.enable_tiling is not None
