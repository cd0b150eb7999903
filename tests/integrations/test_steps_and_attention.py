"""Step plan and 8-bit attention together, under what pipelines do to a model: LoRA, compiled blocks, casts, saving, threads."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quantdit
import tiny_models
from quantdit.models.adapter import adapter_for
from quantdit.models.prediction import prediction_of
from quantdit.models.synthetic import synthetic_inputs
from quantdit.step_plans.following import carry, hook_of
from quantdit.step_plans.forecasts import placed, polynomial

TIMES = (1000.0, 800.0, 600.0, 400.0, 200.0)
PLAN = polynomial("taylor1", TIMES, placed(5, 3))
RECIPE = {"name": "both", "rule": [{"match": "*", "weight": "int8", "activation_bits": 8}], "attention": [{"match": "*"}]}
COUNTED = {"computed": 3, "forecast": 2}


@pytest.fixture(scope="module")
def made() -> nn.Module:
    """Copied to be used."""
    model = quantdit.quantize(tiny_models.tiny("WanTransformer3DModel")[0], RECIPE)
    carry(model, PLAN)
    return model


@pytest.fixture
def wan(made: nn.Module) -> nn.Module:
    model = copy.deepcopy(made)
    model.enable_cache(quantdit.step_plan(model))
    return model


def run(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    size = tiny_models.tiny("WanTransformer3DModel")[1]
    outputs = []
    for time in TIMES:
        inputs = synthetic_inputs(model, adapter_for(model), size, torch.Generator().manual_seed(0), time)
        cast = {k: v.to(dtype) if v.is_floating_point() and k != "timestep" else v for k, v in inputs.items()}
        with torch.no_grad(), model.cache_context("cond"):
            outputs.append(prediction_of(model(**cast)))
    return outputs


def near(a: list[Tensor], b: list[Tensor], limit: float) -> bool:
    return all(float((x.float() - y.float()).norm() / y.float().norm()) < limit for x, y in zip(a, b, strict=True))


def test_a_lora_acts_under_both(wan: nn.Module) -> None:
    pytest.importorskip("peft")
    before = run(wan)
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, module in wan.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("to_q", "to_v")):
            state[f"{name}.lora_A.weight"] = torch.randn(4, module.in_features, generator=generator) / 8
            state[f"{name}.lora_B.weight"] = torch.randn(module.out_features, 4, generator=generator) / 4
    wan.load_lora_adapter(state, prefix=None, adapter_name="style")
    with_lora = run(wan)
    assert not near(with_lora, before, 0.01)
    wan.fuse_lora()
    wan.unload_lora()
    assert near(run(wan), with_lora, 0.05)
    assert hook_of(wan).counted == {"computed": 9, "forecast": 6}


def test_a_lora_learns_under_8_bit_attention(made: nn.Module) -> None:
    model = copy.deepcopy(made)
    size = tiny_models.tiny("WanTransformer3DModel")[1]
    inputs = synthetic_inputs(model, adapter_for(model), size, torch.Generator().manual_seed(0), 500.0)
    inputs["hidden_states"] = inputs["hidden_states"].requires_grad_()
    prediction_of(model(**inputs)).square().mean().backward()
    found = inputs["hidden_states"].grad.clone()
    model.dequantize()
    inputs["hidden_states"].grad = None
    prediction_of(model(**inputs)).square().mean().backward()
    assert float(torch.cosine_similarity(found.flatten(), inputs["hidden_states"].grad.flatten(), 0)) > 0.99


def test_compiled_blocks_compute_the_same(wan: nn.Module) -> None:
    before = run(wan)
    for block in wan.blocks:
        block.compile(backend="eager", fullgraph=True)
    assert near(run(wan), before, 1e-5)
    assert hook_of(wan).counted == {"computed": 6, "forecast": 4}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_model_forecasts_in_its_dtype(wan: nn.Module, dtype: torch.dtype) -> None:
    before = run(wan)
    made = run(wan.to(dtype), dtype)
    assert {output.dtype for output in made} == {dtype}
    assert near(made, before, 0.1)


def test_a_model_that_follows_its_plan_is_saved_and_loaded(wan: nn.Module, tmp_path: Path) -> None:
    before = run(wan)
    wan.save_pretrained(tmp_path)
    again = type(wan).from_pretrained(tmp_path)
    assert hook_of(again) is None  # opt-in
    again.enable_cache(quantdit.step_plan(again))
    assert all(torch.equal(a, b) for a, b in zip(run(again), before, strict=True))
    assert hook_of(again).counted == COUNTED
