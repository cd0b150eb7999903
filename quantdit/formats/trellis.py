"""Trellis-coded weights: `I[o, i] = codebook[state[o, i]]`, the state a window of L bits over the codes of one input's weights.

A code has k = 2, 3 or 4 bits, one for each weight, and is stored like any other (packing.py). But what a weight is depends on its
own code and on those of the outputs before it, L bits of them in all, its own the highest:

    state[o, i] = code[o, i] 2^(L - k) + code[o - 1, i] 2^(L - 2k) + code[o - 2, i] 2^(L - 3k) + ...    (bits below 0 cut off)

Before output 0 comes the last one: the window goes round (tail-biting), so that no start is stored and none is special. It is the
bitshift trellis of QTIP (Tseng et al. 2024, arXiv 2406.11235), which decodes all weights at once, in any order; here along the
outputs, not the inputs, so that error feedback can take one input after another (calibration/viterbi.py finds the codes).

The codebook follows from L and k and is not stored: quantiles of the Gaussian in units of 64ths of the largest. With
state = b C + c, b the weight's own code, C = 2^(L - k), c = h 2^k + a, and so a the k bits that leave the window next, it is

    codebook[state] = quantile[((a + b + stir(h)) mod 2^k) C + shuffle(c)]

The 2^k values that a past leaves to choose from thus lie one in each 2^k-th of the Gaussian, all at one place within it, and of
2^k pasts that the next one cannot tell apart each has a code's value in another 2^k-th. Against a codebook in random order that
saves 9 % of the error at 4 bits and L = 12. `stir` and `shuffle` are products of integers: the same on every machine.

Names: `trellis<k>_l<L>`, k = 2, 3, 4 and L = 10, 12, 14, 16. A larger L is better and slower to find, and takes the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from quantdit.formats.format import Field, Format, QSpec
from quantdit.formats.packing import packed_bytes, unpack_codes

PEAK = 64  # two neighbours of one sign add up to at most 128, which CPUs without VNNI need (kernels/cpu.py)
DECODED_AT_ONCE = 1 << 18  # weights: what fits a cache


def unit(state_bits: int) -> float:
    """Return what 1 in the codebook stands for, in standard deviations of the Gaussian that it follows."""
    return NormalDist().inv_cdf(1 - 0.5 / 2**state_bits) / PEAK


@lru_cache
def codebook(state_bits: int, bits: int) -> Tensor:
    """Return the codebook int8 `[2**state_bits]` of codes of so many bits; not to be written to."""
    count = 2**state_bits
    normal = NormalDist()
    rounded = [round(normal.inv_cdf((i + 0.5) / count) / unit(state_bits)) for i in range(count // 2, count)]
    quantile = np.array([-q for q in reversed(rounded)] + rounded, dtype=np.int8)
    state = np.arange(count, dtype=np.uint64)
    own, past = state >> np.uint64(state_bits - bits), state % np.uint64(count >> bits)
    oldest, middle = past % np.uint64(2**bits), past >> np.uint64(bits)
    stratum = (oldest + own + _stir(middle, bits)) % np.uint64(2**bits)
    return torch.from_numpy(quantile[stratum * np.uint64(count >> bits) + _shuffle(past, state_bits - bits)])


def _stir(middle: np.ndarray, bits: int) -> np.ndarray:
    """Return numbers of so many bits that neighbours do not share: the high ones of a product modulo 2^32."""
    return (middle * np.uint64(0x9E3779B1) & np.uint64(0xFFFFFFFF)) >> np.uint64(32 - bits)


def _shuffle(past: np.ndarray, bits: int) -> np.ndarray:
    """Return a permutation of the numbers of so many bits: odd factors and shifted differences can be undone."""
    mask = np.uint64(2**bits - 1)
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        past = past * np.uint64(factor) & mask
        past = past ^ (past >> np.uint64(bits // 2))
    return past


def states(codes: Tensor, state_bits: int, bits: int) -> Tensor:
    """Return the states `[out, n]` int32 of the codes `[out, n]` uint8 of whole columns."""
    return _states(_with_past(codes, state_bits, bits), state_bits, bits)


def decode(codes: Tensor, f: Format) -> Tensor:
    """Return `I` int8 `[out, n]` of the codes `[out, n]` uint8 of whole columns."""
    entries = codebook(f.state_bits, f.code_bits).to(codes.device)
    decoded = torch.empty(codes.shape, dtype=torch.int8, device=codes.device)
    extended = _with_past(codes, f.state_bits, f.code_bits)
    rows, past = max(1, DECODED_AT_ONCE // codes.shape[1]), len(extended) - len(codes)
    for start in range(0, len(codes), rows):
        part = _states(extended[start : start + rows + past], f.state_bits, f.code_bits)
        decoded[start : start + rows] = entries.index_select(0, part.flatten()).reshape(part.shape)
    return decoded


def _with_past(codes: Tensor, state_bits: int, bits: int) -> Tensor:
    """Return codes with those in front that go before the first, which are the last."""
    together = _together(state_bits, bits)
    past = -(-state_bits // (together * bits)) * together - 1
    return torch.cat([codes[torch.arange(-past, 0, device=codes.device) % len(codes)], codes])


def _together(state_bits: int, bits: int) -> int:
    """Return how many codes, a power of two, are put together first: as many as a byte and the state hold."""
    return max(m for m in (1, 2, 4) if m == 1 or m * bits <= min(8, state_bits))


def _states(codes: Tensor, state_bits: int, bits: int) -> Tensor:
    """Return the states of codes that stand behind their past: codes put together while a byte holds them, then bytes."""
    together, step = _together(state_bits, bits), 1
    while step < together:
        codes = codes[step:] << bits | codes[:-step]
        step, bits = 2 * step, 2 * bits
    pieces = -(-state_bits // bits)
    count = len(codes) - (pieces - 1) * step
    codes = codes.int()
    total = codes[(pieces - 1) * step :] << (state_bits - bits)
    for j in range(1, pieces):
        before, shift = codes[(pieces - 1 - j) * step :][:count], state_bits - bits * (j + 1)
        total |= before << shift if shift >= 0 else before >> -shift
    return total


def _fields(f: Format, s: QSpec) -> dict[str, Field]:
    return {"data": Field(torch.uint8, (s.out_features, packed_bytes(s.in_features, f.code_bits)))}


def _decode8(f: Format, s: QSpec, t: Mapping[str, Tensor]) -> Tensor:
    return decode(unpack_codes(t["data"], f.code_bits, s.in_features), f)


TRELLIS = {
    f"trellis{bits}_l{state_bits}": Format(
        f"trellis{bits}_l{state_bits}",
        "trellis",
        bits,
        1,
        _fields,
        _decode8,
        check=lambda f, s, t: None,  # every state has an entry
        state_bits=state_bits,
    )
    for bits in (2, 3, 4)
    for state_bits in (10, 12, 14, 16)
}
