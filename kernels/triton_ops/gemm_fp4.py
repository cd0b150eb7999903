"""4-bit floats times 4-bit floats on Blackwell's tensor cores: nvfp4 and mxfp4, scaled in blocks along k.

Reference: `x[m, k] = e2m1(x_data) * x_scale[m, k // v]`, w alike; y = x w^T, with v = 16 and e4m3 scales (nvfp4) or v = 32 and
e8m0 scales (mxfp4, OCP Microscaling 1.0). No format of quantdit stores such weights yet: the kernel is compiled and interpreted,
not reachable from a layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantdit.kernels.triton_ops.tuning import Config

VECTOR = {"nvfp4": 16, "mxfp4": 32}  # k that share a scale
CONFIGS: dict[int, tuple[Config, ...]] = {
    100: (Config(128, 128, 256, 4, 3),),
    120: (Config(128, 128, 128, 8, 2),),
}
# grid: (cdiv(M, BM), cdiv(N, BN)); x u8 [M, K/2], w u8 [N, K/2], low nibble first; scales [M, K/v], [N, K/v]; y [M, N]


@triton.jit
def gemm_fp4_kernel(
    x_ptr,
    w_ptr,
    x_scale_ptr,
    w_scale_ptr,
    y_ptr,
    M,
    N,
    K,
    VECTOR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    row, column = (rows % M).to(tl.int64)[:, None], (columns % N).to(tl.int64)[:, None]
    byte, vector = tl.arange(0, BK // 2)[None, :], tl.arange(0, BK // VECTOR)[None, :]
    ZERO: tl.constexpr = 0.0 if VECTOR == 16 else 0  # e4m3 or e8m0
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        x_ok, s_ok = byte < (K - start) // 2, vector < (K - start) // VECTOR
        x = tl.load(x_ptr + row * (K // 2) + start // 2 + byte, mask=x_ok, other=0)
        w = tl.load(w_ptr + column * (K // 2) + start // 2 + byte, mask=x_ok, other=0)
        x_scale = tl.load(x_scale_ptr + row * (K // VECTOR) + start // VECTOR + vector, mask=s_ok, other=ZERO)
        w_scale = tl.load(w_scale_ptr + column * (K // VECTOR) + start // VECTOR + vector, mask=s_ok, other=ZERO)
        acc = tl.dot_scaled(x, x_scale, "e2m1", w.T, w_scale, "e2m1", acc)
    at = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


def gemm_fp4(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype, format: str, config: Config | None = None
) -> Tensor:
    """Return `[m, n]` of x uint8 `[m, k/2]` and w uint8 `[n, k/2]`, two e2m1 numbers a byte, the first in the low bits.

    The scales are `[m, k/v]` and `[n, k/v]`: float8_e4m3fn for `nvfp4`, uint8 exponents (e8m0) for `mxfp4`. k is a multiple of v.
    """
    m, n, k = x.shape[0], w.shape[0], 2 * x.shape[1]
    c = config or CONFIGS[120][0]
    y = torch.empty((m, n), dtype=dtype, device=x.device)
    gemm_fp4_kernel[(triton.cdiv(m, c.bm), triton.cdiv(n, c.bn))](
        x.contiguous(), w.contiguous(), x_scale.contiguous(), w_scale.contiguous(), y, m, n, k,
        VECTOR=VECTOR[format], BM=c.bm, BN=c.bn, BK=c.bk, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return y
