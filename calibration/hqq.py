"""Half-quadratic quantization (HQQ; Badri and Shaji 2023): a group's zero point from its weights alone, robust to outliers.

    min over z of ||w - s (q - z)||_p^p,    q = clip(round(w / s + z)),    p < 1, s from the group's range

is split by e, the part of the residual that is taken for outliers:
    e <- shrink(w - s (q - z), beta),  shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0)
    z <- mean(q - (w - e) / s);        beta <- kappa beta
"""

from __future__ import annotations

import torch
from torch import Tensor

P, BETA, KAPPA, ITERATIONS = 0.7, 10.0, 1.01, 20  # the authors' defaults


def hqq_zero_point(w: Tensor, step: Tensor, levels: int) -> Tensor:
    """Return the zero point `[rows]` float32, a real number, of the least p-norm met: `w ~= step * (codes - zero_point)`.

    Residuals are taken in steps, where the authors take them in the weights' own unit: the result scales with the weights.

    Args:
        w: `[rows, n]` float32, a group a row.
        step: `[rows]`, positive.
        levels: codes are 0..levels - 1.
    """
    u = w / step[:, None]
    zero = -u.amin(dim=1)
    best, least = zero, torch.full_like(zero, torch.inf)
    beta = BETA
    for _ in range(ITERATIONS):
        codes = (u + zero[:, None]).round().clamp(0, levels - 1)
        residual = u - (codes - zero[:, None])
        size = residual.abs()
        norm = size.pow(P).sum(dim=1)
        best = torch.where(norm < least, zero, best)
        least = torch.minimum(norm, least)
        outlier = residual.sign() * (size - size.pow(P - 1) / beta).clamp_min(0)  # 0^(p-1) is infinite, so 0 stays 0
        zero = (codes - (u - outlier)).mean(dim=1)
        beta *= KAPPA
    return best
