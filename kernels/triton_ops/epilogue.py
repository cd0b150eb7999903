"""What follows the sums of every GEMM here, in float32: scales, bias, low-rank branch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def swizzled(pid, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """Return the tile (pm, pn) of a program: eight rows of tiles go column by column, so that both operands stay in L2."""
    nm, nn = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (8 * nn) * 8
    rows = tl.minimum(nm - first, 8)
    return first + (pid % (8 * nn)) % rows, (pid % (8 * nn)) // rows


@triton.jit
def finish(
    acc,  # [BM, BN], int32 or float32
    rows,
    columns,
    y_ptr,
    token_scale_ptr,  # [M] f32, or None: 1
    scale_ptr,  # [N] f32
    bias_ptr,  # [N] or None
    hidden_ptr,  # [M, rank] or None
    up_ptr,  # [N, rank]
    M,
    N,
    rank,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Store `token_scale * scale * acc + bias + hidden up^T` of a tile, without the parts that are None."""
    row_ok, column_ok = rows < M, columns < N
    row, column = rows.to(tl.int64), columns.to(tl.int64)
    ok = row_ok[:, None] & column_ok[None, :]
    y = acc.to(tl.float32) * tl.load(scale_ptr + column, mask=column_ok, other=0.0)[None, :]
    if token_scale_ptr is not None:
        y = y * tl.load(token_scale_ptr + row, mask=row_ok, other=0.0)[:, None]
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    if hidden_ptr is not None:
        r = tl.arange(0, 32)
        for start in range(0, rank, 32):
            r_ok = start + r < rank
            hidden_at = hidden_ptr + row[:, None] * rank + (start + r)[None, :]
            up_at = up_ptr + column[None, :] * rank + (start + r)[:, None]
            hidden = tl.load(hidden_at, mask=row_ok[:, None] & r_ok[None, :], other=0.0)
            up = tl.load(up_at, mask=column_ok[None, :] & r_ok[:, None], other=0.0)
            y = tl.dot(hidden, up.to(hidden.dtype), y, input_precision="tf32x3")
    tl.store(y_ptr + row[:, None] * N + column[None, :], y.to(y_ptr.dtype.element_ty), mask=ok)


def contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Return each tensor contiguous: kernels are given no strides."""
    return tuple(None if t is None else t.contiguous() for t in tensors)


def as_bytes(t: Tensor | None) -> Tensor | None:
    """Return a tensor of one-byte numbers as uint8, the same memory."""
    return None if t is None else t.view(torch.uint8)
