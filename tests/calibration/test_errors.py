"""rel_rmse: of sums of squares, of tensors, and of a layer's output from Gram matrices."""

from __future__ import annotations

import math

import pytest
import torch

from quantdit.calibration import errors
from quantdit.calibration.errors import energy, output_error


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def test_relative_is_a_root_and_zero_of_nothing():
    assert errors.relative(9.0, 4.0) == 1.5
    assert errors.relative(0.0, 0.0) == errors.relative(1.0, 0.0) == 0.0
    assert math.isnan(errors.relative(math.nan, 1.0)) and math.isnan(errors.relative(1.0, math.nan))


def test_squares_are_summed_in_the_dtype_of_the_tensors():
    got, expected = random(5, 7), random(5, 7, seed=1)
    assert errors.squares(got, expected) == (float((got - expected).square().sum()), float(expected.square().sum()))
    error, power = errors.squares(got.double(), expected.double())
    assert error == pytest.approx(float((got - expected).norm()) ** 2) and power == float(expected.double().square().sum())


def test_output_error_takes_the_gram_matrix_that_the_error_meets():
    W, delta, x, y = random(7, 24), random(7, 24, seed=1), random(90, 24, seed=2), random(90, 24, seed=3)
    expected = float((y @ delta.T).norm() / (x @ W.T).norm())
    assert output_error(delta, W, x.T @ x, y.T @ y) == pytest.approx(expected, rel=1e-4)


def test_output_error_is_that_of_outputs():
    """rel_rmse of x W^T on the rows that made the Gram matrix; all in float64."""
    x, W, delta = random(100, 24).double(), random(7, 24, seed=1).double(), random(7, 24, seed=2).double()
    expected = float((x @ delta.T).norm() / (x @ W.T).norm())
    assert output_error(delta, W, x.T @ x) == pytest.approx(expected, rel=1e-12)
    assert output_error(delta, W, 100 * x.T @ x) == pytest.approx(expected, rel=1e-12)
    assert output_error(torch.zeros_like(W), W, x.T @ x) == 0
    assert output_error(delta, W, torch.zeros(24, 24)) == 0


def test_energy_is_half_of_a_product(monkeypatch: pytest.MonkeyPatch):
    """Integers, so that all sums are exact; blocks that do not divide the width."""
    W = torch.randint(-9, 10, (7, 24), generator=torch.Generator().manual_seed(0)).float()
    x = torch.randint(-9, 10, (30, 24), generator=torch.Generator().manual_seed(1)).float()
    expected = float((x @ W.T).square().sum())
    for block in (1, 10, 24, 1024):
        monkeypatch.setattr(errors, "ENERGY_BLOCK", block)
        assert energy(W, x.T @ x) == energy(W, (x.T @ x).double()) == expected


@pytest.mark.parametrize("seed", range(8))
def test_output_error_of_next_to_nothing_is_a_real_number(seed: int):
    """Few rows, as a timestep embedding has, and weights that are right on those: tr(D G D^T) may round to below zero."""
    x = random(2, 64, seed=seed)
    W, delta = random(16, 64, seed=seed + 100), random(16, 64, seed=seed + 200)
    delta -= delta @ torch.linalg.pinv(x) @ x  # the part that the rows see
    error = output_error(delta, W, x.T @ x)
    assert isinstance(error, float)
    # G is known to u of its norm only: errors below sqrt(64 u) of the weight's cannot be told from zero.
    assert 0 <= error <= (64 * 2.0**-24) ** 0.5 * float(delta.norm() * x.norm() / (W @ x.T).norm())
