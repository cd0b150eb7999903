"""The Frechet distance between two sets of feature vectors.

It is a function of features only; whoever reports a value names the backbone of the features (see `features.BACKBONE`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of a set of features, the covariance as a factor.

    Attributes:
        mean: `[d]` float64.
        factor: `[k, d]` float64 with `factor.T @ factor` equal to the covariance (divisor count - 1); k = min(count, d).
        count: number of feature vectors summarised.
    """

    mean: torch.Tensor
    factor: torch.Tensor
    count: int


def summarise(features: torch.Tensor) -> FeatureStatistics:
    """Return mean and covariance factor of features `[n, d]`, any float dtype, n >= 2.

    Raises:
        ValueError: if the features are not such a matrix, or contain NaN or inf.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features are {list(features.shape)}, expected [n, d] with n >= 2: one row for each image")
    if not torch.isfinite(features).all():
        raise ValueError(f"features {list(features.shape)} contain NaN or inf: look at the images they come from")
    x = features.detach().to("cpu", torch.float64)
    mean = x.mean(dim=0)
    factor = (x - mean) / math.sqrt(len(x) - 1)
    if len(x) > x.shape[1]:
        factor = torch.linalg.qr(factor, mode="r").R  # X = QR gives X^T X = R^T R: [d, d] says as much as [n, d]
    return FeatureStatistics(mean, factor, len(x))


def frechet_distance(a: torch.Tensor | FeatureStatistics, b: torch.Tensor | FeatureStatistics) -> float:
    r"""Squared Frechet (2-Wasserstein) distance of the Gaussians fitted to two sets of features.

        |mean_a - mean_b|^2 + Tr(S_a) + Tr(S_b) - 2 Tr((S_a S_b)^(1/2))

    (Dowson and Landau 1982; as a measure of generated images: Heusel et al. 2017, arXiv 1706.08500, equation 6.) With factors
    S_a = A^T A and S_b = B^T B, the non-zero eigenvalues of S_a S_b = A^T (A B^T B) are those of (A B^T B) A^T = M M^T for
    M = A B^T, so the last trace is the sum of the singular values of M. No square root of a singular d x d matrix is taken:
    fewer images than dimensions are no numerical problem. They are a statistical one: the value is biased upwards by about
    the inverse of the number of images, so compare only values from equally many, and against that of other seeds.

    Args:
        a: features `[n, d]`, or their `summarise`d statistics.
        b: features `[m, d]`, or their `summarise`d statistics.

    Returns:
        The distance, >= 0, in squared units of the features.

    Raises:
        ValueError: if a set has fewer than two rows, NaN or inf, or if the widths differ.
    """
    a, b = (x if isinstance(x, FeatureStatistics) else summarise(x) for x in (a, b))
    _same_width(a.mean, b.mean)
    cross = torch.linalg.svdvals(a.factor @ b.factor.T).sum()
    distance = (a.mean - b.mean).square().sum() + a.factor.square().sum() + b.factor.square().sum() - 2 * cross
    return max(0.0, distance.item())  # equal sets may round to -1e-15 of the traces


def _same_width(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"features are {a.shape[-1]} and {b.shape[-1]} wide, expected equal: take both from one backbone")
