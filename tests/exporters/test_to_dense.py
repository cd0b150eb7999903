"""Dense export: the same function without quantdit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantdit.compiling.compile import compile
from quantdit.compiling.plan import Plan
from quantdit.exporters.to_dense import to_dense
from quantdit.pipelines.generate import generate
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.presets import from_bits
from quantdit.recipes.sampling_plan import SamplingPlan


@pytest.fixture(scope="module")
def weight_only(pixel_dit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weight-only") / "w4a16"
    pipeline, source = load_pipeline(str(pixel_dit))
    compile(pipeline, source, Plan(from_bits("w4a16"), SamplingPlan(samples=2, steps=2)), folder)
    return folder


def test_a_dense_folder_needs_only_diffusers_and_computes_the_same(weight_only: Path, tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel

    to_dense(weight_only, tmp_path / "dense", torch.float32)
    plain = DiTTransformer2DModel.from_pretrained(tmp_path / "dense" / "transformer")
    assert "quantization_config" not in plain.config
    images = [generate(load_pipeline(str(folder))[0], 3, 0, 2) for folder in (weight_only, tmp_path / "dense")]
    # Undoing the rotation in the weights instead of applying it to inputs: float32 rounding over two sampling steps.
    torch.testing.assert_close(images[0], images[1], atol=1e-4, rtol=0)


def test_export_by_the_command_line(weight_only: Path, tmp_path: Path, cli) -> None:
    ran = cli("export", weight_only, "--to", "dense", "--output", tmp_path / "out")
    assert ran.code == 0
    assert (tmp_path / "out" / "model_index.json").exists()
    again = cli("export", weight_only, "--to", "dense", "--output", tmp_path / "out")
    assert again.code == 1 and "is not an empty folder" in again.error


def test_a_dense_model_is_refused(pixel_dit: Path, tmp_path: Path, cli) -> None:
    ran = cli("export", pixel_dit, "--to", "dense", "--output", tmp_path / "out")
    assert ran.code == 1 and "no quantization_config of quantdit" in ran.error
    assert not (tmp_path / "out").exists()


def test_a_write_that_fails_leaves_nothing_behind(
    weight_only: Path, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DiTTransformer2DModel
    from safetensors import SafetensorError

    def fail(*args: object, **kwargs: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(DiTTransformer2DModel, "save_pretrained", fail)
    ran = cli("export", weight_only, "--to", "dense", "--output", tmp_path / "out")
    assert ran.code == 1 and "No space left on device" in ran.error
    assert not list(tmp_path.iterdir())
