"""The columns of gptq.py's leaves visited by code that numba compiles: the same codes as torch's, several times as fast.

Rows of a weight do not depend on one another, so all columns of a leaf are visited for TILE rows, which stay in the cache, before
the next rows. Sums are added up in torch's order, and a product is rounded before it is added.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from quantdit.calibration.grids import Levels
from quantdit.system.compiled import compiled

TILE = 256


def feedback_visits(
    group_size: int, order: Tensor, W: Tensor, R: Tensor, D: Tensor, effect: Tensor, codes: Tensor
) -> Callable[[Levels, int], Callable[[int, int, int], None]]:
    """Return `(levels, group) -> columns(start, stop, end)`, which visits columns of `gptq.gptq`: from one to before another.

    Their effect is brought on the columns before `end`. The levels are those of groups from `group` on, which the columns are in.

    Args:
        group_size: columns of a group.
        order: `[in]` int64, the columns in the order of the visits.
        W: `[in, out]` float32 in that order, as are D and effect, which are written.
        R: `[in, in]` float32, upper triangular.
        D: W less the values of the codes.
        effect: what the columns before ask of each, times `R_ii`.
        codes: `[in, out]` uint8 in the weight's own order, written.
    """
    given = [t.numpy() for t in (order, W, R.T, D, effect, codes)]

    def visits(levels: Levels, group: int) -> Callable[[int, int, int], None]:
        meaning = _arrays(levels)
        return lambda start, stop, end: _feedback(start, stop, end, *meaning, group, group_size, *given)

    return visits


def descent_visits(
    levels: Levels, group_size: int, V: Tensor, codes: Tensor
) -> Callable[[int, Tensor, Tensor, Tensor], Callable[[int, int], None]]:
    """Return the visits of `gptq.descent`, for scalar codes of which no value can be nearer than the one they take.

    Args:
        levels: of all groups.
        group_size: columns of a group.
        V: `[in, out]` float32, values of the codes, written.
        codes: `[in, out]` uint8, written.
    """
    meaning, values, all_codes = _arrays(levels), V.numpy(), codes.numpy()

    def visits(first: int, M: Tensor, moved: Tensor, slope: Tensor) -> Callable[[int, int], None]:
        given = M.numpy(), moved.numpy(), slope.numpy()
        return lambda start, end: _descent(start, end, *meaning, first, group_size, values, all_codes, *given)

    return visits


def _arrays(levels: Levels) -> tuple[np.ndarray, np.ndarray, np.float32, np.float32, bool]:
    first, second = (t.contiguous().numpy() for t in (levels.first, levels.second))
    return first, second, np.float32(levels.low), np.float32(levels.high), levels.is_table


@compiled
def _nearest(target, begin, count, group, first, second, low, high, is_table, code, value):
    """Set code and value of `count` rows from `begin` on to those nearest to the targets."""
    if is_table:
        table, boundaries = second[group], first[group]
        for o in range(count):
            code[o] = 0
            value[o] = table[0, begin + o]
        for k in range(boundaries.shape[0]):
            for o in range(count):
                above = target[o] > boundaries[k, begin + o]
                code[o] = k + 1 if above else code[o]
                value[o] = table[k + 1, begin + o] if above else value[o]
    else:
        step, offset = first[group, 0], second[group, 0]
        for o in range(count):
            c = np.rint((target[o] - offset[begin + o]) / step[begin + o])
            c = min(max(c, low), high)
            code[o] = np.int32(c)
            value[o] = c * step[begin + o] + offset[begin + o]


@compiled
def _feedback(start, stop, end, first, second, low, high, is_table, group, group_size, order, W, M, D, effect, codes):
    target, value, code = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.int32)
    out = W.shape[1]
    for begin in range(0, out, TILE):
        count = min(TILE, out - begin)
        for i in range(start, stop):
            column, root = order[i], M[i, i]
            w, d, e = W[i, begin : begin + count], D[i, begin : begin + count], effect[i, begin : begin + count]
            for o in range(count):
                target[o] = w[o] + e[o] / root
            _nearest(target, begin, count, column // group_size - group, first, second, low, high, is_table, code, value)
            row = codes[column, begin : begin + count]
            for o in range(count):
                d[o] = w[o] - value[o]
                row[o] = np.uint8(code[o])
            for j in range(i + 1, end):
                m, e = M[j, i], effect[j, begin : begin + count]
                for o in range(count):
                    e[o] += m * d[o]


@compiled
def _descent(start, end, first, second, low, high, is_table, before, group_size, V, codes, M, moved, slope):
    target, value, code = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.int32)
    out = V.shape[1]
    for begin in range(0, out, TILE):
        count = min(TILE, out - begin)
        for i in range(start, end):
            column, curvature = before + i, max(M[i, i], np.float32(1e-30))
            v, s, m = V[column, begin : begin + count], slope[i, begin : begin + count], moved[i, begin : begin + count]
            for o in range(count):
                target[o] = v[o] - s[o] / curvature
            _nearest(target, begin, count, column // group_size, first, second, low, high, is_table, code, value)
            row = codes[column, begin : begin + count]
            for o in range(count):
                m[o] = value[o] - v[o]
                v[o] = value[o]
                row[o] = np.uint8(code[o])
            for j in range(i + 1, end):
                h, s = M[j, i], slope[j, begin : begin + count]
                for o in range(count):
                    s[o] += h * m[o]
