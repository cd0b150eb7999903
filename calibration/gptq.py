"""Error feedback: GPTQ (Frantar et al. 2022, arXiv 2210.17323), algorithm 1, for any grid of codes.

H = G / rows + damp * mean(diag) * 1;   U = upper Cholesky factor of H^-1.  Column i is rounded, its error e = (w - q) / U_ii is
subtracted from the columns to the right as e U_ij.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantdit.calibration.grids import Grid, Params

GPTQ_BLOCK = 128


def inverse_factor(H: Tensor, damp: float) -> Tensor:
    """Return U `[k, k]` upper triangular with `U^T U = (H + damp * mean(diag H) 1)^-1`, in float64 inside.

    Dead inputs (H_ii = 0) get the mean diagonal, so that their weights are merely rounded.
    """
    H = H.double()
    diagonal = H.diagonal()
    dead = diagonal <= 0
    mean = diagonal.clamp_min(0).mean() if bool((~dead).any()) else torch.ones((), dtype=H.dtype)
    H = H + torch.diag(torch.where(dead, mean, torch.zeros_like(mean)) + damp * mean)
    lower = torch.linalg.cholesky(H)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()


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
    whole = group_size == width
    importance = H.diagonal().float().clamp_min(1e-12)
    groups = _fit_groups(W, importance, grid, group_size) if act_order or whole else []
    W = W[:, order].clone()
    U = inverse_factor(H[order][:, order], damp)
    codes = torch.empty(W.shape, dtype=torch.uint8)
    # A block holds whole groups where they are fitted on the way.
    block = GPTQ_BLOCK if groups or GPTQ_BLOCK % group_size == 0 else group_size
    for start in range(0, width, block):
        end = min(start + block, width)
        W1 = W[:, start:end].clone()
        E1 = torch.zeros_like(W1)
        U1 = U[start:end, start:end]
        for i in range(end - start):
            column = int(order[start + i])
            if column // group_size == len(groups):
                groups.append(grid.fit(W1[:, i : i + group_size], importance[column : column + group_size]))
            params = groups[column // group_size]
            w = W1[:, i : i + 1]
            c = grid.encode(w, params)
            codes[:, column] = c[:, 0]
            e = (w - grid.value(c, params)) / U1[i, i]
            W1[:, i:] -= e * U1[i : i + 1, i:]
            E1[:, i] = e[:, 0]
        W[:, end:] -= E1 @ U[start:end, end:]
    return codes, groups


def rtn(W: Tensor, importance: Tensor, grid: Grid, group_size: int) -> tuple[Tensor, list[Params]]:
    """Round to nearest, group by group, without feedback; importance `[in]`, the rest as for `gptq`."""
    groups = _fit_groups(W, importance, grid, group_size)
    parts = zip(W.split(group_size, dim=1), groups, strict=True)
    return torch.cat([grid.encode(w, p) for w, p in parts], dim=1), groups


def descend(codes: Tensor, W: Tensor, H: Tensor, grid: Grid, groups: list[Params], group_size: int, passes: int) -> Tensor:
    """Return codes `[out, in]` of no larger output error `tr((V - W) H (V - W)^T)`, V their values: coordinate descent.

    GPTQ never goes back to a column. Here each column in turn takes the level nearest to the best real number for it, all others
    held, `v_i - ((V - W) H)_i / H_ii`, which no other level can beat. (CDQuant, Nair and Suggala 2024, arXiv 2406.17542.)
    """
    columns = [grid.value(codes[:, i : i + 1], groups[i // group_size]) for i in range(W.shape[1])]
    V, codes = torch.cat(columns, dim=1), codes.clone()
    H = H.float()
    slope = (V - W) @ H
    curvature = H.diagonal().clamp_min(1e-30)
    for _ in range(passes):
        changed = False
        for start in range(0, W.shape[1], GPTQ_BLOCK):
            part = slice(start, min(start + GPTQ_BLOCK, W.shape[1]))
            slope1, H1, before = slope[:, part].clone(), H[part, part], V[:, part].clone()
            for i in range(part.stop - start):
                column = start + i
                params = groups[column // group_size]
                best = V[:, column] - slope1[:, i] / curvature[column]
                c = grid.encode(best[:, None], params)
                v = grid.value(c, params)[:, 0]
                slope1 += (v - V[:, column])[:, None] * H1[i]
                V[:, column], codes[:, column] = v, c[:, 0]
            moved = V[:, part] - before
            changed = changed or bool(moved.any())
            slope += moved @ H[part]
        if not changed:
            break
    return codes


def _fit_groups(W: Tensor, importance: Tensor, grid: Grid, group_size: int) -> list[Params]:
    parts = zip(W.split(group_size, dim=1), importance.split(group_size), strict=True)
    return [grid.fit(w, h) for w, h in parts]
