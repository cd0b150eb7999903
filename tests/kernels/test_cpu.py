"""The int8 product on the CPU: exact for the weights that saturate a 16-bit pair sum, whatever the machine.

`expected` sums in int64 and rounds once to float32. The product may be scaled in float32 afterwards, so comparisons with a scale
of 1 are for equality.
"""

from __future__ import annotations

import pytest
import torch

from quantdit.kernels import cpu
from quantdit.kernels.ops import Epilogue, gemm_w8a8_reference
from quantdit.kernels.schema import flat

U32 = 2.0**-24  # unit roundoff of float32


def random_codes(m: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-127, 128, (m, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def extreme_codes(m: int, k: int) -> torch.Tensor:
    """Rows of random codes, and rows that are all 127, all -127, alternating, and zero."""
    codes = random_codes(max(m, 5), k)
    codes[0], codes[1], codes[2], codes[3] = 127, -127, 127, 0
    codes[2, 1::2] = -127
    return codes[:m]


def weight_rows(k: int) -> dict[str, torch.Tensor]:
    """Adversarial rows `[k]` by name; those named `safe` never overflow 16 bits, by the docstring of cpu.py."""

    def pairs(even: int, odd: int) -> torch.Tensor:
        row = torch.full((k,), even, dtype=torch.int8)
        row[1::2] = odd
        return row

    spike = torch.zeros(k, dtype=torch.int8)
    spike[-1] = 127
    late = pairs(64, 64)
    late[k - 2 :] = 127  # one pair beyond the limit, the last
    return {
        "safe zero": pairs(0, 0),
        "safe pairs of 128": pairs(64, 64),
        "safe pairs of 127 + 1": pairs(127, 1),
        "safe pairs of -128": pairs(-64, -64),
        "safe -128 alone": pairs(-128, 0),
        "safe alternating": pairs(127, -127),
        "safe alternating, -128": pairs(-128, 127),
        "safe last only": spike,
        "pairs of 129": pairs(65, 64),
        "pairs of 127 + 2": pairs(127, 2),
        "pairs of -129": pairs(-65, -64),
        "pairs of -128 - 1": pairs(-128, -1),
        "last pair": late,
        "all 127": pairs(127, 127),
        "all -128": pairs(-128, -128),
    }


def expected(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (codes.long() @ weight.long().T).to(torch.float32)


def product(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return cpu.scaled_int8_product(codes, weight, torch.ones(len(weight)))


@pytest.mark.parametrize("k", [2, 64, 65, 100, 1000])
def test_unsafe_rows_are_those_whose_pairs_exceed_128(k: int):
    """The last two weights are one pair only if k is even; if k is odd, that row has no pair beyond the limit."""
    rows = weight_rows(k)
    names = [name for name in rows if name != "last pair" or k % 2 == 0]
    unsafe = cpu.unsafe_rows(torch.stack([rows[name] for name in names]))
    assert dict(zip(names, unsafe.tolist(), strict=True)) == {name: not name.startswith("safe") for name in names}


def test_the_pair_limit_is_what_fits_16_bits():
    assert 255 * cpu.PAIR_LIMIT < 2**15 <= 255 * (cpu.PAIR_LIMIT + 1)


@pytest.mark.parametrize("name", weight_rows(2))
def test_sums_are_exact(name: str):
    """A weight of eight equal rows, so that all of them go one way; m of 1 and more."""
    for k in (2, 64, 65, 1000):
        weight = weight_rows(k)[name].repeat(8, 1)
        codes = extreme_codes(9, k)
        for m in (1, 2, 9):
            assert torch.equal(product(codes[:m], weight), expected(codes[:m], weight)), (k, m)


@pytest.mark.parametrize("k", [1, 3, 7, 33, 63, 129, 1023])
@pytest.mark.parametrize("limit", [64, 128])
def test_odd_widths(k: int, limit: int):
    """With |w| <= 64 every row is safe, with |w| <= 128 almost none is."""
    weight = torch.randint(-limit, min(limit + 1, 128), (17, k), generator=torch.Generator().manual_seed(k), dtype=torch.int8)
    codes = random_codes(6, k)
    assert torch.equal(product(codes, weight), expected(codes, weight))


@pytest.mark.parametrize("k", [4097, 5000, 8192, 12288])
@pytest.mark.parametrize("value", [64, 127, -128])
def test_wide_layers(k: int, value: int):
    """Sums beyond 2^24, and sums that are small although their partial sums and zero-point corrections are beyond it."""
    weight = torch.full((9, k), value, dtype=torch.int8)
    weight[1, ::2] -= 1
    codes = extreme_codes(7, k)
    codes[4] = 127
    codes[4, k // 2 :] = -127  # cancels up to the last element
    codes[5] = 1
    sums = expected(codes, weight)
    assert float(sums.abs().max()) > 2**24
    assert float(sums[4].abs().min()) < 2**24
    assert torch.equal(product(codes, weight), sums)


@pytest.mark.parametrize("k", [1, cpu.EXACT_K - 1, cpu.EXACT_K, cpu.EXACT_K + 1, 2 * cpu.EXACT_K, 5000])
def test_exact_float_product(k: int):
    """The chunks are as long as float32 allows: EXACT_K products of 127 and -128 reach 2^24 and no more."""
    weight = torch.stack([torch.full((k,), -128), torch.full((k,), 127), random_codes(1, k)[0].int()]).to(torch.int8)
    codes = extreme_codes(6, k)
    codes[4] = 127
    codes[4, -1] = 1  # odd sums
    assert torch.equal(cpu.exact_float_product(codes, weight.float()), expected(codes, weight))
    assert cpu.EXACT_K * 127 * 128 <= 2**24


@pytest.mark.parametrize("unsafe", [0, 1, 4, 5, 16])
@pytest.mark.parametrize("m", [1, 33])
def test_safe_and_unsafe_rows_mixed(unsafe: int, m: int):
    """Around a quarter of the 16 rows the way of the whole product changes; each row keeps its place and its scale."""
    k = 200
    weight = torch.randint(-64, 65, (16, k), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    rows = torch.randperm(16, generator=torch.Generator().manual_seed(2))[:unsafe]
    weight[rows] = torch.where(weight[rows] >= 0, 127, -128).to(torch.int8)
    assert int(cpu.unsafe_rows(weight).sum()) == unsafe
    codes = extreme_codes(m, k)
    assert torch.equal(product(codes, weight), expected(codes, weight))
    scale = 2.0 ** torch.arange(-8.0, 8.0)  # powers of two: scaling stays exact
    assert torch.equal(cpu.scaled_int8_product(codes, weight, scale), expected(codes, weight) * scale)


@pytest.mark.parametrize("safe_first", [True, False])
def test_a_change_of_the_weight_in_place_is_noticed(safe_first: bool):
    codes = random_codes(4, 64)
    safe, unsafe = torch.full((8, 64), 3, dtype=torch.int8), torch.full((8, 64), 127, dtype=torch.int8)
    first, second = (safe, unsafe) if safe_first else (unsafe, safe)
    weight = first.clone()
    assert torch.equal(product(codes, weight), expected(codes, first))
    weight.copy_(second)
    assert torch.equal(product(codes, weight), expected(codes, second))
    weight[3, 5] = 77
    assert torch.equal(product(codes, weight), expected(codes, weight))
    weight.t()[6, 0] = -99  # through a view
    assert torch.equal(product(codes, weight), expected(codes, weight))


def test_another_scale_for_the_same_weight():
    """What is kept between calls belongs to the weight alone."""
    codes, weight = random_codes(4, 64), random_codes(8, 64, seed=1)
    for value in (1.0, 0.5, 4.0):
        scaled = cpu.scaled_int8_product(codes, weight, torch.full((8,), value))
        assert torch.equal(scaled, expected(codes, weight) * value)


@pytest.mark.parametrize("limit", [60, 127])
def test_strides_that_are_not_contiguous(limit: int):
    weight = torch.randint(-limit, limit + 1, (64, 24), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    codes = random_codes(64, 5)
    assert torch.equal(product(codes.T, weight.T), expected(codes.T, weight.T))
    wide = random_codes(5, 128)
    assert torch.equal(product(wide[:, ::2], weight.T), expected(wide[:, ::2], weight.T))


def test_operands_are_left_alone():
    codes, weight, scale = random_codes(4, 64), random_codes(8, 64, seed=1) // 2, torch.rand(8)
    copies = codes.clone(), weight.clone(), scale.clone()
    cpu.scaled_int8_product(codes, weight, scale)
    assert all(torch.equal(a, b) for a, b in zip((codes, weight, scale), copies, strict=True))


@pytest.mark.parametrize("m", [0, 1, 5])
@pytest.mark.parametrize("limit", [60, 127])
def test_a_weight_made_in_inference_mode(m: int, limit: int):
    """Decoding and multiplying under torch.inference_mode, as a user does who samples images."""
    codes = random_codes(m, 64)
    with torch.inference_mode():
        weight = torch.randint(-limit, limit + 1, (8, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
        result = product(codes, weight)
    assert torch.equal(result, expected(codes, weight))


def test_no_tokens():
    assert product(random_codes(0, 64), random_codes(8, 64) // 2).shape == (0, 8)
    assert product(random_codes(0, 64), random_codes(8, 64)).shape == (0, 8)


@pytest.mark.parametrize("limit", [64, 127])
@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, True), (torch.float16, False), (torch.bfloat16, True)])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 7, 33), (33, 40, 300), (40, 24, 4100)])
def test_gemm_w8a8_is_the_reference(m: int, n: int, k: int, dtype: torch.dtype, bias: bool, limit: int):
    """The integer sums are equal; each way rounds sum, two scalings and bias to float32 (4 u each) and the result to dtype.

    Hence 8 roundings of float32 between the two, relative to the product or, for the last, to the result, which is below
    product + bias; and in a narrow dtype the neighbouring number, 2 u of it.
    """
    generator = torch.Generator().manual_seed(k)
    codes = extreme_codes(m, k)
    weight = torch.randint(-limit, limit + 1, (n, k), generator=generator, dtype=torch.int8)
    token_scale, scale = torch.rand(m, generator=generator) / 50, torch.rand(n, generator=generator) / 500
    b = torch.randn(n, generator=generator) if bias else None
    after = Epilogue(dtype, token_scale, b)
    y = torch.ops.quantdit.gemm_w8a8(codes, weight, scale, *flat(after))
    reference = gemm_w8a8_reference(codes, weight, scale, after)
    assert (y.dtype, y.shape) == (dtype, (m, n))
    magnitude = gemm_w8a8_reference(codes, weight, scale, Epilogue(torch.float32, token_scale)).double().abs()
    magnitude = magnitude + (0 if b is None else b.double().abs())
    narrow = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    bound = 8 * U32 * magnitude + narrow * reference.double().abs()
    assert bool(((y.double() - reference.double()).abs() <= bound).all())


def test_gemm_w8a8_with_fp8_weights_is_the_reference():
    """Here the sum is one of float32: off by k u of the sum of magnitudes."""
    k = 300
    codes = extreme_codes(6, k)
    weight = (torch.randn(9, k, generator=torch.Generator().manual_seed(0)) * 100).to(torch.float8_e4m3fn)
    after = Epilogue(torch.float32, torch.ones(6))
    y = torch.ops.quantdit.gemm_w8a8(codes, weight, torch.ones(9), *flat(after))
    reference = gemm_w8a8_reference(codes, weight, torch.ones(9), after)
    bound = k * U32 * (codes.double().abs() @ weight.float().double().abs().T)
    assert bool(((y.double() - reference.double()).abs() <= bound).all())
