"""Twin-log quantization (TLQ): levels uniform in log2|w|, each sign on its own (LRQ-DiT, Eq. 7), half of the codes a side.

    w_hat = sign * M * (2^(a + step q) - eta),    a = log2(low + eta),    step = (log2(1 + eta) - a) / (2^(b-1) - 1)

M is where a side is clipped, a part of its largest magnitude; low, in parts of M, is its smallest level; eta bends the levels
from exponential (0) towards uniform. All are searched per row and per side and in parts of the row's own magnitudes, so that
the unit of the weights does not matter. There is no level at zero. As levels are stored in a table, a weight takes the nearest
of them; the paper rounds log2|w| instead, which is never nearer.

Tables are fitted to histograms, see lloyd_max.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from quantdit.calibration.lloyd_max import prefix_sums, table_error

SIDE_BINS = 512
ETAS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
LOWS = (0.002, 0.005, 0.01, 0.015, 0.022, 0.03, 0.042, 0.06, 0.08, 0.11, 0.15, 0.2, 0.27, 0.35, 0.45)
CLIPS = tuple(1.08**-i for i in range(40))  # 1 .. .05
# What `twin_log_paper` clips at, in parts of the side's mass.
LOW_PERCENTILES = (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.36)
HIGH_PERCENTILES = (1.0, 0.9997, 0.999, 0.997, 0.99, 0.98, 0.96, 0.93, 0.9, 0.86)


def twin_log_levels(count: int, eta: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the `count` magnitudes of one side `[..., count]`, from low to high; eta, low, high `[...]` float64 (Eq. 7)."""
    a, b = torch.log2(low + eta)[..., None], torch.log2(high + eta)[..., None]
    return 2 ** (a + (b - a) * torch.linspace(0, 1, count, dtype=torch.float64)) - eta[..., None]


def twin_log(points: Tensor, mass: Tensor, levels: int) -> Tensor:
    """Return the levels `[rows, levels]`, ascending, of least weighted squared error over ETAS, LOWS and CLIPS.

    The candidates of a side are the same for every row, and their errors are linear in the row's histogram: a product of two
    matrices is all rows' errors with all candidates.
    """
    eta, low, clip = torch.cartesian_prod(*(torch.tensor(t, dtype=torch.float64) for t in (ETAS, LOWS, CLIPS))).T
    candidates = twin_log_levels(levels // 2, eta, low, torch.ones_like(low)) * clip[:, None]  # [candidates, levels / 2]
    middles = (candidates[:, 1:] + candidates[:, :-1]) / 2
    centres = ((torch.arange(SIDE_BINS, dtype=torch.float64) + 0.5) / SIDE_BINS).square()
    nearest = candidates.gather(1, torch.searchsorted(middles, centres.expand(len(candidates), -1).contiguous()))
    errors = torch.cat([nearest.square(), -2 * nearest], dim=1).T  # less the row's power, which is the same for all

    def best(u: Tensor, mass: Tensor) -> Tensor:
        return candidates[(torch.cat([mass, mass * u], dim=1) @ errors).argmin(dim=1)]

    return _both_sides(points, mass, best)


def twin_log_paper(points: Tensor, mass: Tensor, levels: int) -> Tensor:
    """Return the levels `[rows, levels]`, ascending, of Eq. 7 as printed: eta = 0, steps of log2 uniform between two percentiles.

    The percentiles of a side are those of least weighted squared error. The released code clips at such percentiles, too, but
    counts the other sign's zeros, so that they have no effect; and it has one value more on the negative side.
    """

    def best(u: Tensor, mass: Tensor) -> Tensor:
        u = u.clamp_min(SIDE_BINS**-2.0)  # log2
        prefix = prefix_sums(u, mass)
        cumulative = prefix[0, :, 1:].contiguous()

        def percentile(p: float) -> Tensor:
            index = torch.searchsorted(cumulative, p * cumulative[:, -1:])
            return u.gather(1, index.clamp_max(SIDE_BINS - 1))[:, 0]

        table, least = torch.ones(len(u), levels // 2, dtype=torch.float64), torch.full((len(u),), torch.inf, dtype=torch.float64)
        for low, high in itertools.product(map(percentile, LOW_PERCENTILES), map(percentile, HIGH_PERCENTILES)):
            candidate = twin_log_levels(levels // 2, torch.zeros_like(low), low, torch.maximum(low, high))
            error = table_error(u, prefix, candidate)
            table = torch.where((error < least)[:, None], candidate, table)
            least = torch.minimum(error, least)
        return table

    return _both_sides(points, mass, best)


def _both_sides(points: Tensor, mass: Tensor, best: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the table of the levels that `best` finds for each sign's magnitudes in parts of the largest.

    `best` gets means and masses of bins, both `[rows, SIDE_BINS]`, and returns ascending levels. A side without values gets
    the levels of the other one.
    """
    sides = []
    for sign in (-1, 1):
        inside = (mass > 0) & ((points >= 0) if sign > 0 else (points < 0))
        peak = (points.abs() * inside).amax(dim=1, keepdim=True)
        u = torch.where(inside, points.abs() / torch.where(peak > 0, peak, torch.ones_like(peak)), torch.zeros_like(points))
        index = (u.sqrt() * SIDE_BINS).long().clamp_max(SIDE_BINS - 1)
        counted = torch.where(inside, mass, torch.zeros_like(mass))
        bins = torch.zeros(len(u), SIDE_BINS, dtype=torch.float64).scatter_add_(1, index, counted)
        total = torch.zeros_like(bins).scatter_add_(1, index, counted * u)
        middle = ((torch.arange(SIDE_BINS, dtype=torch.float64) + 0.5) / SIDE_BINS).square()
        sides.append(best(torch.where(bins > 0, total / bins, middle), bins) * peak)
    negative, positive = (torch.where((own[:, -1:] > 0), own, other) for own, other in (sides, sides[::-1]))
    return torch.cat([-negative.flip(1), positive], dim=1)
