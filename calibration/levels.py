"""Level tables for 2-, 3- and 4-bit scalar codes: Lloyd-Max and twin-log, fitted to a sample of normalised weights."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

BINS = 4096


def histogram(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return bin means and bin masses, each `[<= BINS]` float64, of values with non-negative weights of the same shape."""
    values, weights = values.double().flatten(), weights.double().flatten()
    low, high = values.min(), values.max()
    index = ((values - low) / (high - low).clamp_min(1e-30) * (BINS - 1)).long()
    mass = torch.zeros(BINS, dtype=torch.float64).index_add_(0, index, weights)
    total = torch.zeros(BINS, dtype=torch.float64).index_add_(0, index, weights * values)
    used = mass > 0
    return total[used] / mass[used], mass[used]


def lloyd_max(points: Tensor, mass: Tensor, levels: int, iterations: int = 200) -> Tensor:
    """Return the levels `[levels]`, ascending, that minimise the weighted squared error (Lloyd 1957/1982; Max 1960).

    Deterministic: starts from quantiles of the mass and alternates nearest-level assignment and conditional means.
    """
    cumulative = mass.cumsum(0) / mass.sum()
    start = torch.searchsorted(cumulative, (torch.arange(levels, dtype=torch.float64) + 0.5) / levels)
    table = points[start.clamp_max(len(points) - 1)].clone()
    for _ in range(iterations):
        cell = torch.bucketize(points, (table[1:] + table[:-1]) / 2)
        cell_mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, cell, mass)
        cell_sum = torch.zeros(levels, dtype=torch.float64).index_add_(0, cell, mass * points)
        new = torch.where(cell_mass > 0, cell_sum / cell_mass.clamp_min(1e-300), table)
        if torch.equal(new, table):
            break
        table = new
    return table.sort().values


def twin_log_levels(bits: int, eta: float, low: float, high: float) -> Tensor:
    """Return the `2**bits` levels of twin-log quantization in -1..1, ascending (LRQ-DiT Eq. 7, each sign on its own).

    `u_q = 2^(a + step q) - eta`, `a = log2(low + eta)`, `step = (log2(high + eta) - a) / (2^(bits-1) - 1)`.
    """
    a = torch.log2(torch.tensor(low + eta, dtype=torch.float64))
    b = torch.log2(torch.tensor(high + eta, dtype=torch.float64))
    side = 2 ** torch.linspace(float(a), float(b), 2 ** (bits - 1), dtype=torch.float64) - eta
    return torch.cat([-side.flip(0), side])


def twin_log(points: Tensor, mass: Tensor, levels: int) -> Tensor:
    """Return the twin-log levels `[levels]` of least weighted squared error over a grid of eta, low and high clip."""
    peak = points.abs().max()
    u = points / peak
    best, best_error = None, float("inf")
    lows = torch.logspace(-2.7, -0.6, 13, base=10.0).tolist()  # .002 .. .25
    for eta, low, high in itertools.product(
        (0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6), lows, (1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
    ):
        if low >= high:
            continue
        table = twin_log_levels(levels.bit_length() - 1, eta, low, high)
        nearest = table[torch.bucketize(u, (table[1:] + table[:-1]) / 2)]
        error = float((mass * (u - nearest) ** 2).sum())
        if error < best_error:
            best, best_error = table, error
    assert best is not None
    return best * peak
