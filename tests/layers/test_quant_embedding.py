"""QuantEmbedding: rows are those of the decoded table, to the bit, and nothing else is decoded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from quantdit.calibration.data_free import quantize_table
from quantdit.calibration.quantize import WeightOptions, quantize_weight
from quantdit.layers.quant_embedding import DenseEmbedding, QuantEmbedding, put_dense, put_layer, scale_of
from quantdit.layers.quant_linear import QuantLinear
from quantdit.tensors.layer_spec import ActivationSpec, LayerSpec
from quantdit.tensors.qtensor import QTensor
from tiny_encoders import encoder, inputs, outputs

ROWS, WIDTH = 50, 32
FORMATS = [("int8", WIDTH), ("int4", 16), ("int6", WIDTH), ("fp8_e4m3", WIDTH), ("table4", WIDTH), ("vq64x2", WIDTH)]


def table(
    format: str = "int4", group_size: int = 16, rows: int = ROWS, scale: float | None = None, codebooks: str = "layer"
) -> QuantEmbedding:
    weight, options = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(2)), WeightOptions(table_rows=codebooks)
    q = quantize_weight(weight, torch.eye(WIDTH), format, group_size, "rtn", options)
    return QuantEmbedding.from_tensors(LayerSpec(q.spec), q.tensors(), scale)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each decoding took."""
    rows, decode = [], QTensor.decode8
    monkeypatch.setattr(QTensor, "decode8", lambda self: rows.append(self.spec.out_features) or decode(self))
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("format", "group_size"), FORMATS)
def test_rows_are_those_of_the_whole_table(format: str, group_size: int, dtype: torch.dtype):
    layer, numbers = table(format, group_size).to(dtype), torch.tensor([[3, 49, 0], [3, 7, 3]])
    found = layer(numbers)
    assert (found.dtype, found.shape) == (dtype, (2, 3, WIDTH))
    assert torch.equal(found, nn.functional.embedding(numbers, layer.qtensor.dequantize().to(dtype)))
    assert torch.equal(layer(numbers.int()), found)


def test_codebooks_are_of_the_table_or_of_a_row():
    numbers = torch.tensor([60, 1])
    for layer in (table("vq64x2", WIDTH, rows=64), table("table4", WIDTH, rows=64, codebooks="channel")):
        assert torch.equal(layer(numbers), layer.qtensor.dequantize()[numbers])


def test_a_lookup_decodes_its_rows_alone(decoded: list[int]):
    table()(torch.tensor([[1, 2, 3]]))
    assert decoded == [3]


def test_no_numbers_and_wrong_ones():
    layer = table()
    assert layer(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, WIDTH)
    with pytest.raises(IndexError):
        layer(torch.tensor([ROWS]))
    with pytest.raises(RuntimeError, match="meta device"):
        layer.to("meta")(torch.tensor([0]))


def test_floats_pass_through_the_linear():
    layer, x = table("int8", WIDTH), torch.randn(2, 3, WIDTH)
    assert torch.equal(layer(x), QuantLinear.from_tensors(layer.layer_spec, layer.tensors(), None)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scale_multiplies_rows_as_gemma_does(dtype: torch.dtype):
    from transformers.models.gemma2.modeling_gemma2 import Gemma2TextScaledWordEmbedding

    theirs = Gemma2TextScaledWordEmbedding(ROWS, WIDTH, 0, WIDTH**0.5).to(dtype)
    layer = table("int8", WIDTH, scale=scale_of(theirs)).to(dtype)
    theirs.weight = nn.Parameter(layer.weight, requires_grad=False)
    numbers = torch.arange(ROWS)
    assert torch.equal(layer(numbers), theirs(numbers))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"rotation": "hadamard", "block": 16}, "rotation"),
        ({"smoothed": True}, "smoothing"),
        ({"rank": 2}, "low-rank branch"),
        ({"activation": ActivationSpec(8)}, "quantized input"),
    ],
)
def test_what_a_linear_has_a_table_has_not(spec: dict, words: str):
    with pytest.raises(ValueError, match=f"a table of embeddings has no {words}"):
        QuantEmbedding(LayerSpec(table().spec, **spec))


def test_an_embedding_of_unknown_ways_is_refused():
    class Odd(nn.Embedding):
        pass

    with pytest.raises(ValueError, match="Odd is no plain Embedding"):
        scale_of(Odd(4, 4))
    with pytest.raises(ValueError, match="max_norm"):
        scale_of(nn.Embedding(4, 4, max_norm=1.0))


@pytest.mark.parametrize(
    ("name", "source", "tied"),
    [
        ("T5EncoderModel", "shared", "encoder.embed_tokens"),
        ("Qwen3ForCausalLM", "model.embed_tokens", "lm_head"),
    ],
)
def test_what_is_tied_is_one_module(name: str, source: str, tied: str):
    model = encoder(name)
    full = outputs(model, name)
    layer = quantize_table([model.get_submodule(source).weight], 200, WIDTH, "int8", WIDTH)
    put_layer(model, source, QuantEmbedding.from_tensors(layer.spec, layer.tensors))
    assert model.get_submodule(tied) is model.get_submodule(source)
    model.tie_weights()
    model = copy.deepcopy(model).to(torch.float64).float()
    assert model.get_submodule(tied) is model.get_submodule(source)
    found = outputs(model, name)
    assert all(float((a - b).norm()) < 0.05 * float(b.norm()) for a, b in zip(found, full, strict=True))
    put_dense(model, torch.float32)
    assert isinstance(model.get_submodule(source), DenseEmbedding)
    assert model.all_tied_weights_keys == {f"{tied}.weight": f"{source}.weight"}
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(outputs(model, name), found, strict=True))


def test_a_forward_of_t5_decodes_no_weight_to_ask_for_its_dtype(monkeypatch: pytest.MonkeyPatch):
    """`T5DenseGatedActDense` looks at `wo.weight.dtype` in each call."""
    model, name = encoder("T5EncoderModel"), "T5EncoderModel"
    for path, linear in [*model.named_modules()]:
        if isinstance(linear, nn.Linear):
            q = quantize_weight(linear.weight, torch.eye(linear.in_features), "int8", linear.in_features, "rtn")
            put_layer(model, path, QuantLinear.from_tensors(LayerSpec(q.spec), q.tensors(), None))
    expected = outputs(model, name)
    monkeypatch.setattr(QTensor, "dequantize", lambda self: pytest.fail("a weight was decoded"))
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, name), expected, strict=True))
    assert inputs(name)["input_ids"].shape == (2, 12)
