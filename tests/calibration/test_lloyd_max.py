"""Level tables against the optimum that is known for the Gaussian; what holds for every way to choose levels."""

from __future__ import annotations

import math

import pytest
import torch

from quantdit.calibration.grids import TABLES
from quantdit.calibration.lloyd_max import BINS, gaussian, histogram, lloyd_max, prefix_sums, table_error

# Least normalised squared error of a Gaussian, and its positive levels (Max, Quantizing for minimum distortion, 1960, table 1).
MAX_1960 = {
    2: (0.1175, [0.4528, 1.510]),
    3: (0.03454, [0.2451, 0.7560, 1.344, 2.152]),
    4: (0.009497, [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733]),
}
FITTED = {name: method for name, method in TABLES.items() if name != "gaussian"}


def gaussian_samples(count: int, seed: int = 0) -> torch.Tensor:
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
    return method(*histogram(x[None], torch.ones_like(x)), 2**bits)[0]


@pytest.mark.parametrize("bits", MAX_1960)
def test_lloyd_max_of_the_gaussian_density(bits: int):
    """On a grid, that is without sampling error. The published numbers have four digits.

    Lloyd's iteration ends once no boundary crosses a grid point any more; on this grid that is within 0.06 % of the optimum.
    """
    points = torch.arange(-16384, 16385, dtype=torch.float64) / 2048
    mass = torch.exp(-points.square() / 2)
    table = lloyd_max(points[None], mass[None], 2**bits)[0]
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
    x = gaussian_samples(n)
    table = fitted(lloyd_max, x, bits)
    known = MAX_1960[bits][0]
    standard_error = float((squared_errors(x, table) - known * x.square()).std()) / n**0.5
    assert abs(nmse(x, table) - known) <= 6 * standard_error + 2**bits / n
    assert 6 * standard_error < 0.06 * known


@pytest.mark.parametrize("bits", MAX_1960)
def test_gaussian_is_the_published_table(bits: int):
    """To the four digits that are published, whatever the rows."""
    for rows in (torch.zeros(3, 10), gaussian_samples(10)[None] * 5):
        table = gaussian(rows.double(), torch.ones(rows.shape), 2**bits)
        assert table.shape == (len(rows), 2**bits)
        assert table[0].tolist() == pytest.approx([-v for v in reversed(MAX_1960[bits][1])] + MAX_1960[bits][1], rel=5e-4)


def test_gaussian_of_64_levels_is_a_fixed_point():
    """Nobody published these: each level is the mean of its cell, integrated by the midpoint rule on steps of 1e-4."""
    table = gaussian(torch.zeros(1, 1), torch.ones(1, 1), 64)[0]
    x = torch.arange(-90_000, 90_000, dtype=torch.float64) / 10_000 + 5e-5
    density = torch.exp(-x.square() / 2)
    cell = torch.bucketize(x, (table[1:] + table[:-1]) / 2)
    mass, total = (torch.zeros(64, dtype=torch.float64).index_add_(0, cell, d) for d in (density, density * x))
    # A cell's end is off by up to one step, of which its mean sees half times the part that a step is of the cell.
    assert (total / mass).tolist() == pytest.approx(table.tolist(), abs=1e-4)


@pytest.mark.parametrize("name", FITTED)
def test_more_levels_are_better_and_ascending(name: str):
    x, method = student_t3(2000), FITTED[name]
    errors = []
    for bits in (2, 3, 4, 6):
        table = fitted(method, x, bits)
        assert table.shape == (2**bits,)
        assert bool((table.diff() > 0).all())
        assert torch.equal(table, fitted(method, x, bits))
        errors.append(nmse(x, table))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 10 * errors[-1]


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_fitted_independently(name: str):
    """A row gets the table it would get alone; products of matrices of other shapes may sum in another order."""
    x = torch.stack([gaussian_samples(3000), student_t3(3000), gaussian_samples(3000).abs()])
    weights = student_t3(3000, seed=5).abs()
    together = TABLES[name](*histogram(x, weights), 8)
    alone = torch.cat([TABLES[name](*histogram(row[None], weights), 8) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)


def test_table_error_is_the_error_to_the_nearest_level():
    """Of the values in the bins' means: exact but for the spread inside bins that a boundary cuts, and that of all bins."""
    x = torch.stack([gaussian_samples(4000), student_t3(4000)])
    points, mass = histogram(x, torch.ones(4000))
    table = torch.tensor([[-2.0, -0.5, 0.1, 1.0], [-9.0, -1.0, 1.5, 4.0]], dtype=torch.float64)
    slow = torch.stack([(m * squared_errors(p, t)).sum() for p, m, t in zip(points, mass, table, strict=True)])
    torch.testing.assert_close(table_error(points, prefix_sums(points, mass), table), slow, rtol=1e-10, atol=0)
    exact = torch.stack([squared_errors(row, t).sum() for row, t in zip(x, table, strict=True)])
    torch.testing.assert_close(slow, exact, rtol=1e-3, atol=0)


def test_lloyd_max_is_a_fixed_point():
    """Every level is the mean of the values nearest to it."""
    points = torch.arange(-1024, 1025, dtype=torch.float64) / 256
    mass = torch.exp(-points.square() / 2)
    table = lloyd_max(points[None], mass[None], 4, iterations=10_000)[0]
    nearest = (points[:, None] - table).abs().argmin(dim=1)
    for level in range(4):
        cell = nearest == level
        assert float((mass[cell] * points[cell]).sum() / mass[cell].sum()) == pytest.approx(float(table[level]), abs=1e-9)


@pytest.mark.parametrize("values", [[0.5], [0.0, 0.0], [-1.0, 2.0], [-1.0, 0.0, 3.0]])
def test_fewer_values_than_levels_are_all_levels(values: list[float]):
    x = torch.tensor(values, dtype=torch.float64).repeat(50)
    table = fitted(lloyd_max, x, 3)
    assert table.shape == (8,)
    # A mean is the quotient of two differences of sums of 100 values: some 100 u of 3 off at most.
    assert float(squared_errors(x, table).max()) <= (100 * 2.0**-53 * 3) ** 2


def test_weights_count_as_copies():
    x, copies = gaussian_samples(500), torch.randint(0, 5, (500,), generator=torch.Generator().manual_seed(0))
    copies[0] = copies[x.abs().argmax()] = 1  # the end of the histogram stays
    weighted = histogram(x[None], copies.double())
    repeated = x.repeat_interleave(copies)
    for a, b in zip(weighted, histogram(repeated[None], torch.ones_like(repeated)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)  # sums of the same numbers, a few each, in another order


def test_histogram_keeps_mass_and_mean_of_every_row():
    x, weights = torch.stack([gaussian_samples(5000), student_t3(5000) * 1e-6]), gaussian_samples(5000, seed=1).abs()
    points, mass = histogram(x, weights)
    assert points.shape == mass.shape == (2, BINS)
    assert bool((points.diff() > 0).all())
    torch.testing.assert_close(mass.sum(dim=1), weights.sum().expand(2), rtol=1e-12, atol=0)
    for row, p, m in zip(x, points, mass, strict=True):
        assert float((m * p).sum()) == pytest.approx(float((weights * row).sum()), abs=1e-12 * float((weights * row.abs()).sum()))


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("factor", [2.0**-40, 16.0, 2.0**60])
def test_tables_scale_with_their_values(name: str, factor: float):
    """By a power of two, so exactly."""
    x = gaussian_samples(1000)
    assert torch.equal(fitted(FITTED[name], x * factor, 3), fitted(FITTED[name], x, 3) * factor)


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("factor", [1e-6, 1e6, 3.0])
def test_tables_scale_with_their_values_in_any_unit(name: str, factor: float):
    """A value may fall into the next bin by rounding: the error, not the bits, is the same."""
    x = student_t3(1000)
    assert nmse(x * factor, fitted(FITTED[name], x * factor, 3)) == pytest.approx(nmse(x, fitted(FITTED[name], x, 3)), rel=1e-3)
