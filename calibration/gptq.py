"""Error feedback: GPTQ (Frantar et al. 2022, arXiv 2210.17323), for any grid of codes, in the form that inverts nothing.

    tr(D H D^T) = |D R|^2,   D = W - Q,   H = G + damp * mean(diag G) * 1 = R R^T,   R upper triangular

Column i of `D R` is `D_i R_ii + sum_{j < i} D_j R_ji`. So column after column is rounded as if it were
`w_i + sum_{j < i} D_j R_ji / R_ii`, which makes its own the least that it can be. These are GPTQ's codes, whose feedback by the
factor of H^-1 says the same (QuIP, Chee et al. 2023, arXiv 2307.13304, theorem 6).

Inside, matrices `[out, in]` are held as `[in, out]`, in which a column of W is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantdit.calibration.grids import Grid, Levels, Params
from quantdit.system.optional_import import numba_is_installed

LEAF = 32  # columns that take each other's effect one by one; beyond, a product brings it
DESCENT_BLOCK = 1024  # columns whose slope is computed at once


def factor(H: Tensor, damp: float) -> Tensor:
    """Return R `[k, k]` upper triangular with `R R^T = H + damp * mean(diag H) 1`, float32.

    Dead inputs (H_ii = 0) get the mean diagonal, so that their weights are merely rounded. float32 is enough: it is off by as
    much as if H were by some 1e-7 of itself, which the sums in it are anyway and the damping is far above.
    """
    H = H.float().flip(0, 1)
    diagonal = H.diagonal()
    alive = diagonal > 0
    mean = diagonal.clamp_min(0).mean() if bool(alive.any()) else torch.ones((), dtype=torch.float32)
    diagonal += torch.where(alive, damp * mean, (1 + damp) * mean)
    return torch.linalg.cholesky(H).flip(0, 1)


def gptq(
    W: Tensor, H: Tensor, grid: Grid, group_size: int, damp: float = 0.01, act_order: bool = False
) -> tuple[Tensor, list[Params]]:
    """Return the codes `[out, in]` uint8 and each group's parameters.

    A group's parameters are fitted to its weights as they stand when its first column is reached; in act-order, where a group's
    columns are met at different times, to the weights as they were given.

    Args:
        W: `[out, in]` float32 in units of I.
        H: `[in, in]`, the Gram matrix of the inputs in the same (transformed) space, any positive multiple of it.
        grid: what the codes may be.
        group_size: divides `in`.
        damp: part of the mean diagonal added to the diagonal.
        act_order: columns in order of falling H_ii, so that the ones that matter most are rounded while most can still make up
            for them.
    """
    width = W.shape[1]
    order = H.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(width)
    importance = H.diagonal().float().clamp_min(1e-12)
    groups = _fit_groups(W, importance, grid, group_size) if act_order or group_size == width else []
    # Groups that are fitted on the way lie within a leaf, whose effects are whole when it is reached.
    leaf = LEAF if groups else group_size * max(1, LEAF // group_size)
    columns = order.tolist()
    R = factor(H.index_select(0, order).index_select(1, order), damp)
    W = W.T[order]
    D, feedback = torch.empty_like(W), torch.zeros_like(W)
    codes = torch.empty(W.shape, dtype=torch.uint8)
    root = R.diagonal()[:, None].contiguous()

    def fit_group(i: int) -> None:
        """Fit the group that column i is the first of, if it is not fitted yet."""
        if columns[i] // group_size == len(groups):
            group = slice(i, i + group_size)
            moved = torch.linalg.solve_triangular(R[group, group].T, feedback[group], upper=False)
            groups.append(grid.fit((W[group] + moved).T.contiguous(), importance[group]))

    def visit(i: int) -> None:
        fit_group(i)
        params = groups[columns[i] // group_size]
        c = grid.encode((W[i] + feedback[i] / root[i])[:, None], params)
        D[i] = W[i] - grid.value(c, params)[:, 0]
        codes[columns[i]] = c[:, 0]

    levels = _compiled(grid, W)
    if levels is None:
        sweep(one_by_one(visit, R.T, D, feedback), R.T, D, feedback, leaf)
        return codes.T.contiguous(), groups
    from quantdit.calibration.columns_numba import feedback_visits

    visits = feedback_visits(group_size, order, W, R, D, feedback, codes)
    if groups:
        visit_all = visits(levels(groups), 0)
        sweep(lambda start, end: visit_all(start, end, end), R.T, D, feedback, leaf)
        return codes.T.contiguous(), groups

    def group_by_group(start: int, end: int) -> None:
        for i in range(start, end, group_size):
            fit_group(i)
            visits(levels(groups[-1:]), len(groups) - 1)(i, i + group_size, end)

    sweep(group_by_group, R.T, D, feedback, leaf)
    return codes.T.contiguous(), groups


def rtn(W: Tensor, importance: Tensor, grid: Grid, group_size: int) -> tuple[Tensor, list[Params]]:
    """Round to nearest, group by group, without feedback; importance `[in]`, the rest as for `gptq`."""
    groups = _fit_groups(W, importance, grid, group_size)
    parts = zip(W.split(group_size, dim=1), groups, strict=True)
    return torch.cat([grid.encode(w, p) for w, p in parts], dim=1), groups


def descend(codes: Tensor, W: Tensor, H: Tensor, grid: Grid, groups: list[Params], group_size: int, passes: int) -> Tensor:
    """Return codes `[out, in]` of no larger output error `tr((V - W) H (V - W)^T)`, V their values: coordinate descent.

    GPTQ never goes back to a column. Here each column in turn takes the level nearest to the best real number for it, all others
    held, `v_i - (H (V - W))_i / H_ii`, which no other level can beat. (CDQuant, Nair and Suggala 2024, arXiv 2406.17542.)
    What a trellis takes is nearly the best for the column, so the column keeps its codes where those are nearer.
    """
    values = zip(codes.split(group_size, dim=1), groups, strict=True)
    V, codes = torch.cat([grid.value(c, p) for c, p in values], dim=1).T.contiguous(), codes.T.contiguous()
    H = H.float()
    if levels := _compiled(grid, W):
        from quantdit.calibration.columns_numba import descent_visits

        descent(descent_visits(levels(groups), group_size, V, codes), H, V - W.T, passes, LEAF)
        return codes.T.contiguous()
    curvature = H.diagonal()[:, None].clamp_min(1e-30)

    def visit(i: int, slope: Tensor, moved: Tensor) -> None:
        params = groups[i // group_size]
        target = V[i] - slope[0] / curvature[i]
        c = grid.encode(target[:, None], params)
        v = grid.value(c, params)[:, 0]
        if torch.dist(v, target) > torch.dist(V[i], target):
            v, c = V[i], codes[i][:, None]
        moved[0] = v - V[i]
        V[i], codes[i] = v, c[:, 0]

    descent(each(visit), H, V - W.T, passes, LEAF)
    return codes.T.contiguous()


Visits = Callable[[int, int], None]  # of the columns from one to before another, and what brings their effect on one another
BlockVisits = Callable[[int, Tensor, Tensor, Tensor], Visits]


def descent(visits: BlockVisits, H: Tensor, D: Tensor, passes: int, leaf: int) -> None:
    """Visit the columns in turn, pass after pass until one changes nothing.

    Args:
        visits: `(first, M, moved, slope)`, of a block of columns that begins with the first: M is their part of H, `slope` their
            part of `H D`, and `moved` is where a visit puts by how much it changed its own.
        H: `[in, in]` float32.
        D: `[in, out]`, values less weights; is kept up to date.
        passes: at most.
        leaf: as of `sweep`.
    """
    block = DESCENT_BLOCK // leaf * leaf
    for _ in range(passes):
        changed = False
        for start in range(0, len(D), block):
            part = slice(start, min(start + block, len(D)))
            slope, moved = H[part] @ D, torch.empty_like(D[part])
            M = H[part, part]
            sweep(visits(start, M, moved, slope), M, moved, slope, leaf)
            changed = changed or bool(moved.any())
            D[part] += moved
        if not changed:
            break


def each(visit: Callable[[int, Tensor, Tensor], None]) -> BlockVisits:
    """Return what `descent` takes of `visit(i, slope, moved)`, which sees its two from column i on."""

    def visits(first: int, M: Tensor, moved: Tensor, slope: Tensor) -> Visits:
        return one_by_one(lambda i: visit(first + i, slope[i:], moved[i:]), M, moved, slope)

    return visits


def one_by_one(visit: Callable[[int], None], M: Tensor, change: Tensor, effect: Tensor) -> Visits:
    """Return the visits of single columns, whose effect each brings on those behind it; arguments as of `sweep`."""

    def visits(start: int, end: int) -> None:
        for i in range(start, end):
            visit(i)
            # Rounded before it is added, as compiled code does (columns_numba.py): `addr_` does so on some processors only.
            effect[i + 1 : end] += torch.outer(M[i + 1 : end, i], change[i])

    return visits


def sweep(visits: Visits, M: Tensor, change: Tensor, effect: Tensor, leaf: int) -> None:
    """Visit columns 0, 1, ...; visiting i sets `change[i]` and finds `sum_{j < i} M_ij change[j]` added to `effect[i]`.

    Halves of halves: once the first half of some columns has been visited, one product brings its effect on the second.

    Args:
        visits: of a leaf's columns.
        M: `[k, k]`.
        change: `[k, out]`, set by visits.
        effect: `[k, out]`, added to.
        leaf: columns within which the effect is brought one by one.
    """
    _sweep(visits, M, change, effect, leaf, 0, len(change))


# Not a function inside: one that calls itself is a cycle, and would keep the matrices until the garbage collector comes round.
def _sweep(visits: Visits, M: Tensor, change: Tensor, effect: Tensor, leaf: int, start: int, end: int) -> None:
    if end - start > leaf:
        middle = start + (end - start + 2 * leaf - 1) // (2 * leaf) * leaf
        _sweep(visits, M, change, effect, leaf, start, middle)
        effect[middle:end].addmm_(M[middle:end, start:middle], change[start:middle])
        _sweep(visits, M, change, effect, leaf, middle, end)
    else:
        visits(start, end)


def _compiled(grid: Grid, W: Tensor) -> Callable[[list[Params]], Levels] | None:
    """Return the grid's levels where columns_numba.py visits the columns: of scalar codes, on a CPU, where numba is installed."""
    return grid.levels if W.device.type == "cpu" and numba_is_installed() else None


def _fit_groups(W: Tensor, importance: Tensor, grid: Grid, group_size: int) -> list[Params]:
    parts = zip(W.split(group_size, dim=1), importance.split(group_size), strict=True)
    return [grid.fit(w, h) for w, h in parts]
