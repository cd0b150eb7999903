"""QuantLinear against a dense layer computed by hand, for every format and activation width.

The inputs are small integers divided by 2: exact in every dtype, and of -1, 0, 1 the rotation in blocks of 16 is exact as well
(test_hadamard.py). Hence the layer and the hand computation quantize the very same tokens; what remains is the rounding of sums.
"""

from __future__ import annotations

import copy
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from quantdit.formats import FORMATS, QSpec
from quantdit.layers.quant_linear import QuantLinear, weight_bits
from quantdit.tensors import transform
from quantdit.tensors.hadamard import random_sign
from quantdit.tensors.layer_spec import ActivationSpec, LayerSpec, layer_fields, stored_bytes
from quantdit.tensors.qtensor import QTensor, spec_fields
from quantdit.tensors.transform import Transform
from some_formats import EACH_KIND, SOME

OUT, WIDTH, BLOCK = 20, 96, 16
U32 = 2.0**-24
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # unit roundoff


def random_qtensor(name: str, out: int = OUT, width: int = WIDTH, seed: int = 0) -> QTensor:
    """A weight of random codes whose values keep inside int8; groups of 32 where the format has groups."""
    f = FORMATS[name]
    spec = QSpec(name, out, width, 32 if name in ("int2", "int3", "int4", "int6") else width)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(f.code_count, (out, width // f.dim), generator=generator).to(f.code_dtype)
    if name == "fp8_e4m3":
        codes[codes % 128 == 127] = 0
    tensors = {"data": f.pack(f, codes), "scale": torch.rand(out, generator=generator) / 500 + 1e-4}
    for key, field in spec_fields(spec).items():
        if key not in tensors:
            low, high = {
                "multiplier": (1, 127 // f.code_count + 1),
                "offset": (-128, 1),
                "codebook": (0 if f.sign_split else -128, 128),
            }[key]
            tensors[key] = torch.randint(low, high, field.shape, generator=generator).float().to(field.dtype)
    return QTensor(spec, **tensors)


def random_bias(seed: int = 9) -> torch.Tensor:
    return torch.randn(OUT, generator=torch.Generator().manual_seed(seed))


def inputs(*shape: int, dtype: torch.dtype = torch.float32, largest: int = 1) -> torch.Tensor:
    """Halves of integers -largest..largest, the first token all zeros."""
    x = torch.randint(-largest, largest + 1, shape, generator=torch.Generator().manual_seed(4)) / 2
    x.reshape(-1, shape[-1])[0] = 0
    return x.to(dtype)


def layer_of(
    q: QTensor, activation_bits: int = 16, rotated: bool = False, bias: bool = False, dtype: torch.dtype = torch.float32
) -> QuantLinear:
    sign = {"premultiplier": random_sign(q.spec.in_features, 3)} if rotated else {}
    rotation, block = ("hadamard", BLOCK) if rotated else ("none", 1)
    spec = LayerSpec(q.spec, ActivationSpec(activation_bits), rotation, block)
    return QuantLinear.from_tensors(spec, q.tensors() | sign, random_bias().to(dtype) if bias else None)


def rotation(layer: QuantLinear) -> np.ndarray:
    """R = diag(sign) (1 kron H) `[in, in]` float64, the identity if the layer is not rotated."""
    b = layer.layer_spec.block
    if b == 1:
        return np.eye(layer.in_features)
    h = np.array([[(-1.0) ** (i & j).bit_count() for j in range(b)] for i in range(b)]) / b**0.5
    return np.diag(layer.premultiplier.numpy().astype(float)) @ np.kron(np.eye(layer.in_features // b), h)


def by_hand(layer: QuantLinear, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The layer's output `[tokens, out]` in float64, and the sum of magnitudes of its terms."""
    q = layer.qtensor
    dense = q.scale.double().numpy()[:, None] * q.decode8().to(torch.float32).double().numpy()
    tokens = x.reshape(-1, layer.in_features).double().numpy() @ rotation(layer)
    bits = layer.layer_spec.activation.bits
    if bits < 16:
        # The definition of a token's scale and codes, in the arithmetic that defines it: float32 (exact tokens, one division).
        tokens = tokens.astype(np.float32)
        scale = np.abs(tokens).max(axis=1) / np.float32(2 ** (bits - 1) - 1)
        codes = np.rint(tokens / np.where(scale == 0, np.float32(1), scale)[:, None])
        tokens = scale[:, None].astype(np.float64) * codes
    bias = np.zeros(layer.out_features) if layer.bias is None else layer.bias.double().numpy()
    return tokens @ dense.T + bias, np.abs(tokens) @ np.abs(dense).T + np.abs(bias)


def assert_is_by_hand(layer: QuantLinear, x: torch.Tensor) -> None:
    y = layer(x)
    assert (y.dtype, y.shape) == (x.dtype, (*x.shape[:-1], layer.out_features))
    expected, magnitude = by_hand(layer, x)
    u = UNIT[x.dtype]
    if layer.layer_spec.activation.bits == 16:
        # Weights and bias rounded to x's dtype (the scaling is one more rounding of float32), float32 sums, the result rounded.
        bound = ((layer.in_features + 1) * U32 + 2 * u) * magnitude + 2 * u * np.abs(expected)
    else:
        # Sum, two scalings and bias rounded to float32, the result to x's dtype; e4m3 weights are summed in float32 on a CPU.
        sums = layer.in_features if layer.decoded().dtype == torch.float8_e4m3fn else 0
        bound = (sums + 5) * U32 * magnitude + u * np.abs(expected)
    bound += 2.0**-25  # half the distance of the smallest float16 numbers
    assert (np.abs(y.detach().double().numpy().reshape(expected.shape) - expected) <= bound).all()


# All of a weight that decodes to integers and of one that decodes to e4m3; of the others one layer with codes, one without.
FORWARD = [
    *product(("int4", "table4_e4m3"), (16, 8, 4), (False, True), UNIT),
    *product([name for name in SOME if name not in ("int4", "table4_e4m3")], (16, 8), (True,), (torch.float32,)),
]


@pytest.mark.parametrize(("name", "activation_bits", "rotated", "dtype"), FORWARD)
def test_forward_is_the_dense_layer(name: str, activation_bits: int, rotated: bool, dtype: torch.dtype):
    """With and without bias; matrices, batches of sequences, a single token, one without a batch at all."""
    largest = 1 if rotated else 100
    for bias in (True, False):
        layer = layer_of(random_qtensor(name), activation_bits, rotated, bias, dtype)
        assert_is_by_hand(layer, inputs(13, WIDTH, dtype=dtype, largest=largest))
    for shape in ((2, 7, WIDTH), (1, WIDTH), (WIDTH,), (2, 1, 3, WIDTH)):
        assert_is_by_hand(layer, inputs(*shape, dtype=dtype, largest=largest))


@pytest.mark.parametrize("activation_bits", [16, 8])
def test_no_tokens(activation_bits: int):
    layer = layer_of(random_qtensor("int4"), activation_bits, rotated=True, bias=True)
    assert layer(torch.zeros(0, WIDTH)).shape == (0, OUT)
    assert layer(torch.zeros(2, 0, WIDTH)).shape == (2, 0, OUT)


@pytest.mark.parametrize("activation_bits", [16, 8])
def test_inputs_of_any_strides(activation_bits: int):
    layer = layer_of(random_qtensor("int4"), activation_bits, rotated=True)
    for x in (inputs(WIDTH, 11).T, inputs(3, 5, WIDTH).transpose(0, 1)):
        assert_is_by_hand(layer, x)
        assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("name", ["int4", "int8", "fp8_e4m3", "table4"])
@pytest.mark.parametrize("activation_bits", [16, 8])
def test_inference_mode(name: str, activation_bits: int):
    """The first and the later calls, and a call outside afterwards."""
    q, x = random_qtensor(name), inputs(5, WIDTH)
    expected = layer_of(q, activation_bits)(x)
    layer = layer_of(q, activation_bits)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("name", EACH_KIND)
@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
def test_weight_is_in_the_unrotated_space(name: str, rotated: bool):
    """It is the stored weight times R^T; a row's rotation is off by (block + 2) u of its norm."""
    layer = layer_of(random_qtensor(name), rotated=rotated)
    weight = layer.weight
    assert (weight.dtype, weight.shape) == (torch.float32, (OUT, WIDTH))
    stored = layer.qtensor.dequantize().double().numpy()
    expected = stored @ rotation(layer).T
    bound = (BLOCK + 2) * U32 * np.linalg.norm(stored, axis=1, keepdims=True)
    assert (np.abs(weight.double().numpy() - expected) <= bound).all()
    if not rotated:
        assert torch.equal(weight, layer.qtensor.dequantize())


@pytest.mark.parametrize("dtype", UNIT)
def test_weight_has_the_dtype_of_the_bias(dtype: torch.dtype):
    layer = layer_of(random_qtensor("int4"), bias=True, dtype=dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype


def test_weight_is_decoded_when_it_is_computed_with(monkeypatch: pytest.MonkeyPatch):
    """From then on it is an ordinary tensor; what a layer becomes later does not change it."""
    layer, decode, decoded = layer_of(random_qtensor("int4"), bias=True), QTensor.dequantize, []
    expected = layer.qtensor.dequantize()
    monkeypatch.setattr(QTensor, "dequantize", lambda self: decoded.append(1) or decode(self))
    weight = layer.weight
    assert isinstance(weight, torch.Tensor) and isinstance(nn.Parameter(layer.weight, requires_grad=False), nn.Parameter)
    decoded.clear()
    assert (weight.dtype, weight.shape, weight.device.type, weight.size(0)) == (torch.float32, (OUT, WIDTH), "cpu", OUT)
    assert not decoded
    layer.extend_branch(torch.ones(OUT, 1), torch.ones(1, WIDTH))
    assert torch.equal(weight, expected) and type(weight) is torch.Tensor and decoded == [1]
    assert torch.equal(layer.weight, expected + 1)


def test_it_is_a_linear_as_peft_sees_it():
    layer = layer_of(random_qtensor("int4"), 8, rotated=True, bias=True)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (WIDTH, OUT)
    assert layer.weight.shape == (OUT, WIDTH)
    assert layer.weight.device == layer.bias.device
    assert not any(p.requires_grad for p in layer.parameters())
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_repr_says_what_it_is():
    text = repr(layer_of(random_qtensor("int4"), 8, rotated=True, bias=True))
    assert text == "QuantLinear(96, 20, bias=True, int4, group_size=32, a8, hadamard=16)"
    assert repr(layer_of(random_qtensor("int8"))) == "QuantLinear(96, 20, bias=False, int8, a16)"


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", EACH_KIND)
def test_state_dict_round_trip(name: str, assign: bool):
    layer = layer_of(random_qtensor(name), 8, rotated=True, bias=True)
    state = layer.state_dict()
    assert state.keys() == {*layer_fields(layer.layer_spec), "bias"}
    empty = QuantLinear(layer.layer_spec, bias=True, device="meta" if assign else "cpu")
    empty.load_state_dict(copy.deepcopy(state), assign=assign)
    x = inputs(5, WIDTH)
    assert torch.equal(empty(x), layer(x))
    for key, tensor in empty.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), state[key].view(torch.uint8))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", EACH_KIND)
def test_loading_another_weight_after_a_call(name: str, assign: bool):
    """Nothing of the old weight may stay behind."""
    x = inputs(5, WIDTH)
    old, new = layer_of(random_qtensor(name, seed=0), 8), layer_of(random_qtensor(name, seed=1), 8)
    expected = layer_of(random_qtensor(name, seed=1), 8)(x)
    assert not torch.equal(old(x), expected)
    old.load_state_dict(new.state_dict(), assign=assign)
    assert torch.equal(old(x), expected)


@pytest.mark.parametrize("name", EACH_KIND)
def test_call_of_a_copy(name: str):
    layer, x = layer_of(random_qtensor(name), 8, rotated=True, bias=True), inputs(5, WIDTH)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(layer(x), expected)  # again, from what the first call kept


def test_what_a_call_keeps_can_be_switched_off():
    layer, x = layer_of(random_qtensor("int4"), 8), inputs(5, WIDTH)
    layer.cache_decoded = False
    assert torch.equal(layer(x), layer(x))
    assert layer.decoded() is not layer.decoded()
    layer.cache_decoded = True
    assert layer.decoded() is layer.decoded()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", EACH_KIND)
def test_a_cast_keeps_what_is_stored(name: str, dtype: torch.dtype):
    """Of the tensors only the bias follows the model's dtype; casting back and forth changes no stored byte."""
    layer = layer_of(random_qtensor(name), 8, rotated=True, bias=True)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    model = nn.Sequential(layer).to(dtype)
    for key, tensor in before.items():
        after = model[0].state_dict()[key]
        assert after.dtype == (dtype if key == "bias" else tensor.dtype), key
        if key != "bias":
            assert torch.equal(after.view(torch.uint8), tensor.view(torch.uint8)), key
    model.float()
    for key, tensor in model[0].state_dict().items():
        assert tensor.dtype == before[key].dtype, key


@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("name", EACH_KIND)
def test_call_after_a_cast(name: str, activation_bits: int):
    layer = layer_of(random_qtensor(name), activation_bits, rotated=True, bias=True)
    layer(inputs(5, WIDTH))
    layer.to(torch.float16)
    assert_is_by_hand(layer, inputs(5, WIDTH, dtype=torch.float16))


@pytest.mark.parametrize(
    ("name", "rotated", "expected"),
    [
        # code bits, 32 / in for the scale, 16 / 32 for the integers of a group, 8 / out for the signs of a rotation.
        ("int4", False, 4 + 32 / 96 + 16 / 32),
        ("int4", True, 4 + 32 / 96 + 16 / 32 + 8 / 20),
        ("int8", False, 8 + 32 / 96),
        ("fp8_e4m3", True, 8 + 32 / 96 + 8 / 20),
        ("table3", False, 3 + 32 / 96 + 8 * 8 / (20 * 96)),
        ("vq256x4", False, 2 + 32 / 96 + 256 * 4 * 8 / (20 * 96)),
    ],
)
def test_bits_per_weight(name: str, rotated: bool, expected: float):
    for bias in (False, True):  # which does not count
        assert weight_bits(layer_of(random_qtensor(name), rotated=rotated, bias=bias)) == pytest.approx(expected, rel=1e-12)


def test_bits_per_weight_count_a_byte_for_each_smoothed_channel():
    q = random_qtensor("int8")
    t = transform.smooth(Transform(), torch.linspace(0.1, 7, WIDTH))
    spec = LayerSpec(q.spec, smoothed=True)
    layer = QuantLinear.from_tensors(spec, q.tensors() | transform.tensors(t), None)
    assert weight_bits(layer) == pytest.approx(8 + 32 / 96 + 8 / 20, rel=1e-12)
    assert 8 * stored_bytes(spec) / (20 * 96) == weight_bits(layer)


def test_the_bias_is_a_copy():
    bias = nn.Parameter(random_bias())
    q = random_qtensor("int4")
    layer = QuantLinear.from_tensors(LayerSpec(q.spec, ActivationSpec(8)), q.tensors(), bias)
    with torch.no_grad():
        bias.zero_()
    assert torch.equal(layer.bias, random_bias())


def test_a_wrong_width_is_refused():
    for activation_bits in (16, 8):
        with pytest.raises(RuntimeError):
            layer_of(random_qtensor("int4"), activation_bits)(torch.zeros(5, WIDTH + 1))


def stepped_layer(seed: int) -> QuantLinear:
    """A layer of an outlier rotation stored as its steps."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, 32, (2, 2, WIDTH // 32), generator=generator, dtype=torch.uint8)
    permutation = torch.randperm(WIDTH, generator=generator).int()
    q = random_qtensor("int8", seed=seed)
    spec = LayerSpec(q.spec, ActivationSpec(8), "outlier", 32, steps=2)
    return QuantLinear.from_tensors(
        spec, q.tensors() | {"steps1": steps[0], "steps2": steps[1], "permutation": permutation}, random_bias()
    )


def test_rotations_made_of_steps_are_no_part_of_the_state_and_follow_it():
    layer, other = stepped_layer(0), stepped_layer(1)
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2))
    y, expected = layer(x), other(x)
    assert layer.state_dict().keys() == {"data", "scale", "steps1", "steps2", "permutation", "bias"}
    for assign in (False, True):
        fresh = stepped_layer(0)
        assert torch.equal(fresh(x), y)
        fresh.load_state_dict({key: tensor.clone() for key, tensor in other.state_dict().items()}, assign=assign)
        assert torch.equal(fresh(x), expected)
    moved = copy.deepcopy(layer).to(torch.bfloat16)
    assert moved.transform.rotation1.dtype == torch.float32 and torch.equal(moved.transform.rotation1, layer.transform.rotation1)


def test_a_layer_of_steps_on_the_meta_device():
    layer = stepped_layer(0)
    empty = QuantLinear(layer.layer_spec, True, device="meta")
    assert empty(torch.empty(3, WIDTH, device="meta")).shape == (3, OUT)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(inputs(3, WIDTH)), layer(inputs(3, WIDTH)))
    with pytest.raises(RuntimeError, match="meta"):
        QuantLinear(layer.layer_spec, True, device="meta")(inputs(3, WIDTH))
