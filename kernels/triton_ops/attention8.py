"""Attention on 8-bit codes: int8 queries and keys; values int8 or e4m3, or float16, their probabilities alike.

Reference: `attention8` in kernels/attention.py, tile by tile the same; exponentials are powers of two here, so that a probability
may round to the next step. A tested fallback where no library's kernel is installed, not the fastest: exponentials and roundings
take more of its time than products do.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantdit.kernels.attention import STEPS, TILE
from quantdit.kernels.triton_ops.ptx import rint
from quantdit.kernels.triton_ops.tuning import Config, chosen

LOG2E = math.log2(math.e)
HEAD_SIZES = (32, 64, 128)
# Of queries; bn and bk are the tile of keys that the definition has and the size of a head. reports/bench/static.py compiles all.
CONFIGS: dict[int, tuple[Config, ...]] = {
    80: (Config(128, TILE, 0, 8, 3), Config(64, TILE, 0, 4, 3)),
    89: (Config(128, TILE, 0, 8, 2), Config(64, TILE, 0, 4, 2)),
    90: (Config(128, TILE, 0, 8, 3), Config(64, TILE, 0, 4, 3)),
    100: (Config(128, TILE, 0, 8, 3), Config(64, TILE, 0, 4, 3)),
    120: (Config(128, TILE, 0, 8, 2), Config(64, TILE, 0, 4, 2)),
}
# Where a mask or float values take registers, too.
SMALL = (Config(64, TILE, 0, 8, 2),)
# grid: (tiles of queries, b h); q, y [b h, M, D], k [b h, N, D] int8, v [b h, D, N]; scales float32, those of q times log2(e)


@triton.jit
def attention8_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    y_ptr,
    q_scale_ptr,
    k_scale_ptr,
    v_scale_ptr,
    mask_ptr,
    M,
    N,
    H,
    v_row,
    mask_b,
    mask_h,
    mask_m,
    mask_n,
    CAUSAL: tl.constexpr,
    PV: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    rows, head = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1).to(tl.int64)
    columns, channels = tl.arange(0, BN), tl.arange(0, D)
    inside = rows < M
    q = tl.load(q_ptr + (head * M + rows)[:, None] * D + channels[None, :], mask=inside[:, None], other=0)
    q_scale = tl.load(q_scale_ptr + head * M + rows, mask=inside, other=0.0)
    ZERO: tl.constexpr = 0 if PV == "int8" else 0.0
    total = tl.zeros((BM, D), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    end = tl.minimum(N, (tl.program_id(0) + 1) * BM) if CAUSAL else N
    for start in range(0, end, BN):
        at = start + columns
        seen = at < N
        k = tl.load(k_ptr + (head * N + at)[None, :] * D + channels[:, None], mask=seen[None, :], other=0)
        k_scale = tl.load(k_scale_ptr + head * N + at, mask=seen, other=0.0)
        scores = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32) * q_scale[:, None] * k_scale[None, :]
        if mask_ptr is not None:
            places = (mask_ptr + (head // H) * mask_b + (head % H) * mask_h) + rows[:, None] * mask_m + at[None, :] * mask_n
            added = tl.load(places, mask=inside[:, None] & seen[None, :], other=0.0).to(tl.float32)
            scores += added * 1.4426950408889634
        if CAUSAL:
            scores = tl.where(at[None, :] <= rows[:, None], scores, float("-inf"))
        scores = tl.where(seen[None, :], scores, float("-inf"))
        here = tl.max(scores, 1)
        # Rows that see no key of the tile: -inf minus itself is no number.
        p = tl.exp2(scores - tl.where(here == float("-inf"), 0.0, here)[:, None])
        v = tl.load(v_ptr + (head * D + channels)[None, :] * v_row + at[:, None], mask=seen[:, None], other=ZERO)
        if PV == "int8":
            p = rint(p * 255.0)
            # Signed codes are half the range lower: as much of every value is added again.
            whole = tl.dot((p - 128.0).to(tl.int8), v, out_dtype=tl.int32)
            product = (whole + 128 * tl.sum(v.to(tl.int32), 0)[None, :]).to(tl.float32)
        elif PV == "e4m3":
            codes = (p * 448.0).to(tl.float8e4nv)
            p = codes.to(tl.float32)
            product = tl.dot(codes, v, out_dtype=tl.float32)
        else:
            product = tl.dot(p.to(v.dtype), v, out_dtype=tl.float32)
        now = tl.maximum(top, here)
        level = tl.where(now == float("-inf"), 0.0, now)
        before, after = tl.exp2(top - level), tl.exp2(here - level)
        total = total * before[:, None] + product * after[:, None]
        weight = weight * before + tl.sum(p, 1) * after
        top = now
    v_scale = tl.load(v_scale_ptr + head * D + channels)
    y = total / tl.where(weight == 0.0, 1.0, weight)[:, None] * v_scale[None, :]
    tl.store(y_ptr + (head * M + rows)[:, None] * D + channels[None, :], y.to(y_ptr.dtype.element_ty), mask=inside[:, None])


def takes(q: Tensor, v: Tensor, capability: int) -> bool:
    """Return whether the kernel takes queries `[b, h, m, d]` and values `[b, h, d, n]` on a GPU of this compute capability."""
    known = v.dtype in (torch.int8, torch.float16, torch.bfloat16) or (v.dtype == torch.float8_e4m3fn and capability >= 89)
    return known and q.shape[-1] in HEAD_SIZES


def attention8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    mask: Tensor | None,
    causal: bool,
    dtype: torch.dtype,
    *,
    capability: int,
    config: Config | None = None,
) -> Tensor:
    """Return `[b, h, m, d]` as `torch.ops.quantdit.attention8` does, of what `takes` lets in."""
    (b, h, m, d), n = q.shape, k.shape[2]
    y = torch.empty((b, h, m, d), dtype=dtype, device=q.device)
    q, k, v, k_scale, v_scale = (x.contiguous() for x in (q, k, v, k_scale, v_scale))
    v = torch.nn.functional.pad(v, (0, -n % 16)) if n % 16 else v  # rows that begin at whole words
    q_scale = (q_scale * LOG2E).contiguous()
    strides = (0, 0, 0, 0) if mask is None else mask.expand(b, h, m, n).stride()
    pv = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}.get(v.dtype, "float")

    def run(c: Config) -> None:
        attention8_kernel[(triton.cdiv(m, c.bm), b * h)](
            q, k, v, y, q_scale, k_scale, v_scale, mask, m, n, h, v.shape[3], *strides,
            CAUSAL=causal, PV=pv, D=d, BM=c.bm, BN=TILE, num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip

    usual = CONFIGS[max((a for a in CONFIGS if a <= capability), default=min(CONFIGS))]
    configs = SMALL if mask is not None or pv == "float" else usual
    run(config or chosen("attention8", (b * h, m, n, d, pv, causal, mask is not None), configs, run))
    return y


assert STEPS == 255 and TILE == 64  # as the kernel has them
