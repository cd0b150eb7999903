"""Maximum mean discrepancy of two sets of features, over all of their samples.

The squared MMD of a polynomial kernel is the KID; over all samples it is what its authors average over random subsets to save
work, with less noise. With a Gaussian kernel on CLIP embeddings it is CMMD (Jayasumana et al. 2024, arXiv 2401.09603), which
needs far fewer images than FID. On other features, the reference's median distance takes the place of CMMD's bandwidth, and the
name of the backbone goes with the number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CMMD_BANDWIDTH, CMMD_SCALE = 10.0, 1000.0  # of CMMD: sigma on embeddings of norm 1, and what it is multiplied by
Kernel = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Grams:
    """Kernel matrices of two sets of equal length, so that any subset's discrepancy costs no more products.

    Attributes:
        a: `[n, n]` float64, within the first set.
        b: `[n, n]`, within the second.
        mixed: `[n, n]`, first by second.
    """

    a: Tensor
    b: Tensor
    mixed: Tensor

    def squared(self, rows: Tensor) -> float:
        """Return the unbiased squared MMD of a subset, its rows taken in both sets (Gretton et al. 2012, Lemma 6).

        The pairs i = i are left out of the mixed term as well, so that sets whose rows belong together have no bias.
        """
        size = len(rows)
        total = sum(
            sign * (k[rows][:, rows].sum() - k[rows, rows].sum()) for sign, k in ((1, self.a), (1, self.b), (-2, self.mixed))
        )
        return float(total / (size * (size - 1)))


def grams(a: Tensor, b: Tensor, kernel: Kernel) -> Grams:
    """Return the kernel matrices of features `[n, d]` each.

    Raises:
        ValueError: they differ in shape, have fewer than two rows, or hold NaN or inf.
    """
    if a.shape != b.shape or a.ndim != 2 or len(a) < 2:
        raise ValueError(f"features are {list(a.shape)} and {list(b.shape)}, expected equal [n, d] with n >= 2")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("features contain NaN or inf: look at the images they come from")
    a, b = a.double(), b.double()
    return Grams(kernel(a, a), kernel(b, b), kernel(a, b))


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Return the KID of features `[n, d]` each: the unbiased squared MMD of all rows. It may be negative.

    Raises:
        ValueError: as `grams`.
    """
    return grams(a, b, polynomial).squared(torch.arange(len(a)))


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """Return KID's kernel `(x.y / d + 1)^3` (Binkowski et al. 2018, arXiv 1801.01401)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(bandwidth: float) -> Kernel:
    """Return the kernel `exp(-|x - y|^2 / (2 bandwidth^2))`."""
    return lambda x, y: torch.exp(-torch.cdist(x, y).square() / (2 * bandwidth**2))


def median_distance(x: Tensor) -> float:
    """Return the median distance of different rows of x `[n, d]`, the usual bandwidth; 1 if that is zero."""
    found = torch.pdist(x.double()).median().item()
    return found or 1.0


def cmmd(a: Tensor, b: Tensor) -> float:
    """Return CMMD as published: 1000 times the biased squared MMD of embeddings scaled to norm 1, bandwidth 10."""
    a, b = (torch.nn.functional.normalize(x.double(), dim=1) for x in (a, b))
    kernel = gaussian(CMMD_BANDWIDTH)
    return CMMD_SCALE * float(kernel(a, a).mean() + kernel(b, b).mean() - 2 * kernel(a, b).mean())
