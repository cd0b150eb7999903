"""lloyd_max.py's sums of a histogram, compiled by numba: the same numbers, without arrays of all values in between."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quantdit.system.compiled import compiled


def sums(values: Tensor, weights: Tensor, peak: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Return the mass of each bin, and mass times value, `[rows, bins]` float64 each.

    Args:
        values: `[rows, n]` float32 or float64.
        weights: `[rows, n]` of the same dtype, which may be expanded.
        peak: `[rows]` float64, not 0.
        bins: as `lloyd_max.histogram` has them.
    """
    mass, total = np.zeros((len(values), bins)), np.zeros((len(values), bins))
    _sums(values.numpy(), weights.numpy(), peak.numpy(), mass, total)
    return torch.from_numpy(mass), torch.from_numpy(total)


@compiled
def _sums(values, weights, peak, mass, total):
    bins = mass.shape[1]
    half = bins // 2
    for r in range(values.shape[0]):
        for i in range(values.shape[1]):
            value, weight = np.float64(values[r, i]), np.float64(weights[r, i])
            u = value / peak[r]
            place = np.sqrt(abs(u))
            place = np.floor((place if u > 0 else -place) * half + half)
            b = int(min(max(place, 0.0), bins - 1.0))
            mass[r, b] += weight
            total[r, b] += weight * value
