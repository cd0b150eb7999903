"""A token in one pass: smoothing and signs, block-Hadamard, then codes and scale.

References: `quantize_tokens`, `rotate`, `rotate_quantize` in kernels/ops.py. Codes are theirs to the bit,
except that a sum of another order (rotation, error of a group) may turn a tie. A program keeps whole tokens in
registers as rows of 128 inputs, so that one product by a 128 x 128 matrix of +-1 rotates all of their blocks. With a low-rank
branch (`quantize_project_kernel`) it goes along its tokens twice instead: scales and the product by `down`, then codes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantdit.formats.float8 import LARGEST
from quantdit.kernels.triton_ops.epilogue import contiguous
from quantdit.kernels.triton_ops.ptx import rint
from quantdit.tensors import hadamard, transform

LANES = 128  # inputs a row; a Hadamard block divides it
ROWS = 64  # of a program, unless one token has more
STAGES = 1  # the loads of a whole token ahead would not fit shared memory; other programs fill the time
MAX_WIDTH = 128 * LANES  # of a token that still fits the registers of a program
FORMATS = ("none", "int", "affine", "fp8")
# grid: (programs,), each loops over groups of TOKENS; x [M, K]; premultiplier [K]; hadamard [128, 128]; y [M, K]; scale [M]


@triton.jit
def _rotated(y, h, PARTS: tl.constexpr):
    """Return y h in float32 for y float32 and h of +-1 in 16 bits: exact products of 1, 2 or 3 parts that add up to y."""
    part = y.to(h.dtype)
    z = tl.dot(part, h)
    for _ in tl.static_range(PARTS - 1):
        y = y - part.to(tl.float32)
        part = y.to(h.dtype)
        z = tl.dot(part, h, z)
    return z


@triton.jit
def _of_token(v, TOKENS: tl.constexpr, BLOCKS: tl.constexpr):
    """Return the largest of v `[rows]` over the rows of each token, `[TOKENS]`."""
    v = tl.reshape(v, (TOKENS, BLOCKS))
    return tl.max(v, 1)


@triton.jit
def _of_rows(v, TOKENS: tl.constexpr, BLOCKS: tl.constexpr):
    """Repeat v `[TOKENS]` for the rows of each token, to `[rows, 1]`."""
    return tl.reshape(tl.broadcast_to(v[:, None], (TOKENS, BLOCKS)), (TOKENS * BLOCKS, 1))


@triton.jit
def _offset(low, high, multiplier, TOP: tl.constexpr):
    centred = rint((low + high - TOP * multiplier) / 2)
    return tl.minimum(tl.maximum(centred, -128.0), 127.0 - TOP * multiplier)


@triton.jit
def _stepped(y, low, high, multiplier, AFFINE: tl.constexpr, TOP: tl.constexpr):
    """Return the integers nearest to y among the codes of one multiplier a group (ops._symmetric_groups, ops._affine_groups)."""
    if AFFINE:
        offset = _offset(low, high, multiplier, TOP)
        code = tl.clamp(rint(tl.div_rn(y - offset, multiplier + tl.zeros_like(y))), 0.0, TOP)
        value = tl.clamp(code * multiplier + offset, -128.0, 127.0)
    else:
        code = tl.clamp(rint(tl.div_rn(y, multiplier + tl.zeros_like(y))), -TOP, TOP)
        value = tl.clamp(code * multiplier, -127.0, 127.0)
    return value


@triton.jit
def _grouped(y, AFFINE: tl.constexpr, TOP: tl.constexpr):
    """Return the integers of y `[rows, groups, g]` in units of the token's int8 grid (ops._nearer)."""
    if AFFINE:
        low, high = tl.min(y, 2)[:, :, None], tl.max(y, 2)[:, :, None]
        step = high - low
    else:
        step = tl.max(tl.abs(y), 2)[:, :, None]
        low, high = step, step
    step = tl.div_rn(step, TOP + tl.zeros_like(step))
    above, below = tl.maximum(tl.ceil(step), 1.0), tl.maximum(tl.floor(step), 1.0)
    wide, fine = _stepped(y, low, high, above, AFFINE, TOP) - y, _stepped(y, low, high, below, AFFINE, TOP) - y
    better = tl.sum(fine * fine, 2) < tl.sum(wide * wide, 2)
    # Made again rather than kept: both would be held in registers.
    return _stepped(y, low, high, tl.where(better[:, :, None], below, above), AFFINE, TOP)


@triton.jit
def _coded(
    y,
    absmax,
    low,
    high,
    static_ptr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
    FORMAT: tl.constexpr,
    TOP: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Return the codes of y `[rows, 128]`, still float32, and scale `[TOKENS]`; absmax, low, high `[TOKENS]` of whole tokens."""
    if GROUP:
        scale = tl.div_rn(absmax, 127.0 + tl.zeros_like(absmax))
    elif FORMAT == "affine":
        step = tl.div_rn(high - low, TOP + tl.zeros_like(low))
        scale = tl.maximum(step, tl.div_rn(absmax, 127.0 + tl.zeros_like(absmax)))
    else:
        scale = tl.div_rn(absmax, TOP + tl.zeros_like(absmax))
    if static_ptr is not None:
        scale = tl.load(static_ptr) + tl.zeros_like(scale)
    divisor = tl.where(scale == 0.0, 1.0, scale)
    y = tl.div_rn(y, _of_rows(divisor, TOKENS, BLOCKS) + tl.zeros_like(y))
    if GROUP:
        y = tl.reshape(tl.clamp(y, -127.0, 127.0), (TOKENS * BLOCKS, 128 // GROUP, GROUP))
        y = tl.reshape(_grouped(y, FORMAT == "affine", TOP), (TOKENS * BLOCKS, 128))
    elif FORMAT == "affine":
        one = tl.full((TOKENS,), 1.0, tl.float32)
        offset = _offset(tl.div_rn(low, divisor), tl.div_rn(high, divisor), one, TOP)
        offset = _of_rows(offset, TOKENS, BLOCKS)
        y = tl.clamp(rint(y - offset), 0.0, TOP) + offset
    else:
        y = tl.clamp(y, -TOP, TOP)
        if FORMAT == "int":
            y = rint(y)
    return y, scale


@triton.jit
def quantize_tokens_kernel(
    x_ptr,
    premultiplier_ptr,  # [K] or None
    hadamard_ptr,  # [128, 128] of +-1 and 0, or None
    static_ptr,  # [1] f32 or None
    y_ptr,
    scale_ptr,
    M,
    K,
    norm,  # 1 / sqrt(block)
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    FORMAT: tl.constexpr,
    TOP: tl.constexpr,  # largest code, a float
    GROUP: tl.constexpr,
    KEEP: tl.constexpr,
):
    lane = tl.arange(0, 128)
    rows = tl.arange(0, TOKENS * BLOCKS)
    column = (rows % BLOCKS * 128)[:, None] + lane[None, :]
    if hadamard_ptr is not None and KEEP:
        h = tl.load(hadamard_ptr + lane[:, None] * 128 + lane[None, :])
    for first in range(tl.program_id(0) * TOKENS, M, tl.num_programs(0) * TOKENS):
        token = (first + rows // BLOCKS).to(tl.int64)[:, None]
        ok = (token < M) & (column < K)
        y = tl.load(x_ptr + token * K + column, mask=ok, other=0.0).to(tl.float32)
        if premultiplier_ptr is not None:
            y = y * tl.load(premultiplier_ptr + column, mask=column < K, other=0).to(tl.float32)
        if hadamard_ptr is not None:
            if not KEEP:
                h = tl.load(hadamard_ptr + lane[:, None] * 128 + lane[None, :])
            y = _rotated(y, h, PARTS) * norm
        if x_ptr.dtype.element_ty != tl.float16:
            y = y.to(x_ptr.dtype.element_ty).to(tl.float32)  # what `rotate` returns

        if FORMAT == "none":
            tl.store(y_ptr + token * K + column, y.to(y_ptr.dtype.element_ty), mask=ok)
        else:
            absmax = _of_token(tl.max(tl.abs(y), 1), TOKENS, BLOCKS)
            low = absmax  # used by `affine` without groups
            high = absmax
            if FORMAT == "affine" and not GROUP:
                low = -_of_token(tl.max(tl.where(ok, -y, float("-inf")), 1), TOKENS, BLOCKS)
                high = _of_token(tl.max(tl.where(ok, y, float("-inf")), 1), TOKENS, BLOCKS)
            y, scale = _coded(y, absmax, low, high, static_ptr, TOKENS, BLOCKS, FORMAT, TOP, GROUP)
            tl.store(y_ptr + token * K + column, y.to(y_ptr.dtype.element_ty), mask=ok)
            tokens = first + tl.arange(0, TOKENS)
            tl.store(scale_ptr + tokens, scale, mask=tokens < M)


@triton.jit
def _rotated_chunk(x_ptr, premultiplier_ptr, token, column, h, norm, M, K, PARTS: tl.constexpr):
    """Return 128 rotated inputs of some tokens, float32 with the values of x's dtype, and which of them are there."""
    ok = (token < M) & (column < K)
    y = tl.load(x_ptr + token * K + column, mask=ok, other=0.0).to(tl.float32)
    if premultiplier_ptr is not None:
        y = y * tl.load(premultiplier_ptr + column, mask=column < K, other=0).to(tl.float32)
    y = _rotated(y, h, PARTS) * norm
    return y.to(x_ptr.dtype.element_ty).to(tl.float32), ok


@triton.jit
def quantize_project_kernel(
    x_ptr,
    premultiplier_ptr,  # [K] or None
    hadamard_ptr,  # [128, 128] of +-1 and 0
    static_ptr,  # [1] f32 or None
    down_ptr,  # [rank, K]
    y_ptr,
    scale_ptr,
    hidden_ptr,  # [M, rank]
    M,
    K,
    rank,
    norm,  # 1 / sqrt(block)
    TOKENS: tl.constexpr,
    RANK: tl.constexpr,  # a power of two from rank on
    PARTS: tl.constexpr,
    FORMAT: tl.constexpr,
    TOP: tl.constexpr,
    GROUP: tl.constexpr,
):
    lane = tl.arange(0, 128)
    h = tl.load(hadamard_ptr + lane[:, None] * 128 + lane[None, :])
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    token = tokens.to(tl.int64)[:, None]
    r = tl.arange(0, RANK)
    hidden = tl.zeros((TOKENS, RANK), tl.float32)
    absmax = tl.zeros((TOKENS,), tl.float32)
    low = tl.full((TOKENS,), float("inf"), tl.float32)
    high = -low
    for start in range(0, K, 128):
        column = (start + lane)[None, :]
        y, ok = _rotated_chunk(x_ptr, premultiplier_ptr, token, column, h, norm, M, K, PARTS)
        absmax = tl.maximum(absmax, tl.max(tl.abs(y), 1))
        if FORMAT == "affine" and not GROUP:
            low = tl.minimum(low, -tl.max(tl.where(ok, -y, float("-inf")), 1))
            high = tl.maximum(high, tl.max(tl.where(ok, y, float("-inf")), 1))
        down = tl.load(down_ptr + r[:, None] * K + column, mask=(r[:, None] < rank) & (column < K), other=0.0)
        hidden = tl.dot(y.to(x_ptr.dtype.element_ty), tl.trans(down.to(x_ptr.dtype.element_ty)), hidden)
    tl.store(
        hidden_ptr + token * rank + r[None, :], hidden.to(hidden_ptr.dtype.element_ty), mask=(token < M) & (r[None, :] < rank)
    )

    # Once more: these tokens are in the L2 cache, and their rotation costs less than keeping it would.
    for start in range(0, K, 128):
        column = (start + lane)[None, :]
        y, ok = _rotated_chunk(x_ptr, premultiplier_ptr, token, column, h, norm, M, K, PARTS)
        y, scale = _coded(y, absmax, low, high, static_ptr, TOKENS, 1, FORMAT, TOP, GROUP)
        tl.store(y_ptr + token * K + column, y.to(y_ptr.dtype.element_ty), mask=ok)
        tl.store(scale_ptr + tokens, scale, mask=(tokens < M) & (start == 0))


def quantize_tokens(
    x: Tensor,
    premultiplier: Tensor | None,
    block: int,
    format: str,
    bits: int = 8,
    group_size: int = 0,
    static_scale: Tensor | None = None,
    *,
    capability: int,
) -> tuple[Tensor, Tensor]:
    """Return codes `[m, k]` int8 or e4m3 and scale `[m]` float32; with format `none` the transformed x and an empty scale.

    Args:
        x: `[m, k]` float16, bfloat16 or float32, k at most MAX_WIDTH.
        premultiplier: `[k]` int8 or float32, or None.
        block: of the Hadamard, a power of two up to 128; 1: none.
        format: one of FORMATS.
        bits: of a code; with `fp8` and `none` it does not matter.
        group_size: 0, 32, 64 or 128.
        static_scale: `[1]` float32.
        capability: of the GPU, 90 for 9.0.
    """
    (x, premultiplier) = contiguous(x, premultiplier)
    m, k = x.shape
    y = torch.empty_like(x, dtype={"none": transform.kept_in(x.dtype), "fp8": torch.float8_e4m3fn}.get(format, torch.int8))
    scale = x.new_empty(0 if format == "none" else m, dtype=torch.float32)
    if not m:
        return y, scale
    constants = constants_of(k, x.dtype, premultiplier, format, bits, group_size, capability)
    warps = constants.pop("num_warps")
    groups = triton.cdiv(m, constants["TOKENS"])
    narrow = x.dtype if _signs_alone(x.dtype, premultiplier) else torch.bfloat16
    quantize_tokens_kernel[(min(groups, programs(x.device)),)](
        x, premultiplier, _signs(block, narrow, x.device) if block > 1 else None,
        static_scale, y, scale, m, k, block**-0.5, **constants, num_warps=warps, num_stages=STAGES,
    )  # fmt: skip
    return y, scale


def constants_of(
    k: int, dtype: torch.dtype, premultiplier: Tensor | None, format: str, bits: int, group_size: int, capability: int
) -> dict:
    """Return the constexpr arguments and num_warps for tokens of width k."""
    blocks = triton.next_power_of_2(triton.cdiv(k, LANES))
    rows = ROWS // 2 if group_size and dtype == torch.float32 else ROWS  # which would spill on sm_80
    return {
        "TOKENS": max(1, rows // blocks),
        "BLOCKS": blocks,
        "PARTS": _parts(dtype, premultiplier),
        "FORMAT": format,
        "TOP": _top(format, bits),
        "GROUP": group_size,
        # Tensor cores that read shared memory; the others would keep the matrix in registers from one token to the next.
        "KEEP": 90 <= capability < 120,
        "num_warps": 8 if blocks <= ROWS else 16,
    }


def quantize_project(
    x: Tensor,
    premultiplier: Tensor,
    block: int,
    format: str,
    bits: int,
    group_size: int,
    static_scale: Tensor | None,
    down: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes and scale of the rotated tokens as `quantize_tokens` does, and hidden `[m, r]` like x, their product by down.

    Args:
        x: `[m, k]` bfloat16, of any width.
        premultiplier: `[k]` int8 or float32.
        block: of the Hadamard, a power of two up to 128.
        format: `int`, `affine` or `fp8`.
        bits: of a code.
        group_size: 0, 32, 64 or 128.
        static_scale: `[1]` float32.
        down: `[r, k]` float, 1 <= r <= 64.
    """
    (x, premultiplier, down) = contiguous(x, premultiplier, down)
    (m, k), rank = x.shape, down.shape[0]
    y = torch.empty_like(x, dtype=torch.float8_e4m3fn if format == "fp8" else torch.int8)
    scale, hidden = x.new_empty(m, dtype=torch.float32), x.new_empty(m, rank)
    if m:
        constants = project_constants(rank, x.dtype, premultiplier, format, bits, group_size)
        narrow = x.dtype if _signs_alone(x.dtype, premultiplier) else torch.bfloat16
        quantize_project_kernel[(triton.cdiv(m, constants["TOKENS"]),)](
            x, premultiplier, _signs(block, narrow, x.device), static_scale, down, y, scale, hidden, m, k, rank, block**-0.5,
            **constants,
        )  # fmt: skip
    return y, scale, hidden


def project_constants(
    rank: int, dtype: torch.dtype, premultiplier: Tensor | None, format: str, bits: int, group_size: int
) -> dict:
    """Return the constexpr arguments, num_warps and num_stages for a rank."""
    parts = _parts(dtype, premultiplier)
    return {
        # All of `down` is read for so many tokens; more of them, twice cut, would not fit the registers.
        "TOKENS": 32 if parts == 1 else 16,
        "RANK": max(16, triton.next_power_of_2(rank)),
        "PARTS": parts,
        "FORMAT": format,
        "TOP": _top(format, bits),
        "GROUP": group_size,
        "num_warps": 4 if parts == 1 else 8,
        "num_stages": 2,
    }


def _parts(dtype: torch.dtype, premultiplier: Tensor | None) -> int:
    """Return in how many summands of 16 bits a token is rotated."""
    return 1 if _signs_alone(dtype, premultiplier) else 2 if dtype == torch.bfloat16 else 3


def _top(format: str, bits: int) -> float:
    """Return the largest code."""
    return {"fp8": LARGEST, "affine": 2.0**bits - 1}.get(format, 2.0 ** (bits - 1) - 1)


def _signs_alone(dtype: torch.dtype, premultiplier: Tensor | None) -> bool:
    """Return whether what is rotated still has the 16 bits of its dtype; else it is cut into parts of bfloat16."""
    return dtype != torch.float32 and (premultiplier is None or premultiplier.dtype == torch.int8)


@lru_cache(maxsize=16)
def _signs(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `[128, 128]`, Hadamard blocks of +-1 along the diagonal."""
    h = (hadamard.hadamard(block) * block**0.5).round()
    return torch.block_diag(*[h] * (LANES // block)).to(device=device, dtype=dtype)


@lru_cache(maxsize=8)
def programs(device: torch.device) -> int:
    """Return how many programs keep a device busy; each loads the Hadamard matrix once."""
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
