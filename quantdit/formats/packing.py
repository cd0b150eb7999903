"""Sub-byte codes packed along the input, split inside blocks of 128: one byte order for every format and every kernel.

A row is cut into blocks of 128 codes; the last block is what remains, padded with code 0 to a multiple of 8. A `b`-bit code is
cut into planes of 8, 4, 2 and 1 bits, widest first, low bits first (12 = 8 + 4, 6 = 4 + 2, 3 = 2 + 1). A plane of `p` bits
puts `8 / p` codes in a byte, and code `j` of a block of `t` lies in byte `j % r` at bit `p * (j // r)`, with run length
`r = t * p / 8`:

    4 bits, t = 128:   byte j = code[j] | code[j + 64] << 4
    2 bits, t = 128:   byte j = code[j] | code[j + 32] << 2 | code[j + 64] << 4 | code[j + 96] << 6

so that a kernel gets contiguous runs from one shift and one mask and never interleaves. A block's planes follow one another.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,), 12: (8, 4), 16: (8, 8)}


def packed_bytes(n: int, bits: int) -> int:
    """Return the bytes of one packed row of `n` codes."""
    full, rest = divmod(n, BLOCK)
    return (full * BLOCK + -(-rest // 8) * 8) * bits // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes `[out, n]` uint8 (int32 above 8 bits), each below `2**bits`, to `[out, packed_bytes(n, bits)]` uint8.

    Raises:
        ValueError: a code does not fit.
    """
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"code {int(codes.max())} does not fit {bits} bits; codes must lie in 0..{2**bits - 1}")
    out, n = codes.shape
    full = n // BLOCK * BLOCK
    parts = [_pack_blocks(codes[:, :full].reshape(out, -1, BLOCK), bits).reshape(out, -1)]
    if n > full:
        tail = torch.nn.functional.pad(codes[:, full:], (0, -(n - full) % 8))
        parts.append(_pack_blocks(tail[:, None, :], bits).reshape(out, -1))
    return torch.cat(parts, dim=1)


def unpack_codes(data: Tensor, bits: int, n: int) -> Tensor:
    """Return the codes `[out, n]` uint8 (int32 above 8 bits) of packed rows `[out, packed_bytes(n, bits)]` uint8."""
    if bits == 8:
        return data[:, :n]
    out = data.shape[0]
    full = n // BLOCK
    split = full * BLOCK * bits // 8
    parts = [_unpack_blocks(data[:, :split].reshape(out, full, BLOCK * bits // 8), bits).reshape(out, -1)]
    if n > full * BLOCK:
        parts.append(_unpack_blocks(data[:, None, split:], bits).reshape(out, -1))
    return torch.cat(parts, dim=1)[:, :n]


def _pack_blocks(codes: Tensor, bits: int) -> Tensor:
    """`[out, blocks, t]` -> `[out, blocks, t * bits / 8]`."""
    planes, low = [], 0
    for p in PLANES[bits]:
        plane = ((codes >> low) & (2**p - 1)).to(torch.uint8)
        runs = plane.unflatten(-1, (8 // p, -1))  # [out, blocks, 8 / p, r]
        packed = torch.zeros_like(runs[..., 0, :])
        for i in range(8 // p):
            packed |= runs[..., i, :] << (p * i)
        planes.append(packed)
        low += p
    return torch.cat(planes, dim=-1)


def _unpack_blocks(data: Tensor, bits: int) -> Tensor:
    """`[out, blocks, t * bits / 8]` -> `[out, blocks, t]`."""
    t = data.shape[-1] * 8 // bits
    codes, low, start = None, 0, 0
    for p in PLANES[bits]:
        packed = data[..., start : start + t * p // 8]
        packed = packed.int() if bits > 8 else packed
        runs = torch.cat([(packed >> (p * i)) & (2**p - 1) for i in range(8 // p)], dim=-1) << low
        codes = runs if codes is None else codes | runs
        start += t * p // 8
        low += p
    assert codes is not None
    return codes
