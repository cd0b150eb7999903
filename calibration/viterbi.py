"""Codes of trellis formats (formats/trellis.py): the sequence of least squared error for each column, by Viterbi's algorithm.

A column's codes go round in a circle, which would have to be tried from each of its pasts. Instead it is cut into segments. What
the past is at a cut is what the best sequence of the weights around it, both ends free, has there; then each segment is solved
between the pasts at its ends, exactly. That costs 1 % of the error at most (with weights eight windows to each side).

With numba (quantdit's extra `fast`) the work on a CPU is calibration/viterbi_numba.py's, which gives the same codes.
"""

from __future__ import annotations

import itertools
import warnings

import torch
from torch import Tensor

from quantdit.formats import Format
from quantdit.formats.trellis import codebook, states
from quantdit.system.files import Advice
from quantdit.system.optional_import import install, numba_is_installed

SEGMENT = 384  # weights: long against the windows around its ends, short enough for several to a column
AROUND = 8  # windows to each side of a cut
MEMORY = 256 * 2**20


def encode(targets: Tensor, f: Format, memory: int = MEMORY) -> Tensor:
    """Return codes `[out, n]` uint8 whose decoded weights are near to targets, column by column.

    Args:
        targets: `[out, n]` float32 in units of the table: whole columns, all outputs of n inputs.
        f: a trellis format.
        memory: bytes to be used at once, about; never less than one segment needs.
    """
    out, columns = targets.shape
    entries = codebook(f.state_bits, f.code_bits).to(targets.device).float()
    around = AROUND * -(-f.state_bits // f.code_bits)
    count = max(1, round(out / SEGMENT))
    cuts = [out * s // count for s in range(count + 1)]
    places = (torch.tensor(cuts[:-1])[:, None] + torch.arange(-around, around)) % out  # [count, 2 around]
    free = targets[places.to(targets.device)].transpose(1, 2).reshape(count * columns, 2 * around)
    found = solve(free, entries, f.code_bits, None, None, memory)
    if out * f.code_bits < f.state_bits - f.code_bits:  # the window reaches round more than once: no past fits every end
        return found[:, around : around + out].T.contiguous()
    past = states(found.T, f.state_bits - f.code_bits, f.code_bits)[around - 1].reshape(count, columns).long()
    codes = torch.empty(out, columns, dtype=torch.uint8, device=targets.device)
    for length in sorted({b - a for a, b in itertools.pairwise(cuts)}):
        of_length = [s for s in range(count) if cuts[s + 1] - cuts[s] == length]
        parts = torch.stack([targets[cuts[s] : cuts[s + 1]].T for s in of_length])  # [segments, n, length]
        first, last = past[of_length], past[[(s + 1) % count for s in of_length]]
        found = solve(parts.flatten(0, 1), entries, f.code_bits, first.flatten(), last.flatten(), memory)
        for s, part in zip(of_length, found.reshape(parts.shape), strict=True):
            codes[cuts[s] : cuts[s + 1]] = part.T
    return codes


def solve(x: Tensor, entries: Tensor, bits: int, first: Tensor | None, last: Tensor | None, memory: int) -> Tensor:
    """Return the codes `[m, t]` uint8 of least `sum (x - table[state])^2` for each sequence.

    Args:
        x: `[m, t]` float32.
        entries: `[2^L]` float32, the table.
        bits: of a code.
        first: `[m]` int64, the past, L - bits bits, that each sequence starts from; None: any.
        last: the same for where it ends.
        memory: bytes.
    """
    if x.device.type == "cpu":
        if numba_is_installed():
            from quantdit.calibration.viterbi_numba import solve as fast

            return fast(x, entries, bits, first, last)
        advice = (
            f"trellis codes take ten to thirty times as long without numba; run: {install('fast')}, or take"
            " --weight-format table or vq"
        )
        warnings.warn(advice, Advice, stacklevel=2)
    # The costs of every state and their differences, in float32, and the way back of every past.
    each = 12 * len(entries) + x.shape[1] * (len(entries) >> bits)
    many = max(1, memory // each)
    found = [
        _viterbi(x[i : i + many], entries, bits, *(None if e is None else e[i : i + many] for e in (first, last)))
        for i in range(0, len(x), many)
    ]
    return torch.cat(found)


def _viterbi(x: Tensor, entries: Tensor, bits: int, first: Tensor | None, last: Tensor | None) -> Tensor:
    (many, length), pasts = x.shape, len(entries) >> bits
    by_code = entries.reshape(-1, pasts)
    cost = torch.zeros(many, pasts, dtype=torch.float32, device=x.device)
    if first is not None:
        cost = cost.fill_(torch.inf).scatter_(1, first[:, None], 0.0)
    left = torch.empty(length, many, pasts, dtype=torch.uint8, device=x.device)  # the bits that leave on the best way to a past
    for i in range(length):
        total = (x[:, i, None, None] - by_code).square_().add_(cost[:, None])  # [many, own code, past]
        cost, best = total.reshape(many, pasts, -1).min(dim=2)
        left[i] = best
    past = cost.argmin(dim=1, keepdim=True) if last is None else last[:, None]
    codes = torch.empty(many, length, dtype=torch.uint8, device=x.device)
    for i in reversed(range(length)):
        state = (past << bits) + left[i].gather(1, past)
        codes[:, i] = (state // pasts)[:, 0]
        past = state % pasts
    return codes
