"""Distances between two sets of feature vectors: Frechet distance and kernel distance.

Both are functions of features only; whoever reports a value names the backbone of the features (see `features.BACKBONE`).
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
    the inverse of the number of images, so compare only values from equally many, and against a noise floor.

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


def kernel_distance(
    a: torch.Tensor, b: torch.Tensor, subset_size: int = 100, subsets: int = 100, seed: int = 0
) -> tuple[float, float]:
    r"""Kernel distance: unbiased squared maximum mean discrepancy with the kernel (x.y / d + 1)^3, averaged over subsets.

    (Binkowski et al. 2018, arXiv 1801.01401, section 4.) A subset of s rows x_i of `a` and y_i of `b` gives the U-statistic

        1 / (s (s - 1)) sum_{i != j} k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i)

    (Gretton et al. 2012, JMLR 13, Lemma 6 with equation 4). It leaves the pairs i = i out of the mixed terms too, hence is
    unbiased also where x_i and y_i belong together: sets of equal length are taken as such pairs (the images of one seed by
    two models) and stay aligned. A value may be negative.

    Each round deals shuffled rows into disjoint, hence independent, subsets; rounds repeat until `subsets` are reached. The
    standard error is the deviation between subsets of a round over the root of their number: exact for one round, an upper
    bound for more. It does not shrink with the number of rounds, which reuse the same images; subsets drawn at random and a
    deviation divided by the root of `subsets` would pretend that.

    Args:
        a: `[n, d]` float features.
        b: `[m, d]` float features.
        subset_size: rows of each set in one subset, at least 2; at most half of the smaller set.
        subsets: least number of subsets, rounded up to whole rounds.
        seed: of the shuffles.

    Returns:
        Mean over all subsets and a standard error that is not too small.

    Raises:
        ValueError: if the widths differ, values are not finite, or the sets are too small for two disjoint subsets.
    """
    _same_width(a, b)
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("features contain NaN or inf: look at the images they come from")
    per_round = min(len(a), len(b)) // max(subset_size, 1)
    if subset_size < 2 or per_round < 2 or subsets < 1:
        raise ValueError(
            f"subset_size {subset_size}, subsets {subsets}: expected subset_size >= 2, subsets >= 1 and at least two disjoint "
            f"subsets in {min(len(a), len(b))} rows; choose a subset_size up to {min(len(a), len(b)) // 2}"
        )
    a, b = (x.detach().to("cpu", torch.float64) for x in (a, b))
    generator = torch.Generator().manual_seed(seed)
    rounds = []
    for _ in range(math.ceil(subsets / per_round)):
        rows_a = torch.randperm(len(a), generator=generator)
        rows_b = rows_a if len(a) == len(b) else torch.randperm(len(b), generator=generator)
        parts = zip(rows_a.split(subset_size)[:per_round], rows_b.split(subset_size)[:per_round], strict=True)
        rounds.append(torch.stack([_mmd2(a[i], b[j]) for i, j in parts]))
    values = torch.stack(rounds)  # [rounds, per_round]
    error = (values.var(dim=1).mean() / per_round).sqrt()
    return values.mean().item(), error.item()


def _mmd2(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """U-statistic above for x, y `[s, d]`."""
    size, width = x.shape

    def off_diagonal(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        kernel = (u @ v.T / width + 1) ** 3
        return kernel.sum() - kernel.diagonal().sum()

    return (off_diagonal(x, x) + off_diagonal(y, y) - 2 * off_diagonal(x, y)) / (size * (size - 1))


def _same_width(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"features are {a.shape[-1]} and {b.shape[-1]} wide, expected equal: take both from one backbone")
