"""Every transformer class end to end without a pipeline: calibrate, save, load, same outputs; streamed or not, same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import tiny_models
from quantdit.checkpoints import streaming
from quantdit.checkpoints.checkpoint import quant_layers, read_transformer
from quantdit.compiling.compile import compile
from quantdit.compiling.plan import Plan
from quantdit.compiling.report import REPORT
from quantdit.models.adapter import adapter_for, layers
from quantdit.models.prediction import prediction_of
from quantdit.models.synthetic import synthetic_inputs
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.presets import from_bits
from quantdit.recipes.rules import Recipe, Rule
from quantdit.recipes.sampling_plan import SamplingPlan
from quantdit.system import files

CLASSES = [*tiny_models.TINY, *tiny_models.UNKNOWN]
# Streaming does not know classes: one of each way to lead from block to block, and one that no adapter knows.
STREAMED = [
    "WanTransformer3DModel",
    "FluxTransformer2DModel",
    "SD3Transformer2DModel",
    "PixArtTransformer2DModel",
    "QwenImageTransformer2DModel",
    next(iter(tiny_models.UNKNOWN)),
]
# Quick, and with everything that calibration data decides.
PLAN = Recipe("zoo", (Rule("role:outside", weight="dense", optional=True), Rule("*", "table4", activation_bits=8)))


@pytest.fixture(scope="module", params=CLASSES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A tiny model's name, its folder and the size of its inputs."""
    transformer, size = tiny_models.tiny(request.param)
    folder = tmp_path_factory.mktemp("model") / request.param
    transformer.save_pretrained(folder)
    return request.param, folder, size


def settings(size) -> SamplingPlan:
    return SamplingPlan(samples=1, steps=2, guidance=3.0, latent=size, buckets=2)


def output_of(transformer: nn.Module, size) -> torch.Tensor:
    inputs = synthetic_inputs(transformer, adapter_for(transformer), size, torch.Generator().manual_seed(5))
    with torch.no_grad():
        return prediction_of(transformer(**inputs))


def test_calibrate_save_load_forward(model, tmp_path: Path):
    name, folder, size = model
    pipeline, source = load_pipeline(str(folder))
    assert source.bare
    wanted = {layer.name for layer in layers(pipeline.transformer, adapter_for(pipeline.transformer)) if layer.role != "outside"}
    before = output_of(pipeline.transformer, size)
    report = compile(pipeline, source, Plan(PLAN, settings(size)), tmp_path / "out")
    assert report.layers.keys() == wanted == quant_layers(pipeline.transformer).keys()
    assert 0 < report.model_rel_rmse < 0.5 and not report.memory["streamed"]
    assert report.blocks["transformer"]["count"] > 0, "the chain of blocks was not found"
    after = output_of(pipeline.transformer, size)
    assert 0 < float((after - before).norm() / before.norm()) < 0.5
    again, _ = load_pipeline(str(tmp_path / "out"))
    assert type(again.transformer).__name__ == name
    assert torch.equal(output_of(again.transformer, size), after)
    assert torch.equal(output_of(read_transformer(tmp_path / "out" / "transformer"), size), after)


@pytest.mark.parametrize("model", STREAMED, indirect=True)
def test_streamed_gives_the_bytes_of_resident(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, folder, size = model
    for output in ("resident", "streamed"):
        if output == "streamed":
            monkeypatch.setattr(streaming, "need_of", lambda *a: streaming.Need(resident=2**60, streamed=0))
        pipeline, source = load_pipeline(str(folder))
        report = compile(pipeline, source, Plan(from_bits("w8a8"), settings(size)), tmp_path / output)
        assert report.memory["streamed"] == (output == "streamed")
        if output == "streamed":
            assert any(t.device.type == "meta" for t in pipeline.transformer.state_dict().values())
    assert files.digest(tmp_path / "resident" / "transformer") == files.digest(tmp_path / "streamed" / "transformer")
    reports = [json.loads((tmp_path / name / REPORT).read_text()) for name in ("resident", "streamed")]
    assert reports[0]["layers"] == reports[1]["layers"] and reports[0]["model_rel_rmse"] == reports[1]["model_rel_rmse"]
