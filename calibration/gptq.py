"""Error feedback: GPTQ (Frantar et al. 2022, arXiv 2210.17323), algorithm 1, for any grid of codes.

H = G / rows + damp * mean(diag) * 1;   U = upper Cholesky factor of H^-1.  Column i is rounded, its error e = (w - q) / U_ii is
subtracted from the columns to the right as e U_ij; a group's parameters are fitted to the weights as they then stand.
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
    dead = diagonal == 0
    mean = diagonal.mean() if bool((~dead).any()) else torch.ones((), dtype=H.dtype)
    H = H + torch.diag(torch.where(dead, mean, torch.zeros_like(mean)) + damp * mean)
    lower = torch.linalg.cholesky(H)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()


def gptq(W: Tensor, H: Tensor, grid: Grid, group_size: int, damp: float = 0.01) -> tuple[Tensor, list[Params]]:
    """Return the codes `[out, in]` uint8 and each group's parameters.

    Args:
        W: `[out, in]` float32 in units of I.
        H: `[in, in]`, the Gram matrix of the inputs in the same (rotated) space, any positive multiple of it.
        grid: what the codes may be.
        group_size: divides `in`.
        damp: part of the mean diagonal added to the diagonal.
    """
    W = W.clone()
    U = inverse_factor(H, damp)
    importance = H.diagonal().float().clamp_min(1e-12)
    codes = torch.empty(W.shape, dtype=torch.uint8)
    groups: list[Params] = []
    # A block holds whole groups; a group longer than a block is fitted once, before its first column.
    block = GPTQ_BLOCK if GPTQ_BLOCK % group_size == 0 or group_size == W.shape[1] else group_size
    for start in range(0, W.shape[1], block):
        end = min(start + block, W.shape[1])
        W1 = W[:, start:end].clone()
        E1 = torch.zeros_like(W1)
        U1 = U[start:end, start:end]
        for i in range(end - start):
            column = start + i
            if column % group_size == 0:
                whole = W if group_size == W.shape[1] else W1[:, i : i + group_size]
                groups.append(grid.fit(whole, importance[column : column + group_size]))
            w = W1[:, i : i + 1]
            c = grid.encode(w, groups[-1])
            codes[:, column] = c[:, 0]
            e = (w - grid.value(c, groups[-1])) / U1[i, i]
            W1[:, i:] -= e * U1[i : i + 1, i:]
            E1[:, i] = e[:, 0]
        W[:, end:] -= E1 @ U[start:end, end:]
    return codes, groups


def rtn(W: Tensor, importance: Tensor, grid: Grid, group_size: int) -> tuple[Tensor, list[Params]]:
    """Round to nearest, group by group, without feedback; returns what `gptq` returns."""
    parts = W.split(group_size, dim=1)
    groups = [grid.fit(w, h) for w, h in zip(parts, importance.split(group_size), strict=True)]
    return torch.cat([grid.encode(w, p) for w, p in zip(parts, groups, strict=True)], dim=1), groups
