"""Every op of torch.ops.quantdit: opcheck, agreement with a dense product, the properties of token quantization, refusals."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from quantdit.formats import FORMATS, QSpec
from quantdit.hadamard import random_sign, rotate
from quantdit.kernels import ops
from quantdit.qtensor import spec_fields

QUANTDIT = torch.ops.quantdit
U32 = 2.0**-24  # unit roundoff of float32
OUTPUT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # unit roundoff of each output dtype


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_int8(*shape: int, seed: int = 0, low: int = -127) -> torch.Tensor:
    return torch.randint(low, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def stored_weight(name: str, rows: int, width: int, group: int, codebook_rows: int = 1) -> tuple:
    """The arguments of `decode8` for random codes and values that keep inside int8."""
    f = FORMATS[name]
    spec = QSpec(name, rows, width, group, codebook_rows)
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(f.levels, (rows, width // f.dim), generator=generator).to(torch.uint8)
    if name == "fp8_e4m3":
        codes[codes % 128 == 127] = 0
    tensors = dict.fromkeys(("multiplier", "offset", "codebook"))
    for key, field in spec_fields(spec).items():
        if key in tensors:
            low, high = {"multiplier": (0, 127 // f.levels + 1), "offset": (-128, 1), "codebook": (-128, 128)}[key]
            tensors[key] = torch.randint(low, high, field.shape, generator=generator).to(field.dtype)
    return f.pack(f, codes), *tensors.values(), name, width, group


def opcheck_samples() -> dict[str, list[tuple]]:
    """Arguments of every op: each dtype and optional argument at least once, strides that are not the contiguous ones."""
    codes, weight, scale, token_scale = random_int8(5, 24), random_int8(7, 24, seed=1), random(7).abs(), random(5).abs()
    fp8 = random(7, 24, seed=2).to(torch.float8_e4m3fn)
    return {
        "rotate": [
            (random(3, 24), random_sign(24, 0), 8),
            (random(4, 2, 24).transpose(0, 1).half(), random_sign(24, 0), 4),
        ],
        "quantize_tokens": [(random(3, 24), 8), (random(3, 24).bfloat16(), 4), (random(24, 3).T, 8)],
        "decode8": [stored_weight(name, 5, 48, 16) for name in FORMATS] + [stored_weight("table4", 5, 48, 48, codebook_rows=5)],
        "gemm_w8a8": [
            (codes, token_scale, weight, scale, random(7), torch.float32),
            (codes, token_scale, weight, scale, None, torch.bfloat16),
            (codes, token_scale, fp8, scale, random(7).half(), torch.float16),
            (random_int8(24, 5).T, token_scale, random_int8(24, 7).T, scale, None, torch.float32),
        ],
        "gemm_w8a16": [
            (random(5, 24), weight, scale, random(7)),
            (random(5, 24).half(), weight, scale, None),
            (random(24, 5).T, fp8, scale, random(7)),
        ],
    }


def test_every_op_has_an_opcheck():
    defined = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("quantdit::")}
    assert defined == set(opcheck_samples())


@pytest.mark.parametrize(("op", "sample"), [(op, i) for op, samples in opcheck_samples().items() for i in range(len(samples))])
def test_opcheck(op: str, sample: int):
    """Schema, fake and real implementation agree, aliasing and strides included; tracing gives the same values."""
    arguments = opcheck_samples()[op][sample]
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if any(isinstance(a, torch.Tensor) and a.dtype == torch.float8_e4m3fn for a in arguments):
        tests.remove("test_schema")  # it compares tensors in a way that torch lacks for float8; the next test stands in
    torch.library.opcheck(getattr(QUANTDIT, op).default, arguments, test_utils=tests)


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3"])
def test_decode8_neither_returns_nor_changes_what_is_stored(name: str):
    """The two formats whose stored data already is I."""
    data, *rest = stored_weight(name, 5, 48, 16)
    before = data.view(torch.uint8).clone()
    decoded = QUANTDIT.decode8(data, *rest)
    assert torch.equal(decoded.view(torch.uint8), before)
    decoded.view(torch.uint8).zero_()
    assert torch.equal(data.view(torch.uint8), before)


REFUSED = {
    "rotate, one sign for all": ("rotate", (random(3, 8), torch.ones(1, dtype=torch.int8), 4)),
    "rotate, block that does not divide": ("rotate", (random(3, 12), random_sign(12, 0), 8)),
    "quantize_tokens, 1 bit": ("quantize_tokens", (random(3, 8), 1)),
    "quantize_tokens, 9 bits": ("quantize_tokens", (random(3, 8), 9)),
    "quantize_tokens, 3-D": ("quantize_tokens", (random(3, 8, 4), 8)),
    "decode8, unknown format": ("decode8", (torch.zeros(3, 8, dtype=torch.uint8), None, None, None, "int5", 16, 16)),
    "gemm_w8a8, float codes": ("gemm_w8a8", (random(5, 8), torch.ones(5), random_int8(7, 8), torch.ones(7), None, torch.float32)),
    "gemm_w8a8, uint8 codes": (
        "gemm_w8a8",
        (random_int8(5, 8).view(torch.uint8), torch.ones(5), random_int8(7, 8) // 2, torch.ones(7), None, torch.float32),
    ),
    "gemm_w8a8, one token_scale for all": (
        "gemm_w8a8",
        (random_int8(5, 8), torch.ones(1), random_int8(7, 8), torch.ones(7), None, torch.float32),
    ),
    "gemm_w8a8, one scale for all": (
        "gemm_w8a8",
        (random_int8(5, 8), torch.ones(5), random_int8(7, 8), torch.ones(1), None, torch.float32),
    ),
    "gemm_w8a8, another k": (
        "gemm_w8a8",
        (random_int8(5, 8), torch.ones(5), random_int8(7, 12), torch.ones(7), None, torch.float32),
    ),
    "gemm_w8a16, one scale for all": ("gemm_w8a16", (random(5, 8), random_int8(7, 8), torch.ones(1), None)),
    "gemm_w8a16, another k": ("gemm_w8a16", (random(5, 8), random_int8(7, 12), torch.ones(7), None)),
    "gemm_w8a16, 3-D": ("gemm_w8a16", (random(2, 5, 8), random_int8(7, 8), torch.ones(7), None)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_fake_refuses(case: str):
    op, arguments = REFUSED[case]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        with pytest.raises(RuntimeError, match=op):
            getattr(QUANTDIT, op)(*fakes)


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_fake_refuses_the_op_refuses(case: str):
    """Otherwise eager code computes something silently and fails only once it is compiled."""
    op, arguments = REFUSED[case]
    with pytest.raises((RuntimeError, ValueError, KeyError)):
        getattr(QUANTDIT, op)(*arguments)


def test_rotate_is_that_of_hadamard():
    x, sign = random(2, 3, 48), random_sign(48, 1)
    assert torch.equal(QUANTDIT.rotate(x, sign, 16), rotate(x, sign, 16))


@pytest.mark.parametrize("name", FORMATS)
def test_decode8_is_that_of_the_format(name: str):
    f = FORMATS[name]
    data, multiplier, offset, codebook, *rest = stored_weight(name, 5, 96, 32)
    stored = {"data": data, "multiplier": multiplier, "offset": offset, "codebook": codebook}
    expected = f.decode8(f, QSpec(name, 5, 96, 32), stored)
    decoded = QUANTDIT.decode8(data, multiplier, offset, codebook, *rest)
    assert decoded.dtype == expected.dtype
    assert torch.equal(decoded.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantized_tokens_are_within_half_a_step(bits: int, dtype: torch.dtype):
    """Rounding x / scale is off by 1/2, the division by 2^(bits - 1) u before that, and nothing else is rounded."""
    top = 2 ** (bits - 1) - 1
    x = (random(64, 96) * torch.logspace(-3, 3, 64)[:, None]).to(dtype)
    codes, scale = QUANTDIT.quantize_tokens(x, bits)
    assert (codes.dtype, codes.shape) == (torch.int8, x.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, (64,))
    steps = (x.double() / scale.double()[:, None] - codes.double()).abs()
    assert float(steps.max()) <= 0.5 + (top + 1) * U32
    assert torch.equal(codes.abs().amax(dim=1), torch.full((64,), top, dtype=torch.int8))  # the whole range is used
    assert bool((scale * top - x.float().abs().amax(dim=1)).abs().le(2 * U32 * scale * top).all())


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_quantize_tokens_rounds_ties_to_even(bits: int):
    """The largest entry is the largest code, so the scale is 1 exactly and the codes are the rounded entries."""
    top = 2 ** (bits - 1) - 1
    halves = torch.arange(-2 * top, 2 * top + 1) / 2
    codes, scale = QUANTDIT.quantize_tokens(halves[None].float(), bits)
    assert scale.tolist() == [1.0]
    assert codes[0].tolist() == [round(value) for value in halves.tolist()]  # Python's round is to even too


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_quantize_tokens_is_odd_and_scales_with_powers_of_two(bits: int):
    x = random(16, 40)
    codes, scale = QUANTDIT.quantize_tokens(x, bits)
    negated, same = QUANTDIT.quantize_tokens(-x, bits)
    assert torch.equal(negated, -codes)
    assert torch.equal(same, scale)
    again, larger = QUANTDIT.quantize_tokens(x * 64, bits)
    assert torch.equal(again, codes)
    assert torch.equal(larger, scale * 64)


def test_a_token_of_zeros_has_scale_zero_and_leaves_its_neighbours_alone():
    x = random(3, 16)
    x[1] = 0
    codes, scale = QUANTDIT.quantize_tokens(x, 8)
    assert scale[1] == 0
    assert torch.equal(codes[1], torch.zeros(16, dtype=torch.int8))
    alone, alone_scale = QUANTDIT.quantize_tokens(x[::2], 8)
    assert torch.equal(codes[::2], alone)
    assert torch.equal(scale[::2], alone_scale)


def test_an_outlier_zeroes_only_its_own_token():
    x = torch.ones(2, 8)
    x[0, 3] = 1e6
    codes, scale = QUANTDIT.quantize_tokens(x, 8)
    assert codes.tolist() == [[0, 0, 0, 127, 0, 0, 0, 0], [127] * 8]
    assert scale.tolist() == pytest.approx([1e6 / 127, 1 / 127], rel=2 * U32)


def dense_product(a: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`a (scale I)^T` in float64 and the sum of the magnitudes of its terms, by which rounding is bounded."""
    dense = weight.to(torch.float32).double() * scale.double()[:, None]
    return a.double() @ dense.T, a.double().abs() @ dense.abs().T


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", OUTPUT)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (1, 7, 33), (5, 16, 64), (33, 40, 100), (64, 9, 1100)])
def test_reference_gemm_w8a8_is_the_dense_product(m: int, n: int, k: int, dtype: torch.dtype, bias: bool):
    """The sum is exact; it, the two scalings and the bias are rounded to float32, the result to dtype: 4 roundings and 1."""
    codes, weight = random_int8(m, k), random_int8(n, k, seed=1, low=-128)
    token_scale, scale, b = random(m).abs() / 100, random(n).abs() / 100, random(n) if bias else None
    product, _ = dense_product(codes * token_scale.double()[:, None], weight, scale)
    y = ops.gemm_w8a8_reference(codes, token_scale, weight, scale, b, dtype)
    assert (y.dtype, y.shape) == (dtype, (m, n))
    expected = product if b is None else product + b.double()
    # Rounding to float16 below its smallest normal number, 2^-14, is off by half of 2^-24.
    bound = 5 * U32 * (product.abs() + expected.abs()) + OUTPUT[dtype] * expected.abs() + 2.0**-25
    assert bool(((y.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", OUTPUT)
@pytest.mark.parametrize("bias", [False, True])
def test_gemm_w8a16_is_the_dense_product(fp8: bool, dtype: torch.dtype, bias: bool):
    """Weights, bias and result are rounded to dtype, the k products are summed in float32 or better."""
    m, n, k = 9, 12, 136
    x = random(m, k).to(dtype)
    weight = random(n, k, seed=1).mul(50).to(torch.float8_e4m3fn) if fp8 else random_int8(n, k, seed=1, low=-128)
    scale, b = random(n, seed=2).abs() / 100, random(n, seed=3) if bias else None
    product, magnitude = dense_product(x, weight, scale)
    y = QUANTDIT.gemm_w8a16(x, weight, scale, b)
    assert (y.dtype, y.shape) == (dtype, (m, n))
    expected = product if b is None else product + b.double()
    u = OUTPUT[dtype]
    magnitude = magnitude if b is None else magnitude + b.double().abs()
    bound = (2 * u + k * U32) * magnitude + 2 * u * expected.abs()
    assert bool(((y.double() - expected).abs() <= bound).all())


def test_gemm_w8a16_in_float16_does_not_overflow_on_the_way():
    """The product x I^T alone is 300 * 127 * 64 = 2.4e6, beyond float16; scaled it is 244."""
    x = torch.full((2, 64), 300.0, dtype=torch.float16)
    y = QUANTDIT.gemm_w8a16(x, torch.full((3, 64), 127, dtype=torch.int8), torch.full((3,), 1e-4), None)
    expected = 300 * 127e-4 * 64
    # 1e-4 * 127 and the result are rounded to float16.
    assert y.float().flatten().tolist() == pytest.approx([expected] * 6, rel=3 * 2.0**-11)
