"""Frechet and kernel distance against closed forms, scipy's matrix square root, and many draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantdit.evaluation.metrics.discrepancy import kernel_distance
from quantdit.evaluation.metrics.frechet import frechet_distance, summarise

EPS = torch.finfo(torch.float64).eps


def features_with(mean: torch.Tensor, factor: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Features `[count, d]` whose sample mean and covariance are exactly `mean` and `factor.T @ factor`."""
    noise = torch.randn(count, len(factor), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = torch.linalg.qr(noise - noise.mean(dim=0)).Q  # orthonormal columns, each of mean zero
    return mean + (count - 1) ** 0.5 * basis @ factor


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gaussians_with_commuting_covariances():
    """|difference of means|^2 + sum of (difference of standard deviations)^2, here 25 + 1 + 0.25 + 0."""
    mean = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    a = features_with(torch.zeros_like(mean), torch.diag(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)), 50, seed=0)
    b = features_with(mean, torch.diag(torch.tensor([2.0, 1.5, 0.5], dtype=torch.float64)), 70, seed=1)
    assert frechet_distance(a, b) == pytest.approx(26.25, rel=1e-12)


def test_agrees_with_the_matrix_square_root():
    linalg = pytest.importorskip("scipy.linalg")
    a = random(200, 24, seed=0) @ (torch.eye(24) + 0.2 * random(24, 24, seed=1))
    b = random(90, 24, seed=2) @ (torch.eye(24) + 0.2 * random(24, 24, seed=3)) + 0.3
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = np.square(a.mean(0).numpy() - b.mean(0).numpy()).sum() + np.trace(cov_a + cov_b - 2 * root)
    # The square root of a product of condition number k is known to about k * eps.
    condition = np.linalg.cond(cov_a) * np.linalg.cond(cov_b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=10 * condition * EPS)
    assert 10 * condition * EPS < 1e-6


def test_fewer_images_than_dimensions():
    """Covariances of rank 9 and 14 in 60 dimensions; reference: square roots of the eigenvalues of their product."""
    a, b = random(10, 60, seed=0), 1.5 * random(15, 60, seed=1) + 0.2
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    roots = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt()
    expected = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * roots.sum()
    # A zero eigenvalue comes out as eps * norm, its square root as the root of that; there are 60 at most.
    tolerance = 2 * 60 * (EPS * torch.linalg.matrix_norm(cov_a @ cov_b)).sqrt().item()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), abs=tolerance)
    assert tolerance < 1e-3 * expected


@pytest.mark.parametrize("count", [20, 100])
def test_axioms_and_statistics(count: int):
    a, b = random(count, 32, seed=0), 2 * random(count, 32, seed=1)
    scale = (a.square().sum() + b.square().sum()).item() / count
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e3 * EPS * scale)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(a, a + 0.5) == pytest.approx(32 * 0.25, rel=1e-10)
    assert frechet_distance(summarise(a), summarise(b)) == pytest.approx(frechet_distance(a, b), rel=1e-12)
    covariance = summarise(a).factor.T @ summarise(a).factor
    torch.testing.assert_close(covariance, torch.cov(a.T), rtol=0, atol=1e3 * EPS)


def test_refuses_bad_features():
    good = random(10, 4, seed=0)
    bad = good.clone()
    bad[3, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(good, bad)
    with pytest.raises(ValueError, match="wide"):
        frechet_distance(good, random(10, 5, seed=1))
    with pytest.raises(ValueError, match="n >= 2"):
        frechet_distance(good, good[:1])
    with pytest.raises(ValueError, match="NaN"):
        kernel_distance(good, bad)
    with pytest.raises(ValueError, match="n >= 2"):
        kernel_distance(good[:1], good[:1])


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_kernel_distance_is_unbiased(correlation: float):
    """Mean over draws within four standard errors of zero, also for the paired images of two models that share seeds."""
    values = []
    for seed in range(200):
        x, z = random(24, 6, seed=2 * seed), random(24, 6, seed=2 * seed + 1)
        values.append(kernel_distance(x, correlation * x + (1 - correlation**2) ** 0.5 * z))
    assert abs(np.mean(values)) < 4 * np.std(values, ddof=1) / len(values) ** 0.5


def test_kernel_distance_value():
    """Point masses at x and y: k(x, x) + k(y, y) - 2 k(x, y)."""
    x, y = torch.full((8, 4), 1.0), torch.full((8, 4), 3.0)
    assert kernel_distance(x, y) == pytest.approx((1 + 1) ** 3 + (9 + 1) ** 3 - 2 * (3 + 1) ** 3)


def test_kernel_distance_of_a_set_to_itself_is_zero():
    x = random(40, 6, seed=0)
    assert kernel_distance(x, x) == 0.0
