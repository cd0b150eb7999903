"""A checkpoint that is moved to a GPU: the same file, the same call, the kernels of dispatch.py instead of the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantdit.compiling.compile import compile
from quantdit.compiling.plan import Plan
from quantdit.formats import Format
from quantdit.kernels.triton_ops import dispatch
from quantdit.layers.quant_linear import QuantLinear
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.presets import from_bits
from quantdit.recipes.sampling_plan import SamplingPlan


def test_a_checkpoint_runs_on_a_gpu_as_it_is(pixel_dit: Path, tmp_path: Path, gpu: Callable, monkeypatch: pytest.MonkeyPatch):
    pipeline, source = load_pipeline(str(pixel_dit))
    compile(pipeline, source, Plan(from_bits("w4a8"), SamplingPlan(samples=1, steps=1)), tmp_path / "out")
    model = load_pipeline(str(tmp_path / "out"))[0].transformer.to(torch.bfloat16)
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert {m.layer_spec.activation.bits for m in layers} == {8, 16}
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()

    def output() -> torch.Tensor:
        with torch.no_grad():
            return model(x, timestep=torch.tensor([500]), class_labels=torch.tensor([1])).sample

    expected = output()
    gpu(90)
    first = dispatch.decodes_first
    taken: list[tuple[torch.dtype, bool]] = []

    def spy(m: int, format: Format, x: torch.dtype, capability: int) -> bool:
        taken.append((x, first(m, format, x, capability)))
        return taken[-1][1]

    monkeypatch.setattr(dispatch, "decodes_first", spy)
    y = output()
    assert len(taken) >= len(layers) and set(taken) == {(torch.int8, False), (torch.bfloat16, False)}
    assert float((y - expected).float().norm() / expected.float().norm()) < 2e-2  # bfloat16's roundings fall otherwise
