"""Static scales in an exported graph follow the time, whatever the class calls it and whichever way it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quantdit
import tiny_models
from quantdit import Recipe, Rule
from quantdit.exporters.onnx_session import OnnxForward, open_graph
from quantdit.exporters.to_onnx import graph_of, save
from quantdit.models.adapter import adapter_for
from quantdit.models.prediction import prediction_of
from quantdit.models.synthetic import latent_of, moved_inputs, synthetic_inputs

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

STATIC = Recipe(
    "static",
    (
        Rule("role:outside", "dense", optional=True),
        Rule("*", "int8", activation_bits=8, activation_scale="static", rotation="none", method="rtn"),
    ),
)


@pytest.mark.parametrize(("name", "rises"), [("MochiTransformer3DModel", True), ("DiTTransformer2DModel", False)])
def test_the_graph_takes_the_bucket_that_pytorch_takes(name: str, rises: bool, tmp_path: Path):
    model, size = tiny_models.tiny(name)
    adapter = adapter_for(model)
    inputs = synthetic_inputs(model, adapter, size, torch.Generator().manual_seed(3))
    # The sample grows sixfold a call, so that a wrong scale is plainly wrong.
    calls = [moved_inputs(model, adapter, inputs, latent_of(adapter, inputs) * 6**i, t) for i, t in enumerate((990, 500, 10))]
    quantdit.quantize(model, STATIC, calls)
    assert (model.timestep_edges[0] < model.timestep_edges[-1]) == rises
    graph, content, _ = graph_of(model, calls[0])
    save(graph, tmp_path / "model.onnx", content)
    forward = OnnxForward(model, tmp_path / "model.onnx", *open_graph(tmp_path / "model.onnx"))
    for call in calls:
        with torch.no_grad():
            wanted = prediction_of(model(**call))
        assert float((forward.run(call) - wanted).norm() / wanted.norm()) < 0.01
