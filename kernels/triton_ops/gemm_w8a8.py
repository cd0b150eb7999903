"""8-bit codes times an 8-bit weight: int8, e4m3, or int8 codes times e4m3 weights in bfloat16, which holds both exactly.

Reference: `gemm_w8a8` in kernels/ops.py. Integer sums are exact; e4m3 sums are float32, in blocks of at most 128 on Hopper, whose
tensor cores add with fewer bits (max_num_imprecise_acc).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantdit.kernels.ops import Epilogue
from quantdit.kernels.triton_ops.epilogue import contiguous, finish, swizzled
from quantdit.kernels.triton_ops.ptx import e4m3_to_float
from quantdit.kernels.triton_ops.tuning import Config, chosen

# By compute capability; the first is taken unless a timing chose another. reports/bench/static.py compiles all: no spills.
CONFIGS: dict[int, tuple[Config, ...]] = {
    80: (Config(128, 128, 64, 8, 4), Config(128, 128, 128, 8, 3), Config(64, 128, 64, 4, 4), Config(32, 64, 128, 4, 3)),
    89: (Config(128, 128, 64, 8, 3), Config(128, 128, 128, 8, 2), Config(64, 128, 64, 4, 4), Config(32, 64, 128, 4, 3)),
    90: (Config(128, 256, 128, 8, 3), Config(128, 128, 128, 4, 4), Config(64, 128, 128, 4, 4), Config(32, 64, 128, 4, 3)),
    100: (Config(128, 128, 128, 8, 3), Config(64, 128, 128, 4, 4), Config(32, 64, 128, 4, 3)),
    120: (Config(128, 128, 64, 8, 3), Config(128, 128, 128, 8, 2), Config(64, 128, 64, 4, 4), Config(32, 64, 128, 4, 3)),
}
# Where more registers are needed: e4m3 sums in blocks, mixed types, and more than a bias after the product.
SMALL: dict[int, tuple[Config, ...]] = {
    80: (Config(128, 128, 64, 8, 3), Config(64, 64, 64, 4, 4)),
    89: (Config(128, 128, 64, 8, 3), Config(64, 64, 64, 4, 4)),
    90: (Config(128, 128, 128, 8, 3), Config(64, 64, 128, 4, 4)),
    100: (Config(128, 128, 128, 8, 3), Config(64, 64, 128, 4, 4)),
    120: (Config(128, 128, 64, 8, 3), Config(64, 64, 64, 4, 4)),
}
# grid: (tiles,); x [M, K], w [N, K] int8 or e4m3 (bytes for DOT bf16); y [M, N]; the rest as epilogue.finish


@triton.jit
def gemm_w8a8_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    token_scale_ptr,
    scale_ptr,
    bias_ptr,
    hidden_ptr,
    up_ptr,
    M,
    N,
    K,
    rank,
    DOT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    pm, pn = swizzled(tl.program_id(0), M, N, BM, BN)
    rows, columns = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    # What lies beyond the last row wraps around: it is not stored, and needs no mask.
    x_at = x_ptr + (rows % M).to(tl.int64)[:, None] * K + k[None, :]
    w_at = w_ptr + (columns % N).to(tl.int64)[None, :] * K + k[:, None]
    ZERO: tl.constexpr = 0.0 if DOT == "e4m3" else 0
    acc = tl.zeros((BM, BN), tl.int32 if DOT == "int8" else tl.float32)
    for start in range(0, K, BK):
        if EVEN_K:
            x, w = tl.load(x_at), tl.load(w_at)
        else:
            x = tl.load(x_at, mask=(start + k < K)[None, :], other=ZERO)
            w = tl.load(w_at, mask=(start + k < K)[:, None], other=ZERO)
        if DOT == "int8":
            acc = tl.dot(x, w, acc, out_dtype=tl.int32)
        elif DOT == "e4m3":
            acc = tl.dot(x, w, acc, max_num_imprecise_acc=BK)
        else:
            acc = tl.dot(x.to(tl.bfloat16), e4m3_to_float(w).to(tl.bfloat16), acc)
        x_at += BK
        w_at += BK
    finish(
        acc, rows, columns, y_ptr, token_scale_ptr, scale_ptr, bias_ptr, hidden_ptr, up_ptr, M, N, rank, BM, BN,
    )  # fmt: skip


def gemm_w8a8(
    codes: Tensor, decoded: Tensor, scale: Tensor, after: Epilogue, *, capability: int, config: Config | None = None
) -> Tensor:
    """Return `[m, n]` as `torch.ops.quantdit.gemm_w8a8` does; e4m3 codes need a capability of 89."""
    m, k, n = *codes.shape, decoded.shape[0]
    y = torch.empty((m, n), dtype=after.dtype, device=codes.device)
    if not m:
        return y
    (codes, decoded, hidden, up) = contiguous(codes, decoded, after.low_rank_hidden, after.up)
    dot = dot_of(codes.dtype, decoded.dtype)
    if dot == "bf16":
        decoded = decoded.view(torch.uint8)
    rank = 0 if hidden is None else hidden.shape[1]

    def run(c: Config) -> None:
        gemm_w8a8_kernel[(triton.cdiv(m, c.bm) * triton.cdiv(n, c.bn),)](
            codes, decoded, y, after.token_scale, scale, after.bias, hidden, up, m, n, k, rank,
            DOT=dot, EVEN_K=k % c.bk == 0, BM=c.bm, BN=c.bn, BK=c.bk, num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip

    plain = dot == "int8" and hidden is None
    configs = candidates(CONFIGS if plain else SMALL, capability, m)
    run(config or chosen("gemm_w8a8", (m, n, k, dot, plain), configs, run))
    return y


def dot_of(codes: torch.dtype, decoded: torch.dtype) -> str:
    """Return in what the products are made: `int8`, `e4m3` or `bf16`."""
    if decoded == torch.int8:
        return "int8"
    return "e4m3" if codes == torch.float8_e4m3fn else "bf16"


def candidates(configs: dict[int, tuple[Config, ...]], capability: int, m: int) -> tuple[Config, ...]:
    """Return the configurations of the nearest older architecture, those first whose tile m fills and fits."""
    known = configs[max((c for c in configs if c <= capability), default=min(configs))]
    return tuple(sorted(known, key=lambda c: (c.bm if c.bm >= 2 * max(m, 16) else 0, c.bm < min(m, 64))))
