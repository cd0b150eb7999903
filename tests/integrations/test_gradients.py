"""Training through a quantized model: gradients are those of the dequantized model, whatever its layers do to their inputs."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import quantdit
from quantdit.checkpoints.checkpoint import quant_layers
from quantdit.layers.quant_linear import QuantLinear, dense_linear

peft = pytest.importorskip("peft")

# Relative error of a gradient that is computed twice in this dtype, by sums of another order.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def kinds(model: nn.Module) -> dict[str, QuantLinear]:
    """One layer of each kind of activation, transform and branch."""
    found = {}
    for layer in quant_layers(model).values():
        s = layer.layer_spec
        found.setdefault(f"{layer.spec.format} {s.activation} {s.rotation} rank {s.rank}", layer)
    return found


def gradient(layer: nn.Module, x: Tensor) -> Tensor:
    """Of a sum of outputs with fixed weights, with respect to x."""
    x = x.detach().requires_grad_()
    y = layer(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float32).reshape(y.shape).to(y.dtype)
    return torch.autograd.grad(y, x, weights)[0]


def rel(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def cosines(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[float]:
    return [float(nn.functional.cosine_similarity(a[n].flatten(), b[n].flatten(), dim=0)) for n in b]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_inputs_of_every_kind_of_layer(made, dtype: torch.dtype):
    """Of one token and many, of strides that are not the contiguous ones, of inputs that static scales clip."""
    found = kinds(made.model)
    assert len(found) >= 6
    for kind, layer in found.items():
        dense = dense_linear(layer, dtype)
        x = torch.randn(layer.in_features, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
        for tokens in (x.T, x.T[0], 30 * x.T.reshape(1, 5, -1)):
            expected = gradient(dense, tokens)
            assert float(expected.norm()) > 0
            assert rel(gradient(layer, tokens), expected) < TOLERANCE[dtype], kind


def test_compiled_checkpointed_and_under_autocast(made):
    for kind, layer in list(kinds(made.model).items())[::2]:
        x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(1))
        expected = gradient(dense_linear(layer, torch.float32), x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert rel(gradient(compiled, x), expected) < 1e-5, kind
        assert rel(gradient(lambda x, layer=layer: checkpoint(layer, x, use_reentrant=False), x), expected) < 1e-5, kind
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16  # as of any linear
            assert rel(gradient(layer, x), expected) < 2e-2, kind


def test_inference_keeps_nothing_for_a_gradient(made):
    layer = next(iter(kinds(made.model).values()))
    x = torch.randn(3, layer.in_features)
    assert layer(x).grad_fn is None
    with torch.no_grad():
        assert layer(x.requires_grad_()).grad_fn is None


def test_a_bias_that_is_unfrozen_learns(made):
    layer = next(layer for layer in kinds(made.model).values() if layer.bias is not None)
    layer.bias.requires_grad_()
    try:
        for x in (torch.randn(7, layer.in_features), torch.randn(7, layer.in_features, requires_grad=True)):
            y = layer(x)
            torch.testing.assert_close(torch.autograd.grad(y.sum(), layer.bias)[0], torch.full_like(layer.bias, 7.0))
    finally:
        layer.bias.requires_grad_(False)


def lora_gradients(model: nn.Module, inputs: dict) -> dict[str, Tensor]:
    """Gradients of a seeded LoRA on the model, which keeps it."""
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False)
    model.add_adapter(config)
    y = model(**inputs, return_dict=False)[0]
    (y * torch.linspace(-1, 1, y.numel(), dtype=torch.float32).reshape(y.shape)).sum().backward()
    trained = {n.replace("base_layer.", ""): p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(gradient is not None for gradient in trained.values())
    return trained


@pytest.mark.parametrize("bits", ["w8a8", "w4a8", "w4a16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_lora_learns_what_it_learns_on_the_dequantized_model(tiny, bits: str, checkpointing: bool):
    found = []
    for dequantized in (False, True):
        model, calls = tiny("WanTransformer3DModel")
        quantdit.quantize(model, bits)
        if dequantized:
            model.dequantize()
        if checkpointing:
            model.enable_gradient_checkpointing()
            model.train()
        found.append(lora_gradients(model, calls[1]))
    same = cosines(*found)
    assert statistics.median(same) >= 0.99 and min(same) >= 0.9, (statistics.median(same), min(same))
