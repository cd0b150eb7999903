"""gemm_w8a8_kernel: integer sums and the float32 roundings after them are those of the definition, to the bit."""

from __future__ import annotations

import pytest
import torch

from quantdit.kernels import ops
from quantdit.kernels.ops import Epilogue
from quantdit.kernels.triton_ops.gemm_w8a8 import CONFIGS, candidates, gemm_w8a8
from quantdit.kernels.triton_ops.tuning import Config

TILE = Config(32, 64, 64, 4, 2)
E4M3 = torch.float8_e4m3fn


def operands(m: int, n: int, k: int, codes: torch.dtype, weight: torch.dtype) -> tuple:
    """Codes, decoded weight and its scale, and scales of the tokens."""
    g = torch.Generator().manual_seed(m + n + k)

    def integers(rows: int, dtype: torch.dtype) -> torch.Tensor:
        if dtype == torch.int8:
            return torch.randint(-128, 128, (rows, k), generator=g).to(dtype)
        return (torch.randn(rows, k, generator=g) * 50).to(dtype)

    x, token_scale = integers(m, codes), torch.rand(m, generator=g) / 50
    return x, integers(n, weight), torch.rand(n, generator=g) / 50, token_scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 24, 44), (63, 130, 320), (64, 64, 256)])
def test_int8_is_exact(m: int, n: int, k: int, dtype: torch.dtype):
    o = operands(m, n, k, torch.int8, torch.int8)
    bias = torch.randn(n)
    for b in (bias, bias.bfloat16(), None):
        y = gemm_w8a8(*o[:3], Epilogue(dtype, o[3], b), capability=90, config=TILE)
        assert torch.equal(y, ops.gemm_w8a8_reference(*o[:3], Epilogue(dtype, o[3], b)))


def test_many_tiles_are_each_stored_once():
    """More than eight rows of tiles: the order of programs wraps."""
    o = operands(500, 70, 32, torch.int8, torch.int8)
    y = gemm_w8a8(*o[:3], Epilogue(torch.float32, o[3]), capability=80, config=Config(32, 32, 32, 4, 2))
    assert torch.equal(y, ops.gemm_w8a8_reference(*o[:3], Epilogue(torch.float32, o[3])))


@pytest.mark.parametrize("codes", [E4M3, torch.int8])
def test_e4m3_weights(codes: torch.dtype):
    """Products are exact, sums are float32's: off by k u of the sum of magnitudes."""
    m, n, k = 33, 40, 160
    o = operands(m, n, k, codes, E4M3)
    y = gemm_w8a8(*o[:3], Epilogue(torch.float32, o[3]), capability=90, config=TILE)
    expected = ops.gemm_w8a8_reference(*o[:3], Epilogue(torch.float32, o[3]))
    magnitude = o[3].double()[:, None] * o[2].double() * (o[0].double().abs() @ o[1].double().abs().T)
    assert bool(((y.double() - expected.double()).abs() <= k * 2.0**-24 * magnitude).all())


@pytest.mark.parametrize("capability", sorted(CONFIGS))
def test_the_tiles_that_are_shipped(capability: int):
    """With m of a few tokens and of a tile; the first candidate is what runs untuned."""
    for m in (2, 100):
        o = operands(m, 130, 192, torch.int8, torch.int8)
        expected = ops.gemm_w8a8_reference(*o[:3], Epilogue(torch.float32, o[3]))
        assert torch.equal(gemm_w8a8(*o[:3], Epilogue(torch.float32, o[3]), capability=capability), expected)
        first = candidates(CONFIGS, capability, m)[0]
        assert m <= first.bm < 16 * m + 32


@pytest.mark.parametrize("rank", [0, 4, 40])
def test_what_follows_the_product(rank: int):
    """Low-rank branch in float32, to a few of its roundings."""
    m, n, k = 42, 70, 64
    o = operands(m, n, k, torch.int8, torch.int8)
    g = torch.Generator().manual_seed(0)
    low = (torch.randn(m, rank, generator=g), torch.randn(n, rank, generator=g).bfloat16()) if rank else (None, None)
    after = Epilogue(torch.float32, o[3], torch.randn(n, generator=g), *low)
    y = gemm_w8a8(*o[:3], after, capability=90, config=TILE)
    expected = ops.gemm_w8a8_reference(*o[:3], after)
    assert torch.allclose(y, expected, rtol=1e-5, atol=2e-4 * float(expected.abs().max()) * 2**-6)
    assert not torch.equal(expected, ops.gemm_w8a8_reference(*o[:3], Epilogue(torch.float32, o[3])))


def test_no_tokens():
    o = operands(0, 24, 32, torch.int8, torch.int8)
    assert gemm_w8a8(*o[:3], Epilogue(torch.float32, o[3]), capability=90).shape == (0, 24)
