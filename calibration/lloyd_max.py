"""Level tables for scalar codes by the density of the weights: Lloyd-Max, fitted or of the Gaussian. twinlog.py has the others.

Tables are fitted to histograms `points`, `mass` `[rows, n]` float64: what each row's values are, ascending, and how much they
count; a row is an output channel, or the only one stands for a whole weight.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from quantdit.system.optional_import import numba_is_installed

BINS = 2048
COMPILED = (torch.float32, torch.float64)


def histogram(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return bin means and bin masses, each `[rows, BINS]` float64.

    Bins end at `+-peak * (j / (BINS / 2))^2`, peak the row's largest magnitude: fine near zero, where most weights lie when one
    of them is an outlier. Empty bins have mass 0 and their middle as the mean, so that means ascend.

    Args:
        values: `[rows, n]` float.
        weights: `[rows, n]` or `[n]`, not negative.
    """
    peak = values.abs().amax(dim=1, keepdim=True).double()
    peak = torch.where(peak > 0, peak, torch.ones_like(peak))
    mass, total = _sums(values, weights.expand_as(values), peak)
    half = BINS // 2
    middle = (torch.arange(BINS, dtype=torch.float64) + 0.5 - half) / half
    return torch.where(mass > 0, total / mass, middle * middle.abs() * peak), mass


def _sums(values: Tensor, weights: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mass of each bin, and mass times value."""
    if values.device.type == "cpu" and values.dtype in COMPILED and numba_is_installed():
        from quantdit.calibration.histogram_numba import sums

        return sums(values, weights, peak[:, 0], BINS)
    values, weights, half = values.double(), weights.double(), BINS // 2
    u = values / peak
    index = (torch.sign(u) * u.abs().sqrt() * half + half).floor_().clamp_(0, BINS - 1).long()
    mass = torch.zeros(len(values), BINS, dtype=torch.float64, device=values.device).scatter_add_(1, index, weights)
    return mass, torch.zeros_like(mass).scatter_add_(1, index, weights * values)


def prefix_sums(points: Tensor, mass: Tensor) -> Tensor:
    """Return `[3, rows, n + 1]`: mass, mass times value, and mass times squared value of the points before each one."""
    density = torch.stack([mass, mass * points, mass * points.square()])
    return torch.nn.functional.pad(density.cumsum(dim=-1), (1, 0))


def cells(points: Tensor, prefix: Tensor, table: Tensor) -> Tensor:
    """Return `[2, rows, levels]`: mass, and mass times value, of the points nearest to each level.

    Args:
        points: `[rows, n]` float64, ascending.
        prefix: what `prefix_sums` made of them.
        table: `[rows, levels]` float64, ascending.
    """
    middles = (table[:, 1:] + table[:, :-1]) / 2
    cut = torch.nn.functional.pad(torch.searchsorted(points, middles), (1, 0))
    cut = torch.nn.functional.pad(cut, (0, 1), value=points.shape[1])
    return prefix[:2].gather(2, cut.expand(2, *cut.shape)).diff(dim=2)


def table_error(points: Tensor, prefix: Tensor, table: Tensor) -> Tensor:
    """Return the weighted squared error `[rows]` of rounding to the nearest level; arguments as for `cells`."""
    cell_mass, cell_sum = cells(points, prefix, table)
    return prefix[2, :, -1] + (table * (table * cell_mass - 2 * cell_sum)).sum(dim=1)


def lloyd_max(points: Tensor, mass: Tensor, levels: int, iterations: int = 200) -> Tensor:
    """Return the levels `[rows, levels]`, ascending, that minimise the weighted squared error (Lloyd 1957/1982; Max 1960).

    Deterministic: alternates nearest-level assignment and conditional means from two starts, and keeps the better. One is as
    dense as the cube root of the density, which is optimal for many levels (Panter and Dite 1951); the other as the bins,
    for rows with outliers that are worth a level each.
    """
    window = points.shape[1] // 64 | 1  # wide enough to hold some values where they are sparse
    density = torch.nn.functional.avg_pool1d(mass[:, None], window, 1, window // 2)[:, 0]
    dense = (density * torch.gradient(points, dim=1)[0].square()).pow(1 / 3)
    prefix = prefix_sums(points, mass)
    first, second = (_lloyd(points, prefix, start, levels, iterations) for start in (dense, torch.ones_like(dense)))
    better = table_error(points, prefix, first) <= table_error(points, prefix, second)
    return torch.where(better[:, None], first, second)


def _lloyd(points: Tensor, prefix: Tensor, start: Tensor, levels: int, iterations: int) -> Tensor:
    cumulative = start.cumsum(dim=1)
    quantile = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels * cumulative[:, -1:]
    table = points.gather(1, torch.searchsorted(cumulative, quantile).clamp_max(points.shape[1] - 1))
    for _ in range(iterations):
        cell_mass, cell_sum = cells(points, prefix, table)
        new = torch.where(cell_mass > 0, cell_sum / cell_mass, table)
        if torch.equal(new, table):
            break
        table = new
    return table.sort(dim=1).values


def gaussian(points: Tensor, mass: Tensor, levels: int) -> Tensor:
    """Return the Lloyd-Max levels of N(0, 1) `[rows, levels]` whatever the rows are: the table that needs no weights.

    For rows of RMS 1, which rotation has made nearly Gaussian (as OrbitQuant, 2026, does).
    """
    return torch.tensor(_gaussian_levels(levels), dtype=torch.float64).expand(len(points), -1)


@cache
def _gaussian_levels(levels: int) -> tuple[float, ...]:
    """Lloyd's iteration with the exact means of cells of the normal density, from levels as dense as its cube root."""
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    start = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    table = normal.icdf(start) * math.sqrt(3)
    infinity = torch.full((1,), torch.inf, dtype=torch.float64)
    for _ in range(100_000):
        edges = torch.cat([-infinity, (table[1:] + table[:-1]) / 2, infinity])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        new = (density[:-1] - density[1:]) / normal.cdf(edges).diff()
        new = (new - new.flip(0)) / 2
        step, table = float((new - table).abs().max()), new
        if step < 1e-8:
            break
    return tuple(table.tolist())
