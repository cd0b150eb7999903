"""Bytes of packed weights to bytes of `I`, four at a time: inline PTX, and plain Triton of the same result (`ASM` false).

The functions are elementwise, but arguments that belong to a row are read once for four bytes of a register, or once for two:
these must be neighbours along k. Tiles that become 8-bit operands of the tensor core keep four together, 16-bit operands
only two; reports/bench/static.py checks it in every compiled kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOW_AFFINE = tl.constexpr("{ .reg .b32 t; and.b32 t, $1, 0x0F0F0F0F; mad.lo.u32 t, t, $2, $6; xor.b32 $0, t, 0x80808080; }")
HIGH_AFFINE = tl.constexpr(
    "{ .reg .b32 t; shr.b32 t, $1, 4; and.b32 t, t, 0x0F0F0F0F; mad.lo.u32 t, t, $2, $6; xor.b32 $0, t, 0x80808080; }"
)

# The same with arguments of their own for the lower and the upper two bytes.
_PAIRS = """{ .reg .b32 t, u, o; shr.b32 t, $1, %d; and.b32 u, t, 0x00000F0F; and.b32 t, t, 0x0F0F0000; mul.lo.u32 u, u, $2;
mad.lo.u32 t, t, $4, u; prmt.b32 o, $6, $8, 0x7610; add.u32 t, t, o; xor.b32 $0, t, 0x80808080; }"""
LOW_PAIRS, HIGH_PAIRS = tl.constexpr(_PAIRS % 0), tl.constexpr(_PAIRS % 4)

# The nibbles of four bytes become the 16 bits of a selector; its low three bits pick in each half of the table, the fourth
# picks the half. prmt.b32 picks four bytes out of eight.
_SELECT = """{ .reg .b32 l, h, s, p, a, b; shr.b32 l, $1, %d; shr.b32 h, $1, %d; and.b32 l, l, 0x000F000F;
lop3.b32 l, h, 0x00F000F0, l, 0xEA; prmt.b32 l, l, 0, 0x4420; and.b32 s, l, 0x7777; shr.b32 p, l, 1;
and.b32 p, p, 0x4444; or.b32 p, p, 0x3210; prmt.b32 a, $2, $6, s; prmt.b32 b, $10, $14, s; prmt.b32 $0, a, b, p; }"""
LOW_TABLE, HIGH_TABLE = tl.constexpr(_SELECT % (0, 4)), tl.constexpr(_SELECT % (4, 8))

REGISTERS_9 = tl.constexpr("=r,r" + ",r" * 8)
REGISTERS_17 = tl.constexpr("=r,r" + ",r" * 16)


@triton.jit
def affine_nibbles(w, multiplier, offset, HIGH: tl.constexpr, PAIRS: tl.constexpr, ASM: tl.constexpr):
    """Return `code * multiplier + offset` uint8 (the bits of an int8) of the low or high nibbles of w uint8 `[r, c]`.

    multiplier int32 `[r, c]` 0..255; offset int32: the byte `offset + 128`, four times; both are equal for four neighbours along
    k, of which PAIRS expects only two to share a register. Two-level scales (QServe, arXiv
    2405.04532): no byte carries into the next, because `15 multiplier + offset + 128 <= 255`.
    """
    if ASM:
        if PAIRS:
            text: tl.constexpr = HIGH_PAIRS if HIGH else LOW_PAIRS
        else:
            text: tl.constexpr = HIGH_AFFINE if HIGH else LOW_AFFINE
        return tl.inline_asm_elementwise(text, REGISTERS_9, [w, multiplier, offset], dtype=tl.uint8, is_pure=True, pack=4)
    code = (w >> 4) if HIGH else (w & 0xF)
    return (code * multiplier.to(tl.uint8) + (offset & 0xFF).to(tl.uint8)) ^ 0x80


@triton.jit
def table_nibbles(w, t0, t1, t2, t3, HIGH: tl.constexpr, ASM: tl.constexpr):
    """Return `table[code]` uint8 of the low or high nibbles of w uint8 `[r, c]`; t0..t3 int32: the 16 bytes of the table.

    Tables of a row must be equal for four neighbours of a register.
    """
    if ASM:
        text: tl.constexpr = HIGH_TABLE if HIGH else LOW_TABLE
        return tl.inline_asm_elementwise(text, REGISTERS_17, [w, t0, t1, t2, t3], dtype=tl.uint8, is_pure=True, pack=4)
    code = ((w >> 4) if HIGH else (w & 0xF)).to(tl.int32)
    word = tl.where(code < 8, tl.where(code < 4, t0, t1), tl.where(code < 12, t2, t3))
    return ((word >> ((code & 3) * 8)) & 0xFF).to(tl.uint8)


@triton.jit
def e4m3_to_float(byte):
    """Return the float32 value of e4m3 bits (uint8), on machines without the type too; subnormals included, NaN not.

    The exponent lands in float32's with its own bias of 7, and a product by 2^120 makes that 127.
    """
    b = byte.to(tl.int32)
    return (((b & 0x80) << 24) | ((b & 0x7F) << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def rint(x):
    """Return x float32 rounded to the nearest integer, ties to even, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0
