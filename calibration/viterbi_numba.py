"""viterbi.py's `solve` compiled by numba: the same codes, ten to thirty times as fast on a CPU.

With C pasts c = h K + a, K = 2^bits, the best way to past c comes from one of the K states c K + a, whose past is
(c mod C / K) K + a. So costs lie as `cost[a][c mod C / K]` and the table as `entries[a][c]`: for each a one run over c, which
compilers turn into vector instructions. Four a at once and two sets of results, one read and one written, because a store that
depends on a comparison is slow on some CPUs. Runs shorter than RUN are too short to be worth it: costs are repeated until it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from quantdit.system.compiled import compiled
from quantdit.system.threads import allowed

RUN = 64
FEW = 2  # sequences that are worth a thread of their own


def solve(x: Tensor, entries: Tensor, bits: int, first: Tensor | None, last: Tensor | None) -> Tensor:
    """Return the codes `[m, t]` uint8; arguments as of `viterbi.solve`."""
    many = len(x)
    by_left = entries.reshape(-1, 2**bits).T.contiguous().flatten().numpy()
    ends = [np.full(many, -1) if end is None else end.numpy() for end in (first, last)]
    codes = np.empty(x.shape, dtype=np.uint8)
    sequences = x.contiguous().numpy()
    threads = max(1, min(allowed(), many // FEW))
    parts = [slice(many * i // threads, many * (i + 1) // threads) for i in range(threads)]

    def work(part: slice) -> None:
        _solve(sequences[part], by_left, bits, ends[0][part], ends[1][part], codes[part])

    if threads == 1:
        work(parts[0])
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, parts))
    return torch.from_numpy(codes)


@compiled
def _best_of_4(x, cost, entries, at, run, here, pasts, count, value, left):
    """Set value and left, from `here` on, to the least cost and its a of a = 0..3. Indices are unsigned, which saves a test."""
    for c in range(count):
        d0 = x - entries[here + c]
        d1 = x - entries[here + pasts + c]
        d2 = x - entries[here + pasts + pasts + c]
        d3 = x - entries[here + pasts + pasts + pasts + c]
        v0 = cost[at + c] + d0 * d0
        v1 = cost[at + run + c] + d1 * d1
        v2 = cost[at + run + run + c] + d2 * d2
        v3 = cost[at + run + run + run + c] + d3 * d3
        low, high = v1 < v0, v3 < v2
        v, w = v1 if low else v0, v3 if high else v2
        i, j = np.int32(1) if low else np.int32(0), np.int32(3) if high else np.int32(2)
        value[here + c] = w if w < v else v
        left[here + c] = j if w < v else i


@compiled
def _better_of_4(x, cost, entries, at, run, there, pasts, here, count, number, old, old_left, value, left):
    """The same for a = number..number + 3, against what the a before came to: `old`."""
    for c in range(count):
        d0 = x - entries[there + c]
        d1 = x - entries[there + pasts + c]
        d2 = x - entries[there + pasts + pasts + c]
        d3 = x - entries[there + pasts + pasts + pasts + c]
        v0 = cost[at + c] + d0 * d0
        v1 = cost[at + run + c] + d1 * d1
        v2 = cost[at + run + run + c] + d2 * d2
        v3 = cost[at + run + run + run + c] + d3 * d3
        low, high = v1 < v0, v3 < v2
        v, w = v1 if low else v0, v3 if high else v2
        i, j = np.int32(1) if low else np.int32(0), np.int32(3) if high else np.int32(2)
        i, v = (j if w < v else i) + number, w if w < v else v
        before = old[here + c]
        value[here + c] = v if v < before else before
        left[here + c] = i if v < before else old_left[here + c]


@compiled
def _solve(sequences, entries, bits, first, last, codes):
    length = sequences.shape[1]
    options = 1 << bits
    pasts = entries.size >> bits
    groups = pasts >> bits
    run = max(groups, min(pasts, RUN))
    K, P, G, R = np.uint64(options), np.uint64(pasts), np.uint64(groups), np.uint64(run)
    nothing = np.uint64(0)
    cost = np.empty(options * run, np.float32)
    value, other = np.empty(pasts, np.float32), np.empty(pasts, np.float32)
    left, other_left = np.empty(pasts, np.int32), np.empty(pasts, np.int32)
    back = np.empty((length, pasts), np.uint8)
    for s in range(sequences.shape[0]):
        if first[s] < 0:
            cost[:] = 0
        else:
            cost[:] = np.inf
            cost[(first[s] % options) * run + first[s] // options : (first[s] % options + 1) * run : groups] = 0
        for t in range(length):
            x = sequences[s, t]
            for start in range(nothing, P, R):
                _best_of_4(x, cost, entries, nothing, R, start, P, R, value, left)
            for a in range(np.uint64(4), K, np.uint64(4)):
                for start in range(nothing, P, R):
                    _better_of_4(
                        x, cost, entries, a * R, R, a * P + start, P, start, R, np.int32(a), value, left, other, other_left
                    )
                value, other = other, value
                left, other_left = other_left, left
            row = back[t]
            for c in range(P):
                row[c] = np.uint8(left[c])
            for a in range(K):
                for h in range(G):
                    cost[a * R + h] = value[h * K + a]
                for h in range(G, R):
                    cost[a * R + h] = cost[a * R + h - G]
        past = np.argmin(value) if last[s] < 0 else last[s]
        for t in range(length - 1, -1, -1):
            state = past * options + back[t, past]
            codes[s, t] = state // pasts
            past = state % pasts
