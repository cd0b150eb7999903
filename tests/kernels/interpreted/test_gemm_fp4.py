"""gemm_fp4_kernel: exact products of e2m1 numbers and their scales."""

from __future__ import annotations

import pytest
import torch

from quantdit.kernels.triton_ops.gemm_fp4 import VECTOR, gemm_fp4
from quantdit.kernels.triton_ops.tuning import Config

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def operand(rows: int, k: int, format: str, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed codes, scales, and the float64 matrix they mean."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, k), generator=g)
    values = torch.where(codes >= 8, -1.0, 1.0) * E2M1[codes & 7]
    scales = 2.0 ** torch.randint(-3, 4, (rows, k // VECTOR[format]), generator=g)
    stored = scales.to(torch.float8_e4m3fn) if format == "nvfp4" else (scales.log2() + 127).to(torch.uint8)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    return packed, stored, (values * scales.repeat_interleave(VECTOR[format], dim=1)).double()


@pytest.mark.parametrize("format", VECTOR)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 33, 96), (40, 32, 256)])
def test_products_are_exact(m: int, n: int, k: int, format: str):
    """Multiples of 2^-8 below 2^14 in sum: float32 holds them."""
    x, x_scale, a = operand(m, k, format, 0)
    w, w_scale, b = operand(n, k, format, 1)
    y = gemm_fp4(x, x_scale, w, w_scale, torch.float32, format, Config(32, 32, 128, 4, 2))
    assert torch.equal(y.double(), a @ b.T)
