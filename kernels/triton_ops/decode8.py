"""`decode8` of any stored format (quantdit/formats), as an op into a scratch matrix and as a tile inside a GEMM.

Reference: `Format.decode8`. Packing, formats/packing.py: blocks of 128 codes, cut into planes of 8, 4, 2 and 1 bits; code j of a
block of t lies, of a plane of p bits, in byte `j % r` at bit `p (j // r)`, r = t p / 8. A row's last block is shorter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantdit.formats import FORMATS, QSpec
from quantdit.formats.packing import BLOCK, packed_bytes
from quantdit.kernels.triton_ops.epilogue import as_bytes, contiguous
from quantdit.tensors.qtensor import QTensor

BN = 32
# grid: (cdiv(N, BN), tiles); data u8 [N, row_bytes]; multiplier, offset [N, groups] u8; codebook u8; y u8 [N, K]


@dataclass(frozen=True)
class Layout:
    """What a kernel must know, as constants, of a stored weight `[n, k]`.

    Attributes:
        kind: of the format, `whole`, `affine`, `codebook` or `vectors`.
        bits: of a code. dim: inputs per code.
        entries: of a codebook of single weights.
        group: inputs that share a multiplier and an offset.
        per_row: whether each output has a codebook of its own.
        e4m3: whether `I` is e4m3 rather than int8.
        tail: codes in the last, shorter block, rounded up to 8; 0 without one.
    """

    kind: str
    bits: int
    dim: int
    entries: int
    group: int
    per_row: bool
    e4m3: bool
    tail: int

    def constants(self) -> dict:
        """Return the constexpr arguments of `stored_tile`."""
        return {
            "KIND": self.kind,
            "BITS": self.bits,
            "DIM": self.dim,
            "ENTRIES": self.entries,
            "GROUP": self.group,
            "PER_ROW": self.per_row,
            "TAIL": self.tail,
        }


def layout_of(spec: QSpec) -> Layout:
    """Return the layout of a weight."""
    f, k = FORMATS[spec.format], spec.in_features
    tail = -(-(k // f.dim % BLOCK) // 8) * 8
    # One group per output is the same for every width: fewer kernels to compile.
    group = 0 if spec.group_size == k else spec.group_size
    e4m3 = f.decoded_dtype == torch.float8_e4m3fn
    return Layout(f.kind, f.code_bits, f.dim, f.code_count, group, spec.codebook_rows > 1, e4m3, tail)


def full_tiles(k: int, dim: int) -> int:
    """Return how many tiles of 128 inputs lie in full blocks of codes."""
    return k // dim // BLOCK * dim


@triton.jit
def _plane(base, j, ok, START: tl.constexpr, P: tl.constexpr, T: tl.constexpr):
    RUN: tl.constexpr = T * P // 8
    byte = tl.load(base + START + j % RUN, mask=ok, other=0).to(tl.int32)
    return (byte >> (P * (j // RUN))) & ((1 << P) - 1)


@triton.jit
def narrow_codes(base, j, ok, BITS: tl.constexpr, T: tl.constexpr):
    """Return codes j of at most 6 bits, int32, of the blocks of T codes at `base`."""
    if BITS == 6:
        code = _plane(base, j, ok, 0, 4, T) | (_plane(base, j, ok, T // 2, 2, T) << 4)
    elif BITS == 3:
        code = _plane(base, j, ok, 0, 2, T) | (_plane(base, j, ok, T // 4, 1, T) << 2)
    else:
        code = _plane(base, j, ok, 0, BITS, T)
    return code


@triton.jit
def stored_tile(
    data_ptr,
    multiplier_ptr,
    offset_ptr,
    codebook_ptr,
    row,  # [BN] int64
    row_ok,
    tile,  # of 128 inputs
    K,
    row_bytes,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    ENTRIES: tl.constexpr,
    GROUP: tl.constexpr,
    PER_ROW: tl.constexpr,
    T: tl.constexpr,
):
    """Return the bytes of `I` uint8 `[BN, 128]` of a tile whose block has T codes; 0 outside of the matrix."""
    lane = tl.arange(0, 128)
    column = tile * 128 + lane
    ok = row_ok[:, None] & (column < K)[None, :]
    if KIND == "whole":
        value = tl.load(data_ptr + row[:, None] * K + column[None, :], mask=ok, other=0)
    else:
        first = tile * (128 // DIM)  # code
        base = data_ptr + row[:, None] * row_bytes + first // 128 * (128 * BITS // 8)
        j = (first % 128 + lane // DIM)[None, :]
        if BITS == 8:
            code = tl.load(base + j, mask=ok, other=0).to(tl.int32)
        elif BITS == 16:
            code = tl.load(base + j, mask=ok, other=0).to(tl.int32)
            negative = tl.load(base + T + j, mask=ok, other=0).to(tl.int32)
        elif BITS == 12:
            code = tl.load(base + j, mask=ok, other=0).to(tl.int32)
            negative = _plane(base, j, ok, T, 4, T)
        else:
            code = narrow_codes(base, j, ok, BITS, T)
        if KIND == "affine":
            at = row[:, None] * (K // GROUP) + (column // GROUP)[None, :] if GROUP else row[:, None] + lane[None, :] * 0
            multiplier = tl.load(multiplier_ptr + at, mask=ok, other=0).to(tl.int32)
            value = (code * multiplier + tl.load(offset_ptr + at, mask=ok, other=0).to(tl.int32)).to(tl.uint8)
        elif KIND == "codebook":
            of_row = codebook_ptr + row[:, None] * ENTRIES if PER_ROW else codebook_ptr + row[:, None] * 0
            value = tl.load(of_row + code, mask=ok, other=0)
        else:
            value = tl.load(codebook_ptr + code * DIM + (column % DIM)[None, :], mask=ok, other=0)
            if BITS > 8:  # magnitudes; the bits above are signs
                value = tl.where(((negative >> (column % DIM)[None, :]) & 1) == 1, 0 - value, value)
    return value


@triton.jit
def decode8_kernel(
    data_ptr,
    multiplier_ptr,
    offset_ptr,
    codebook_ptr,
    y_ptr,
    N,
    K,
    row_bytes,
    first_tile,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    ENTRIES: tl.constexpr,
    GROUP: tl.constexpr,
    PER_ROW: tl.constexpr,
    T: tl.constexpr,
    BN: tl.constexpr,
):
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    row, row_ok = rows.to(tl.int64), rows < N
    tile = first_tile + tl.program_id(1)
    value = stored_tile(
        data_ptr, multiplier_ptr, offset_ptr, codebook_ptr, row, row_ok, tile, K, row_bytes,
        KIND, BITS, DIM, ENTRIES, GROUP, PER_ROW, T,
    )  # fmt: skip
    column = tile * 128 + tl.arange(0, 128)
    tl.store(y_ptr + row[:, None] * K + column[None, :], value, mask=row_ok[:, None] & (column < K)[None, :])


def decode8(weight: QTensor) -> Tensor:
    """Return `I` `[n, k]` as `torch.ops.quantdit.decode8` does."""
    spec = weight.spec
    n, k, layout = spec.out_features, spec.in_features, layout_of(spec)
    y = weight.data.new_empty((n, k), dtype=FORMATS[spec.format].decoded_dtype)
    stored = tuple(as_bytes(t) for t in contiguous(weight.data, weight.multiplier, weight.offset, weight.codebook))
    constants = layout.constants()
    tail = constants.pop("TAIL")
    full = full_tiles(k, layout.dim)
    for first, tiles, t in ((0, full, BLOCK), (full, -(-(k - full * BLOCK) // BLOCK), tail)):
        if tiles:
            decode8_kernel[(triton.cdiv(n, BN), tiles)](
                *stored, as_bytes(y), n, k, packed_row(spec), first, **constants, T=t, BN=BN, num_warps=4
            )
    return y


def packed_row(spec: QSpec) -> int:
    """Return the bytes of a stored row."""
    f = FORMATS[spec.format]
    return packed_bytes(spec.in_features // f.dim, f.code_bits)
