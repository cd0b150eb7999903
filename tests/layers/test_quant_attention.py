"""8-bit attention: near to ordinary attention in every form that diffusers' dispatcher asks for, module by module."""

from __future__ import annotations

import copy
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor, nn

import quantdit
import tiny_models
from quantdit.kernels.triton_ops import dispatch
from quantdit.layers.quant_attention import attend, backend_of, modules_of, put, take_away
from quantdit.models.adapter import adapter_for
from quantdit.models.prediction import prediction_of
from quantdit.models.synthetic import synthetic_inputs
from quantdit.recipes.attention import AttentionSpec
from quantdit.recipes.sampling_plan import Size
from quantdit.system import files

# Of the zoo, those whose attention diffusers dispatches.
DISPATCHED = {
    "ChromaTransformer2DModel",
    "Flux2Transformer2DModel",
    "FluxTransformer2DModel",
    "HunyuanVideoTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "QwenImageTransformer2DModel",
    "WanTransformer3DModel",
    "ZImageTransformer2DModel",
}
RECIPE = {"name": "attention", "rule": [{"match": "*", "weight": "int8", "method": "rtn"}], "attention": [{"match": "*"}]}
# (queries, keys, scale of the scores)
SHAPES = ((100, 100, 1.0), (30, 700, 1.0), (40, 2000, 6.0), (5, 1, 1.0))


def qkv(m: int, n: int, scale: float = 1.0, d: int = 64, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return queries, keys with a channel that is large in all tokens, values that are not centred."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, t, d, generator=g) for t in (m, n, n))
    k[..., 3] += 20
    return [x.to(dtype) for x in (q * scale, k, v + 1)]


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("pv", "limit"), [("uint8", 0.02), ("fp8", 0.03), ("none", 0.02)])
@pytest.mark.parametrize(("m", "n", "scale"), SHAPES)
def test_it_is_near_to_ordinary_attention(pv: str, limit: float, m: int, n: int, scale: float) -> None:
    q, k, v = qkv(m, n, scale)
    assert error(attend(q, k, v, AttentionSpec(pv=pv)), nn.functional.scaled_dot_product_attention(q, k, v)) < limit


def test_values_of_few_keys_stay_floats_by_default() -> None:
    few, many = qkv(100, 20), qkv(100, 100)
    assert torch.equal(attend(*few, AttentionSpec()), attend(*few, AttentionSpec(pv="none")))
    assert torch.equal(attend(*many, AttentionSpec()), attend(*many, AttentionSpec(pv="uint8")))


def test_long_even_rows_keep_their_small_probabilities() -> None:
    """All keys but one are alike, and that one takes a third: 8 bits beside the largest alone would lose the others."""
    q, k, v = torch.zeros(1, 1, 8, 64), torch.zeros(1, 1, 8000, 64), torch.randn(1, 1, 8000, 64)
    q[..., 0] = 8.0
    k[:, :, 0, 0] = 8.3
    v[:, :, 1:] += 3
    spec = AttentionSpec(pv="uint8", rotate=False, smooth=False)
    assert error(attend(q, k, v, spec), nn.functional.scaled_dot_product_attention(q, k, v)) < 0.01


def test_each_measure_lowers_the_error() -> None:
    q, k, v = qkv(200, 200)
    plain = nn.functional.scaled_dot_product_attention(q, k, v)
    none, smooth, both = (
        error(attend(q, k, v, AttentionSpec(pv="none", rotate=rotate, smooth=smoothed)), plain)
        for rotate, smoothed in ((False, False), (False, True), (True, True))
    )
    assert smooth < none / 2
    assert both <= 1.05 * smooth
    values = [error(attend(q, k, v, AttentionSpec(pv="uint8", smooth=smoothed)), plain) for smoothed in (False, True)]
    assert values[1] < values[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_causal_scale_and_dtypes(dtype: torch.dtype) -> None:
    q, k, v = qkv(60, 60, dtype=dtype)
    mask = torch.ones(2, 1, 1, 60, dtype=torch.bool)
    mask[1, ..., 40:] = False
    for options in ({"attn_mask": mask}, {"attn_mask": torch.randn(60, 60).to(dtype)}, {"is_causal": True}, {"scale": 0.3}):
        expected = nn.functional.scaled_dot_product_attention(q, k, v, **options)
        ours = {"mask": options.get("attn_mask"), "causal": options.get("is_causal", False), "scale": options.get("scale")}
        got = attend(q, k, v, AttentionSpec(), **ours)
        assert got.dtype == dtype
        assert error(got, expected) < 0.03


def test_a_query_that_sees_no_key_gets_the_mean_of_the_values_at_most() -> None:
    q, k, v = qkv(4, 4)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0] = True
    assert torch.isfinite(attend(q, k, v, AttentionSpec(), mask)).all()


def test_gradients_are_those_of_ordinary_attention() -> None:
    inputs = [x.requires_grad_() for x in qkv(20, 30)]
    gradient = torch.randn(2, 3, 20, 64)
    found = torch.autograd.grad(attend(*inputs, AttentionSpec()), inputs, gradient)
    expected = torch.autograd.grad(nn.functional.scaled_dot_product_attention(*inputs), inputs, gradient)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_the_dispatcher_of_diffusers_takes_our_backend() -> None:
    """What of diffusers is private: a backend's place in an enum, and the table of functions."""
    backend = backend_of(AttentionSpec())
    assert isinstance(backend, AttentionBackendName)
    assert AttentionBackendName(backend.value) is backend
    assert copy.deepcopy(backend) is backend
    assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE
    q, k, v = (x.transpose(1, 2) for x in qkv(20, 30))
    expected = dispatch_attention_fn(q, k, v)
    assert error(dispatch_attention_fn(q, k, v, backend=backend), expected) < 0.02
    grouped = dispatch_attention_fn(q, k[:, :, :1], v[:, :, :1], backend=backend, enable_gqa=True)
    assert error(grouped, dispatch_attention_fn(q, k[:, :, :1], v[:, :, :1], enable_gqa=True)) < 0.02


def output(model: nn.Module, size: object) -> Tensor:
    inputs = synthetic_inputs(model, adapter_for(model), size, torch.Generator().manual_seed(1), 500.0)
    with torch.no_grad():
        return prediction_of(model(**inputs))


@pytest.mark.parametrize("name", sorted(tiny_models.TINY))
def test_every_class_is_served_or_refused_by_name(name: str) -> None:
    model, size = tiny_models.tiny(name)
    if name not in DISPATCHED:
        with pytest.raises(ValueError, match=f"{name} computes attention by itself"):
            quantdit.quantize(model, RECIPE)
        return
    before, names = output(model, size), list(modules_of(model))
    put(model, dict.fromkeys(names, AttentionSpec()))
    assert 0 < error(output(model, size), before) < 0.05
    take_away(model)
    assert torch.equal(output(model, size), before)


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, object]:
    """Read only."""
    model, size = tiny_models.tiny("WanTransformer3DModel")
    return quantdit.quantize(model, RECIPE), size


def test_it_is_stored_loaded_and_taken_away_with_the_model(made: tuple[nn.Module, object], tmp_path: Path) -> None:
    model, size = made
    model.save_pretrained(tmp_path / "one")
    again = type(model).from_pretrained(tmp_path / "one")
    assert again.attention_specs == model.attention_specs == dict.fromkeys(modules_of(model), AttentionSpec())
    assert torch.equal(output(again, size), output(model, size))
    assert torch.equal(output(quantdit.load(tmp_path / "one"), size), output(model, size))
    assert torch.equal(output(copy.deepcopy(again), size), output(model, size))
    again.dequantize()
    again.save_pretrained(tmp_path / "dense")
    dense = type(model).from_pretrained(tmp_path / "dense")
    assert torch.equal(output(again, size), output(dense, size))


def test_a_recipe_names_modules_and_the_first_rule_wins() -> None:
    model, _ = tiny_models.tiny("WanTransformer3DModel")
    rules = [{"match": "*.attn2", "qk": "none"}, {"match": "blocks.0.*", "pv": "fp8"}, {"match": "*", "rotate": False}]
    quantdit.quantize(model, RECIPE | {"attention": rules})
    found = {name: (spec.pv, spec.rotate) for name, spec in model.attention_specs.items()}
    assert set(found) == {name for name in modules_of(model) if name.endswith("attn1")}
    assert found["blocks.0.attn1"] == ("fp8", True)
    assert found["blocks.1.attn1"] == ("auto", False)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ([{"match": "*", "qk": "int4"}], "qk is 'int4', expected one of int8, none"),
        ([{"match": "*", "pv": 8}], "pv is 8"),
        ([{"match": "*", "rotate": 1}], "rotate is 1, expected true or false"),
        ([{"match": "*", "heads": 2}], "expected a table of qk, pv, rotate, smooth"),
        ([{"qk": "int8"}], "needs match"),
        ({"match": "*"}, "sections"),
        ([{"match": "*.attn9"}], "matches no attention module; there are blocks.0.attn1"),
    ],
)
def test_a_wrong_section_is_refused(rules: object, says: str) -> None:
    model, _ = tiny_models.tiny("WanTransformer3DModel")
    with pytest.raises(ValueError, match=says):
        quantdit.quantize(model, RECIPE | {"attention": rules})


@pytest.mark.parametrize(
    "content", [[], {"blocks.9.attn1": {}}, {"blocks.0.attn1": {"qk": "int2"}}, {"blocks.0.attn1": 5}, {"": {}}]
)
def test_a_hostile_config_is_refused(content: object, made: tuple[nn.Module, object], tmp_path: Path) -> None:
    model, _ = made
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["attention"] = content
    path.write_text(json.dumps(config))
    with pytest.raises(files.CheckpointError, match="copy"):
        type(model).from_pretrained(tmp_path)


def test_it_is_there_after_quantizing_while_loading(tmp_path: Path) -> None:
    model, size = tiny_models.tiny("FluxTransformer2DModel")
    model.save_pretrained(tmp_path / "full")
    loaded = type(model).from_pretrained(tmp_path / "full", quantization_config=quantdit.QuantDiTConfig(recipe=RECIPE))
    assert loaded.attention_specs == dict.fromkeys(modules_of(loaded), AttentionSpec())
    assert error(output(loaded, size), output(model, size)) < 0.1


def test_a_compiled_model_computes_the_same(made: tuple[nn.Module, object]) -> None:
    model, size = made
    inputs = synthetic_inputs(model, adapter_for(model), size, torch.Generator().manual_seed(1), 500.0)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(prediction_of(compiled(**inputs)), output(model, size))


@pytest.mark.slow
def test_a_quantized_model_takes_the_compiled_flex_backend() -> None:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 64, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    model = WanTransformer3DModel(**sizes, text_dim=32, freq_dim=16, ffn_dim=64).eval()
    quantdit.quantize(model, "w4a8")
    size = Size(1, 2, 16, 16, 16)
    before = output(model, size)
    for name, module in modules_of(model).items():
        if name.endswith("attn1"):  # torch cannot compile it for a few tokens of text on a CPU
            module.processor._attention_backend = AttentionBackendName.FLEX
    model.compile_repeated_blocks()
    assert error(output(model, size), before) < 1e-5


def test_a_library_is_used_on_a_gpu_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(20, 20)
    asked = {}

    def sageattn(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        asked.update(options)
        return v

    package = ModuleType("sageattention")
    package.sageattn, package.__spec__ = sageattn, ModuleSpec("sageattention", None)
    monkeypatch.setitem(sys.modules, "sageattention", package)
    assert attend(q, k, v, AttentionSpec()) is not v  # on a CPU
    monkeypatch.setattr(dispatch, "on_gpu", lambda tokens: True)
    assert attend(q, k, v, AttentionSpec()) is v
    assert asked == {"tensor_layout": "HND", "is_causal": False, "sm_scale": 0.125}
    assert attend(q, k, v, AttentionSpec(pv="uint8")) is not v
    assert attend(q, k, v, AttentionSpec(), torch.ones(20, 20, dtype=torch.bool)) is not v


def test_a_graph_of_onnx_has_no_8_bit_attention(made: tuple[nn.Module, object], tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    made[0].save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="8-bit attention"):
        quantdit.export(tmp_path / "model", "onnx", tmp_path / "model.onnx")
