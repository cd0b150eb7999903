"""Bytes of packed weights to bytes of `I`, four at a time: inline PTX, and plain Triton of the same result (`ASM` false).

The functions are elementwise, but 32-bit arguments are read once for four neighbouring bytes of a register: these must lie in one
row, and inside a run of four along k. reports/bench/static.py checks the register layouts of every compiled kernel for that.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOW = "{ .reg .b32 t; and.b32 t, $1, 0x0F0F0F0F; mad.lo.u32 t, t, $2, $6; xor.b32 $0, t, 0x80808080; }"
_HIGH = "{ .reg .b32 t; shr.b32 t, $1, 4; and.b32 t, t, 0x0F0F0F0F; mad.lo.u32 t, t, $2, $6; xor.b32 $0, t, 0x80808080; }"
AFFINE = (tl.constexpr(_LOW), tl.constexpr(_HIGH))

# The nibbles of four bytes become the 16 bits of a selector; its low three bits pick in each half of the table, the fourth
# picks the half. prmt.b32 picks four bytes out of eight.
_SELECT = """{ .reg .b32 l, h, s, p, a, b; shr.b32 l, $1, %d; shr.b32 h, $1, %d; and.b32 l, l, 0x000F000F;
lop3.b32 l, h, 0x00F000F0, l, 0xEA; prmt.b32 l, l, 0, 0x4420; and.b32 s, l, 0x7777; shr.b32 p, l, 1;
and.b32 p, p, 0x4444; or.b32 p, p, 0x3210; prmt.b32 a, $2, $6, s; prmt.b32 b, $10, $14, s; prmt.b32 $0, a, b, p; }"""
TABLE = (tl.constexpr(_SELECT % (0, 4)), tl.constexpr(_SELECT % (4, 8)))

_REGISTERS_9 = tl.constexpr("=r,r" + ",r" * 8)
_REGISTERS_17 = tl.constexpr("=r,r" + ",r" * 16)


@triton.jit
def affine_nibbles(w, multiplier, offset, HIGH: tl.constexpr, ASM: tl.constexpr):
    """Return `code * multiplier + offset` uint8 (the bits of an int8) of the low or high nibbles of w uint8 `[r, c]`.

    multiplier int32 `[r, c]` 0..255; offset int32: the byte `offset + 128`, four times. Two-level scales (QServe, arXiv
    2405.04532): no byte carries into the next, because `15 multiplier + offset + 128 <= 255`.
    """
    if ASM:
        text: tl.constexpr = AFFINE[1] if HIGH else AFFINE[0]
        return tl.inline_asm_elementwise(text, _REGISTERS_9, [w, multiplier, offset], dtype=tl.uint8, is_pure=True, pack=4)
    code = (w >> 4) if HIGH else (w & 0xF)
    return (code * multiplier.to(tl.uint8) + (offset & 0xFF).to(tl.uint8)) ^ 0x80


@triton.jit
def table_nibbles(w, t0, t1, t2, t3, HIGH: tl.constexpr, ASM: tl.constexpr):
    """Return `table[code]` uint8 of the low or high nibbles of w uint8 `[r, c]`; t0..t3 int32: the 16 bytes of the table."""
    if ASM:
        text: tl.constexpr = TABLE[1] if HIGH else TABLE[0]
        return tl.inline_asm_elementwise(text, _REGISTERS_17, [w, t0, t1, t2, t3], dtype=tl.uint8, is_pure=True, pack=4)
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
