"""gemm_packed_kernel and sum_splits_kernel: every stored format, decoded in registers, by inline PTX and in plain Triton."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quantdit.formats import FORMATS
from quantdit.kernels import ops
from quantdit.kernels.ops import Epilogue
from quantdit.kernels.triton_ops.gemm_packed import CONFIGS_A8, CONFIGS_A16, gemm_packed
from quantdit.kernels.triton_ops.tuning import Config

TILE = Config(32, 32, 128, 4, 2)
SPLIT = Config(16, 32, 128, 4, 2, 3)


def codes(m: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(m + k)
    x = torch.randint(-128, 128, (m, k), generator=g).to(torch.int8)
    return x, torch.rand(m, generator=g) / 50


CASES = [
    ("int4", 256, 1),
    ("int4", 128, 1),
    ("int4", 64, 1),
    ("int4", 32, 1),
    ("table4", 256, 1),
    ("table4", 256, 40),
    ("int2", 32, 1),
    ("int3", 64, 1),
    ("int6", 256, 1),
    ("table2", 256, 1),
    ("table3", 256, 40),
    ("table6", 256, 1),
    ("vq256x4", 256, 1),
    ("vq64x2", 256, 1),
    ("vq256x2", 256, 1),
    ("vq256x8", 256, 1),
    ("ssvq256x8", 256, 1),
    ("ssvq256x4", 256, 1),
]


# How a format is decoded does not depend on how k is split: one of each kind is tried both ways.
KINDS = (("int4", 64, 1), ("table3", 256, 40), ("vq256x8", 256, 1), ("ssvq256x8", 256, 1))
EXACT = [(*case, True, TILE) for case in CASES] + [(*case, False, TILE) for case in KINDS]
EXACT += [(*case, True, SPLIT) for case in KINDS]


@pytest.mark.parametrize(("name", "group", "rows", "asm", "config"), EXACT)
def test_a8_is_exact(name: str, group: int, rows: int, asm: bool, config: Config, weight: Callable):
    m, n, k = 19, 40, 256
    q = weight(name, n, k, group, rows)
    x, token_scale = codes(m, k)
    bias = torch.randn(n)
    y = gemm_packed(x, q, Epilogue(torch.float32, token_scale, bias), capability=90, config=config, asm=asm)
    assert torch.equal(y, ops.gemm_packed_a8_reference(x, q, Epilogue(torch.float32, token_scale, bias)))


@pytest.mark.parametrize(
    ("name", "k"),
    [("int4", 44), ("int4", 320), ("table4", 300), ("table3", 192), ("vq64x2", 352), ("ssvq256x4", 352), ("int8", 176)],
)
@pytest.mark.parametrize(("config", "m"), [(TILE, 63), (SPLIT, 1)], ids=["whole", "split"])
def test_ragged_sizes(name: str, k: int, config: Config, m: int, weight: Callable):
    q = weight(name, 45, k)
    x, token_scale = codes(m, k)
    y = gemm_packed(x, q, Epilogue(torch.float32, token_scale), capability=80, config=config)
    assert torch.equal(y, ops.gemm_packed_a8_reference(x, q, Epilogue(torch.float32, token_scale)))


@pytest.mark.parametrize("name", ["table4_e4m3", "table3_e4m3", "fp8_e4m3"])
def test_e4m3_weights(name: str, weight: Callable):
    m, n, k = 20, 33, 256
    q = weight(name, n, k)
    x, token_scale = codes(m, k)
    y = gemm_packed(x, q, Epilogue(torch.float32, token_scale), capability=90, config=TILE)
    expected = ops.gemm_packed_a8_reference(x, q, Epilogue(torch.float32, token_scale))
    magnitude = token_scale.double()[:, None] * q.scale.double() * (x.double().abs() @ q.decode8().double().abs().T)
    assert bool(((y.double() - expected.double()).abs() <= k * 2.0**-24 * magnitude).all())


# test_a16_by_ptx_and_in_plain_triton has the others in float16.
WIDE = [(name, torch.bfloat16) for name, f in FORMATS.items() if not f.state_bits]
WIDE += [(name, torch.float16) for name in ("int8", "fp8_e4m3", "table4_e4m3", "table3_e4m3")]


@pytest.mark.parametrize(("name", "dtype"), WIDE)
def test_a16(name: str, dtype: torch.dtype, weight: Callable):
    """`I` is exact in 16 bits: products are exact, sums float32's, the result rounded once."""
    m, n, k = 3, 37, 320
    q = weight(name, n, k, 64)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = x.double() @ q.decode8().double().T * q.scale.double()
    magnitude = x.double().abs() @ q.decode8().double().abs().T * q.scale.double()
    for config in (SPLIT, TILE):
        y = gemm_packed(x, q, Epilogue(dtype), capability=80, config=config)
        assert y.dtype == dtype
        bound = (k + 4) * 2.0**-24 * magnitude + torch.finfo(dtype).eps / 2 * exact.abs() + 2.0**-25
        assert bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("capability", sorted(CONFIGS_A16))
def test_the_tiles_that_are_shipped(capability: int, weight: Callable):
    q = weight("table4", 70, 256)
    for m in (1, 20, 40):
        x = torch.randint(-8, 9, (m, 256), generator=torch.Generator().manual_seed(m)).bfloat16()
        y = gemm_packed(x, q, Epilogue(torch.bfloat16), capability=capability)
        assert torch.equal(y, ops.gemm_packed_a16_reference(x, q, Epilogue(x.dtype)))  # integers: sums below 2^24
        eight, token_scale = codes(m, 256)
        y = gemm_packed(eight, q, Epilogue(torch.float32, token_scale), capability=capability)
        assert torch.equal(y, ops.gemm_packed_a8_reference(eight, q, Epilogue(torch.float32, token_scale)))
    assert CONFIGS_A8.keys() == CONFIGS_A16.keys()


@pytest.mark.parametrize(("name", "group", "rows"), CASES)
def test_a16_by_ptx_and_in_plain_triton(name: str, group: int, rows: int, weight: Callable):
    """Both decode to the same numbers, which are then added in the same order."""
    q = weight(name, 40, 256, group, rows)
    x = torch.randint(-8, 9, (5, 256), generator=torch.Generator().manual_seed(0)).half()
    expected = ops.gemm_packed_a16_reference(x, q, Epilogue(x.dtype))
    for asm in (True, False):
        assert torch.equal(gemm_packed(x, q, Epilogue(x.dtype), capability=80, config=TILE, asm=asm), expected)


@pytest.mark.parametrize("config", [TILE, SPLIT], ids=["whole", "split"])
def test_what_follows_the_product(config: Config, weight: Callable):
    m, n, k = 18, 45, 192
    q = weight("int4", n, k, 64)
    g = torch.Generator().manual_seed(0)
    x, token_scale = codes(m, k)
    low = torch.randn(m, 8, generator=g), torch.randn(n, 8, generator=g).bfloat16()
    after = Epilogue(torch.float32, token_scale, torch.randn(n, generator=g), *low)
    y = gemm_packed(x, q, after, capability=90, config=config)
    expected = ops.gemm_packed_a8_reference(x, q, after)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
