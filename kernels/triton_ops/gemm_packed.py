"""Codes or 16-bit activations times a weight as it is stored, decoded in registers: W4A8 for medium m, W4A16 for few tokens.

References: `gemm_packed_a8`, `gemm_packed_a16` in kernels/ops.py. The weight is the left operand, Y^T = W X^T, so that decoded
registers go straight to the tensor core. Full blocks of 4-bit codes come as two halves of 64 inputs, one for the low and one for
the high nibbles; every other format, and the last, shorter block of a row, through decode8.stored_tile. With `splits`, programs
share the k of one tile, leave float32 or int32 sums in a scratch matrix, and a second kernel adds them up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantdit.formats.packing import BLOCK
from quantdit.kernels.ops import Epilogue
from quantdit.kernels.triton_ops.decode8 import full_tiles, layout_of, packed_row, stored_tile
from quantdit.kernels.triton_ops.epilogue import as_bytes, contiguous, finish, swizzled
from quantdit.kernels.triton_ops.gemm_w8a8 import candidates
from quantdit.kernels.triton_ops.ptx import affine_nibbles, e4m3_to_float, table_nibbles
from quantdit.kernels.triton_ops.tuning import Config, chosen
from quantdit.tensors.qtensor import QTensor

# bk is 128 everywhere: a block of codes.
LIGHT = 4096  # largest tile for more than a bias after the product
_FEW = (Config(64, 64, 128, 4, 3), Config(16, 64, 128, 4, 4, 8), Config(32, 32, 128, 2, 4, 4), Config(64, 32, 128, 2, 3, 2))
CONFIGS_A8: dict[int, tuple[Config, ...]] = {
    80: (Config(128, 128, 128, 8, 3), Config(64, 128, 128, 4, 3), *_FEW),
    89: (Config(128, 128, 128, 8, 2), Config(64, 128, 128, 4, 3), *_FEW),
    90: (Config(128, 128, 128, 8, 4), Config(64, 128, 128, 4, 4), *_FEW),
    100: (Config(128, 128, 128, 8, 4), *_FEW),  # 64 x 128 by 4 warps spills there with codes of 2 bits
    120: (Config(128, 128, 128, 8, 2), Config(64, 128, 128, 4, 3), *_FEW),
}
CONFIGS_A16: dict[int, tuple[Config, ...]] = dict.fromkeys(CONFIGS_A8, _FEW[1:])
# grid: (tiles, splits); x [M, K]; data u8 [N, row_bytes]; y [M, N], or with splits [splits, M, N]; the rest as epilogue.finish


@triton.jit
def _activation_bits(byte, DOT: tl.constexpr, E4M3: tl.constexpr, dtype: tl.constexpr):
    """Return bytes of `I` as the operand of the product: int8 or a 16-bit float."""
    if DOT == "int8":
        return byte.to(tl.int8, bitcast=True)
    elif E4M3:
        return e4m3_to_float(byte).to(dtype)
    else:
        return byte.to(tl.int8, bitcast=True).to(dtype)


@triton.jit
def _add(w, x, acc, DOT: tl.constexpr):
    if DOT == "int8":
        return tl.dot(w, x, acc, out_dtype=tl.int32)
    elif DOT == "bf16":
        return tl.dot(w, x.to(tl.bfloat16), acc)
    else:
        return tl.dot(w, x, acc)


@triton.jit
def gemm_packed_kernel(
    x_ptr,
    data_ptr,
    multiplier_ptr,
    offset_ptr,
    codebook_ptr,
    y_ptr,
    token_scale_ptr,
    scale_ptr,
    bias_ptr,
    hidden_ptr,
    up_ptr,
    M,
    N,
    K,
    row_bytes,
    tiles,
    tail_tiles,
    rank,
    DOT: tl.constexpr,  # int8, bf16 (int8 codes times e4m3) or none (x is 16-bit)
    E4M3: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    ENTRIES: tl.constexpr,
    GROUP: tl.constexpr,
    PER_ROW: tl.constexpr,
    TAIL: tl.constexpr,
    ASM: tl.constexpr,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    EIGHT: tl.constexpr = DOT == "int8"
    # A register of a 16-bit operand holds two neighbours along k: too few for codebooks of a row.
    HALVES: tl.constexpr = BITS == 4 and (KIND == "affine" or (KIND == "codebook" and (EIGHT or not PER_ROW)))
    FLOAT: tl.constexpr = tl.bfloat16 if DOT == "bf16" else x_ptr.dtype.element_ty
    pm, pn = swizzled(tl.program_id(0), M, N, BM, BN)
    split = tl.program_id(1)
    rows, columns = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    row, column = (rows % M).to(tl.int64), (columns % N).to(tl.int64)
    half = tl.arange(0, 64)
    lane = tl.arange(0, 128)
    x_at = x_ptr + row[None, :] * K
    acc = tl.zeros((BN, BM), tl.int32 if DOT == "int8" else tl.float32)
    if HALVES and KIND == "codebook":
        words = codebook_ptr.to(tl.pointer_type(tl.int32)) + (column * 4 if PER_ROW else column * 0)[:, None]
        t0, t1, t2, t3 = tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)
        t0, t1 = tl.broadcast_to(t0, (BN, 64)), tl.broadcast_to(t1, (BN, 64))
        t2, t3 = tl.broadcast_to(t2, (BN, 64)), tl.broadcast_to(t3, (BN, 64))
    for tile in range(split, tiles, SPLITS):
        if HALVES:
            w = tl.load(data_ptr + column[:, None] * row_bytes + tile * 64 + half[None, :])
            x_low = tl.load(x_at + (tile * 128 + half)[:, None])
            x_high = tl.load(x_at + (tile * 128 + 64 + half)[:, None])
            if KIND == "affine":
                # Groups of 32 differ inside a half; a group of 64 or more is one number for each row.
                inside = half[None, :] if GROUP == 32 else tl.zeros((1, 1), tl.int32)
                at = column[:, None] * (K // GROUP) + (tile * 128 + inside) // GROUP if GROUP else column[:, None]
                low_m, low_o = tl.load(multiplier_ptr + at), tl.load(offset_ptr + at)
                if GROUP == 32 or GROUP == 64:
                    high_m, high_o = tl.load(multiplier_ptr + at + 64 // GROUP), tl.load(offset_ptr + at + 64 // GROUP)
                else:
                    high_m, high_o = low_m, low_o
                low_m, high_m = low_m.to(tl.int32), high_m.to(tl.int32)
                low_o = (low_o ^ 0x80).to(tl.int32) * 0x01010101
                high_o = (high_o ^ 0x80).to(tl.int32) * 0x01010101
                low_m, low_o = tl.broadcast_to(low_m, (BN, 64)), tl.broadcast_to(low_o, (BN, 64))
                high_m, high_o = tl.broadcast_to(high_m, (BN, 64)), tl.broadcast_to(high_o, (BN, 64))
                low = affine_nibbles(w, low_m, low_o, False, not EIGHT, ASM)
                high = affine_nibbles(w, high_m, high_o, True, not EIGHT, ASM)
            else:
                low = table_nibbles(w, t0, t1, t2, t3, False, ASM)
                high = table_nibbles(w, t0, t1, t2, t3, True, ASM)
            acc = _add(_activation_bits(low, DOT, E4M3, FLOAT), x_low, acc, DOT)
            acc = _add(_activation_bits(high, DOT, E4M3, FLOAT), x_high, acc, DOT)
        else:
            w = stored_tile(
                data_ptr, multiplier_ptr, offset_ptr, codebook_ptr, column, columns < N, tile, K, row_bytes,
                KIND, BITS, DIM, ENTRIES, GROUP, PER_ROW, 128,
            )  # fmt: skip
            x = tl.load(x_at + (tile * 128 + lane)[:, None])
            acc = _add(_activation_bits(w, DOT, E4M3, FLOAT), x, acc, DOT)
    if TAIL:  # noqa: SIM102 - a constant, unlike what follows
        if split == SPLITS - 1:
            for tile in range(tiles, tiles + tail_tiles):
                w = stored_tile(
                    data_ptr, multiplier_ptr, offset_ptr, codebook_ptr, column, columns < N, tile, K, row_bytes,
                    KIND, BITS, DIM, ENTRIES, GROUP, PER_ROW, TAIL,
                )  # fmt: skip
                x = tl.load(x_at + (tile * 128 + lane)[:, None], mask=(tile * 128 + lane < K)[:, None], other=0)
                acc = _add(_activation_bits(w, DOT, E4M3, FLOAT), x, acc, DOT)
    sums = tl.trans(acc)
    if SPLITS > 1:
        at = y_ptr + split * (M * N) + rows[:, None] * N + columns[None, :]
        tl.store(at, sums, mask=(rows < M)[:, None] & (columns < N)[None, :])
    else:
        finish(
            sums, rows, columns, y_ptr, token_scale_ptr, scale_ptr, bias_ptr, hidden_ptr, up_ptr, M, N, rank, BM, BN,
        )  # fmt: skip


@triton.jit
def sum_splits_kernel(
    sums_ptr,
    y_ptr,
    token_scale_ptr,
    scale_ptr,
    bias_ptr,
    hidden_ptr,
    up_ptr,
    M,
    N,
    rank,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    ok = (rows < M)[:, None] & (columns < N)[None, :]
    at = sums_ptr + rows[:, None] * N + columns[None, :]
    acc = tl.load(at, mask=ok, other=0)
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(at + split * (M * N), mask=ok, other=0)
    finish(
        acc, rows, columns, y_ptr, token_scale_ptr, scale_ptr, bias_ptr, hidden_ptr, up_ptr, M, N, rank, BM, BN,
    )  # fmt: skip


def gemm_packed(
    x: Tensor, weight: QTensor, after: Epilogue, *, capability: int, config: Config | None = None, asm: bool = True
) -> Tensor:
    """Return `[m, n]` of x `[m, k]`: int8 codes with a `token_scale` `[m]`, or float16 or bfloat16 without one.

    `asm` false decodes in plain Triton.
    """
    (m, k), spec = x.shape, weight.spec
    n = spec.out_features
    y = torch.empty((m, n), dtype=after.dtype, device=x.device)
    if not m:
        return y
    layout = layout_of(spec)
    (x, hidden, up) = contiguous(x, after.low_rank_hidden, after.up)
    stored = tuple(as_bytes(t) for t in contiguous(weight.data, weight.multiplier, weight.offset, weight.codebook))
    tiles = full_tiles(k, layout.dim)
    constants = layout.constants() | {"E4M3": layout.e4m3, "DOT": dot_of(x.dtype, layout.e4m3), "ASM": asm}
    rest = (after.token_scale, weight.scale, after.bias, hidden, up)
    rank = 0 if hidden is None else hidden.shape[1]

    def run(c: Config) -> None:
        splits = min(c.splits, max(tiles, 1))
        target = y
        if splits > 1:
            target = x.new_empty((splits, m, n), dtype=torch.int32 if constants["DOT"] == "int8" else torch.float32)
        grid = (triton.cdiv(m, c.bm) * triton.cdiv(n, c.bn), splits)
        gemm_packed_kernel[grid](
            x, *stored, target, *rest, m, n, k, packed_row(spec), tiles, -(-(k - tiles * BLOCK) // BLOCK), rank,
            **constants, SPLITS=splits, BM=c.bm, BN=c.bn, num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
        if splits > 1:
            sum_splits_kernel[(triton.cdiv(m, 16), triton.cdiv(n, 64))](
                target, y, *rest, m, n, rank, SPLITS=splits, BM=16, BN=64, num_warps=4
            )

    configs = candidates(CONFIGS_A16 if after.token_scale is None else CONFIGS_A8, capability, m)
    plain = hidden is None
    if not plain:
        configs = tuple(c for c in configs if c.bm * c.bn <= LIGHT)
    run(config or chosen("gemm_packed", (m, n, k, spec.format, str(x.dtype), plain), configs, run))
    return y


def dot_of(x: torch.dtype, e4m3: bool) -> str:
    """Return in what the products are made: `int8`, `bf16` for int8 codes times e4m3, `none` for x's own 16 bits."""
    return "none" if x != torch.int8 else "bf16" if e4m3 else "int8"
