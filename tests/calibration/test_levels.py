"""Level tables against the optimum that is known for the Gaussian, and against uniform levels where tails are heavy."""

from __future__ import annotations

import math

import pytest
import torch

from quantdit.calibration.levels import BINS, histogram, lloyd_max, twin_log, twin_log_levels

# Least normalised squared error of a Gaussian, and its positive levels (Max, Quantizing for minimum distortion, 1960, table 1).
MAX_1960 = {
    2: (0.1175, [0.4528, 1.510]),
    3: (0.03454, [0.2451, 0.7560, 1.344, 2.152]),
    4: (0.009497, [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733]),
}


def gaussian(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def student_t3(count: int, seed: int = 0) -> torch.Tensor:
    """Normal divided by the root of a chi-squared with 3 degrees of freedom over 3."""
    z = torch.randn(4, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z[0] / (z[1:].square().sum(dim=0) / 3).sqrt()


def squared_errors(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Squared distance of each value to its nearest level; the levels are few, so all are tried."""
    best = torch.full_like(x, math.inf)
    for level in table.tolist():
        best = torch.minimum(best, (x - level).square())
    return best


def nmse(x: torch.Tensor, table: torch.Tensor) -> float:
    return float(squared_errors(x, table).sum() / x.square().sum())


def fitted(method, x: torch.Tensor, bits: int) -> torch.Tensor:
    return method(*histogram(x, torch.ones_like(x)), 2**bits)


@pytest.mark.parametrize("bits", MAX_1960)
def test_lloyd_max_of_the_gaussian_density(bits: int):
    """On a grid, that is without sampling error. The published numbers have four digits.

    Lloyd's iteration ends once no boundary crosses a grid point any more; on this grid that is within 0.06 % of the optimum.
    """
    points = torch.arange(-16384, 16385, dtype=torch.float64) / 2048
    mass = torch.exp(-points.square() / 2)
    table = lloyd_max(points, mass, 2**bits)
    error, levels = MAX_1960[bits]
    found = float((mass * squared_errors(points, table)).sum() / (mass * points.square()).sum())
    assert found == pytest.approx(error, rel=1e-3)
    # The optimum is flat: a level that is off by d adds some d^2 / 2^bits, so levels are known less well than the error.
    assert table.tolist() == pytest.approx([-v for v in reversed(levels)] + levels, abs=0.01)


@pytest.mark.parametrize("bits", MAX_1960)
def test_lloyd_max_of_gaussian_samples(bits: int):
    """NMSE .0347 and .0096 at 3 and 4 bits within what 200,000 samples tell: six standard errors of the ratio.

    Fitting 2^bits levels to the very sample gains 2^bits / n at most.
    """
    n = 200_000
    x = gaussian(n)
    table = fitted(lloyd_max, x, bits)
    known = MAX_1960[bits][0]
    standard_error = float((squared_errors(x, table) - known * x.square()).std()) / n**0.5
    assert abs(nmse(x, table) - known) <= 6 * standard_error + 2**bits / n
    assert 6 * standard_error < 0.06 * known


@pytest.mark.parametrize("method", [lloyd_max, twin_log])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_more_levels_are_better_and_ascending(method, bits: int):
    x = student_t3(2000)
    table = fitted(method, x, bits)
    assert table.shape == (2**bits,)
    assert bool((table.diff() > 0).all())
    assert nmse(x, table) < nmse(x, fitted(method, x, bits - 1))
    assert torch.equal(table, fitted(method, x, bits))


@pytest.mark.parametrize("bits", [3, 4])
def test_twin_log_beats_uniform_levels_on_student_t3(bits: int):
    """Uniform levels with the best of 100 clips, on samples that neither table has seen."""
    x, fresh = student_t3(100_000), student_t3(100_000, seed=1)
    peak = float(x.abs().max())
    uniform = [torch.linspace(-clip, clip, 2**bits, dtype=torch.float64) for clip in torch.linspace(0.01, 1, 100) * peak]
    best = min(uniform, key=lambda table: nmse(x, table))
    table = fitted(twin_log, x, bits)
    assert nmse(x, table) < nmse(x, best)
    clipped = fresh.clamp(-peak, peak)
    assert nmse(clipped, table) < nmse(clipped, best)


def test_lloyd_max_is_no_worse_than_twin_log():
    """It is the optimum of which twin-log's family is a part; both are fitted to one Gaussian sample."""
    x = gaussian(50_000)
    assert nmse(x, fitted(lloyd_max, x, 4)) < nmse(x, fitted(twin_log, x, 4)) * 1.03


def test_lloyd_max_is_a_fixed_point():
    """Every level is the mean of the values nearest to it."""
    points = torch.arange(-1024, 1025, dtype=torch.float64) / 256
    mass = torch.exp(-points.square() / 2)
    table = lloyd_max(points, mass, 4, iterations=10_000)
    nearest = (points[:, None] - table).abs().argmin(dim=1)
    for level in range(4):
        cell = nearest == level
        assert float((mass[cell] * points[cell]).sum() / mass[cell].sum()) == pytest.approx(float(table[level]), abs=1e-9)


@pytest.mark.parametrize("values", [[0.5], [0.0, 0.0], [-1.0, 2.0], [-1.0, 0.0, 3.0]])
def test_fewer_values_than_levels_are_all_levels(values: list[float]):
    x = torch.tensor(values, dtype=torch.float64).repeat(50)
    table = fitted(lloyd_max, x, 3)
    assert table.shape == (8,)
    assert nmse(x, table) == 0 or not any(values)
    assert float(squared_errors(x, table).max()) == pytest.approx(0, abs=1e-30)


def test_weights_count_as_copies():
    x, copies = gaussian(500), torch.randint(0, 5, (500,), generator=torch.Generator().manual_seed(0))
    copies[0] = copies[x.argmin()] = copies[x.argmax()] = 1  # the ends of the histogram stay
    weighted = histogram(x, copies.double())
    repeated = x.repeat_interleave(copies)
    for a, b in zip(weighted, histogram(repeated, torch.ones_like(repeated)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)  # sums of the same numbers, a few each, in another order


def test_histogram_keeps_mass_and_mean():
    x, weights = gaussian(5000), gaussian(5000, seed=1).abs()
    points, mass = histogram(x, weights)
    assert len(points) == len(mass) <= BINS
    assert bool((mass > 0).all())
    assert bool((points.diff() > 0).all())
    assert float(mass.sum()) == pytest.approx(float(weights.sum()), rel=1e-12)
    assert float((mass * points).sum()) == pytest.approx(float((weights * x).sum()), abs=1e-12 * float((weights * x.abs()).sum()))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_twin_log_levels_follow_the_equation(bits: int):
    """The levels 2^(a + step q) - eta run from low to high on each side, and plus eta they are a geometric sequence."""
    eta, low, high = 0.1, 0.02, 0.9
    table = twin_log_levels(bits, eta, low, high)
    side = table[2 ** (bits - 1) :]
    assert torch.equal(table, -table.flip(0))
    assert (float(side[0]), float(side[-1])) == pytest.approx((low, high), abs=1e-12)
    ratios = (side[1:] + eta) / (side[:-1] + eta)
    ratio = ((high + eta) / (low + eta)) ** (1 / (2 ** (bits - 1) - 1))
    assert ratios.tolist() == pytest.approx([ratio] * len(ratios), rel=1e-12)


def test_tables_scale_with_their_values():
    """By a power of two, so exactly."""
    x = gaussian(1000)
    for method in (lloyd_max, twin_log):
        assert torch.equal(fitted(method, x * 16, 3), fitted(method, x, 3) * 16)
