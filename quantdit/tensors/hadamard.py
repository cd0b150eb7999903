"""Orthonormal block-Hadamard rotations with random signs: `R = diag(sign) (I kron H_b)`, `R R^T = 1`.

(Ashkboos et al. 2024, QuaRot, arXiv 2404.00456.) The signs keep a constant offset of the input, such as the mean that GELU
leaves, from piling up in the first coefficient of every block.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

LARGEST_BLOCK = 128


def block_size(width: int, largest: int = LARGEST_BLOCK) -> int:
    """Return the largest power of two that divides `width`, at most `largest`; 1 (no rotation possible) for odd widths."""
    return min(largest, width & -width)


@lru_cache(maxsize=32)
def hadamard(n: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Return the symmetric orthonormal Sylvester Hadamard matrix `[n, n]`, n a power of two.

    Raises:
        ValueError: n is not a power of two.
    """
    if n < 1 or n & (n - 1):
        raise ValueError(f"a Sylvester Hadamard matrix needs a power of two, got {n}")
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return (h / math.sqrt(n)).to(device=device, dtype=dtype)


def random_sign(width: int, seed: int) -> Tensor:
    """Return `[width]` int8 of +1 and -1, the same for the same seed and width."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + width)
    return (torch.randint(0, 2, (width,), generator=generator, dtype=torch.int8) * 2 - 1).to(torch.int8)


def spread(x: Tensor, channel: Tensor, number: int) -> Tensor:
    """Return `(E H diag(sign) E)^T x` for x `[n, b, r]`: in each of n blocks its `channel` `[n]` is spread evenly.

    DuQuant's greedy step, its random orthogonal matrix with a uniform first row being a Hadamard matrix with the signs of
    `step_sign(b, number)`. E exchanges 0 and the channel. Sums and products of single numbers in a fixed order: x in float64
    gives the same bits on every machine.
    """
    b = x.shape[1]
    half, x = 1, _exchanged(x.clone(), channel)
    while half < b:
        low, high = x.unflatten(1, (-1, 2, half)).unbind(2)
        x, half = torch.stack([low + high, low - high], dim=2).flatten(1, 3), 2 * half
    return _exchanged(x.mul_((step_sign(b, number).to(x.device, x.dtype) * b**-0.5)[:, None]), channel)


def _exchanged(x: Tensor, channel: Tensor) -> Tensor:
    """Return x `[n, b, r]` with channels 0 and `channel` `[n]` of each block exchanged in place."""
    block = torch.arange(len(x), device=x.device)
    first = x[:, 0].clone()
    x[:, 0] = x[block, channel]
    x[block, channel] = first
    return x


@lru_cache(maxsize=256)
def step_sign(block: int, number: int) -> Tensor:
    """Return `[block]` int8 of +1 and -1 that belong to a greedy step: bits of hashed numbers, part of a checkpoint's format."""
    signs = []
    for place in range(block):
        mixed = (number * LARGEST_BLOCK + place + 1) * 0x9E3779B1 & 0xFFFFFFFF
        for factor in (0x85EBCA6B, 0xC2B2AE35):
            mixed = ((mixed ^ (mixed >> 15)) * factor) & 0xFFFFFFFF
        signs.append(1 - 2 * (mixed >> 31))
    return torch.tensor(signs, dtype=torch.int8)


def regular_block_size(width: int) -> int:
    """Return the largest power of four that divides `width`, at most LARGEST_BLOCK; 1 if there is none."""
    block = block_size(width)
    return block if block.bit_length() % 2 else block // 2


def regular_sign(width: int, block: int) -> Tensor:
    """Return `[width]` int8, +1 and -1, whose `diag(sign) (1 kron H_b)` is ConvRot's rotation (`regular`) column by column.

    The columns are in another order and some negated, which changes neither the size of a token's largest value nor rounding.

    Raises:
        ValueError: the block is no power of four that divides the width.
    """
    if block < 1 or block & (block - 1) or not block.bit_length() % 2 or width % block:
        raise ValueError(f"a regular Hadamard matrix needs a power of four that divides {width}, got {block}")
    sign = torch.ones(1, dtype=torch.int8)
    while len(sign) < block:
        sign = torch.kron(sign, torch.tensor([1, 1, 1, -1], dtype=torch.int8))
    return sign.repeat(width // block)


def regular(n: int) -> Tensor:
    """Return the regular Hadamard matrix `[n, n]` of ConvRot: symmetric, orthonormal, float64, n a power of four.

    All its rows and columns have the same sum, so that a constant offset of the inputs spreads evenly.
    """
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64) / 2
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < n:
        h = torch.kron(h, four)
    return h
