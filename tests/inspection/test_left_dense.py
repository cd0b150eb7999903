"""What of a component stayed as it was: whole modules, by their shortest names, and only those that weigh something."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_pipelines
from quantdit.inspection.left_dense import left_dense
from quantdit.system import files


def test_modules_without_a_quantized_layer_are_named(tmp_path: Path) -> None:
    layers = {"model.layers.0.q": {}, "model.layers.1.q": {}}
    files.write_json(tmp_path / "config.json", {"quantization_config": {"layers": layers}})
    tensors = {
        "model.layers.0.q.data": torch.zeros(500, dtype=torch.uint8),
        "model.layers.1.q.data": torch.zeros(500, dtype=torch.uint8),
        "model.layers.1.norm.weight": torch.zeros(4, dtype=torch.float32),
        "model.tower.0.a.weight": torch.zeros(100, dtype=torch.bfloat16),
        "model.tower.1.weight": torch.zeros(100, dtype=torch.bfloat16),
        "head.weight": torch.zeros(300, dtype=torch.bfloat16),
    }
    files.write_tensors(tmp_path, tensors, tensors.__getitem__, {})
    assert left_dense(tmp_path) == {"head": 600, "model.tower": 400}


def test_calibrate_says_what_each_component_takes(tmp_path: Path, cli) -> None:
    pytest.importorskip("transformers")
    full = tiny_pipelines.write_tiny("QwenImagePipeline", tmp_path / "full")
    given = ("calibrate", "--model", full, "--bits", "w4a8", "--samples", 0, "--output", tmp_path / "out")
    ran = cli(*given, "--components", "all")
    assert ran.code == 0, ran.err
    said = {line.split(":")[0]: line for line in ran.out.splitlines()}
    of_encoder = sum(files.tensor_bytes(tmp_path / "out" / "text_encoder").values())
    assert said["text_encoder"].startswith(f"text_encoder: {of_encoder / 1e6:,.2f} MB, of which as it was: model.visual ")
    assert ", lm_head " in said["text_encoder"] and "model.language_model" not in said["text_encoder"]
    assert "time_text_embed" in said["transformer"]
