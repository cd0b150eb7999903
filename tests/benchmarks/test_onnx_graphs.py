"""`quantdit bench onnx`: what ONNX Runtime's own quantizers make of our float32 graph opens and runs beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from quantdit.benchmarks import onnx_graphs
from quantdit.models.adapter import adapter_for
from quantdit.models.synthetic import synthetic_inputs
from quantdit.recipes.sampling_plan import Size


def test_graphs_made_of_ours_open_and_run(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 64, "text_dim": 128, "freq_dim": 16, "ffn_dim": 256, "num_layers": 1}
    model = WanTransformer3DModel(in_channels=4, out_channels=4, **sizes).eval()
    arguments = synthetic_inputs(model, adapter_for(model), Size(1, 1, 8, 8, 6), torch.Generator().manual_seed(0), time=500)
    onnx_graphs.dense_graph(model, arguments, tmp_path / "dense.onnx")
    feeds = {name: value.numpy() for name, value in arguments.items()}
    with torch.no_grad():
        expected = model(**arguments, return_dict=False)[0]
    graphs = {"dense": tmp_path / "dense.onnx"} | onnx_graphs.peers(tmp_path / "dense.onnx", tmp_path)
    assert len(graphs) == 6
    for name, path in graphs.items():
        error = float((onnx_graphs.runner(path, feeds)() - expected).norm() / expected.norm())
        assert error < (1e-4 if name == "dense" else 0.7), name
