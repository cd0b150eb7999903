"""Smoothing against its formula, its guards, and the promise that it is never worse than none."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr

from quantdit.calibration import smooth, stats
from quantdit.calibration.smooth import ALPHAS, REACH, channel_rms, choose, salience, smoothing_factor
from quantdit.tensors import transform
from quantdit.tensors.hadamard import random_sign
from quantdit.tensors.transform import Transform


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outliers(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    x = random(rows, width, seed=seed)
    x[:, ::17] *= 25
    return x


def quantized(x: torch.Tensor, bits: int = 4) -> torch.Tensor:
    scale = x.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (x / scale.masked_fill(scale == 0, 1)).round() * scale


def output_error(x: torch.Tensor, w: torch.Tensor):
    """rel_rmse of the output with 4-bit tokens and 4-bit weights."""
    y = x @ w.T

    def error(t: Transform) -> float:
        product = quantized(transform.apply(t, x)) @ quantized(transform.apply_to_weight(t, w)).T
        return float((product - y).norm() / y.norm().clamp_min(1e-30))

    return error


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_formula_up_to_a_common_factor(alpha: float):
    x, w = random(64).abs() + 0.1, random(30, 64, seed=1)
    s = smoothing_factor(x, w, alpha).double()
    formula = x.double() ** alpha / w.abs().amax(dim=0).double() ** (1 - alpha)
    torch.testing.assert_close(s / s[0], formula / formula[0], rtol=1e-5, atol=0)
    assert abs(float(s.log().mean())) < 1e-6
    assert s.dtype == torch.float64
    assert smoothing_factor(x, w, alpha).dtype == torch.float32


def test_alpha_one_evens_out_activations_and_alpha_zero_the_weight():
    x, w = random(64).abs() + 0.1, random(30, 64, seed=1)
    even = x / smoothing_factor(x, w, 1.0)
    torch.testing.assert_close(even, even.mean().expand(64))
    columns = (w * smoothing_factor(x, w, 0.0)).abs().amax(dim=0)
    torch.testing.assert_close(columns, columns.mean().expand(64))


def test_dead_channels_and_zero_columns_are_left_alone():
    x, w = random(60).abs() + 0.1, random(30, 60, seed=1)
    x[4], w[:, 9], x[20] = 0, 0, 0
    w[:, 20] = 0
    for alpha in ALPHAS:
        s = smoothing_factor(x, w, alpha)
        assert s[[4, 9, 20]].tolist() == [1, 1, 1]
        assert bool((torch.isfinite(s) & (s > 0)).all())
        live = s[[i for i in range(60) if i not in (4, 9, 20)]]
        assert abs(float(live.double().log().mean())) < 1e-6


@pytest.mark.parametrize("x", [torch.zeros(12), torch.full((12,), 3.0)])
@pytest.mark.parametrize("w", [torch.zeros(5, 12), torch.ones(5, 12)])
def test_nothing_to_smooth(x: torch.Tensor, w: torch.Tensor):
    torch.testing.assert_close(smoothing_factor(x, w, 0.5), torch.ones(12))


def test_factors_are_limited():
    x = torch.ones(1000)
    x[0], x[1] = 1e30, 1e-30
    s = smoothing_factor(x, torch.ones(3, 1000), 1.0)
    torch.testing.assert_close(s[:2], torch.tensor([REACH, 1 / REACH]))


def test_units_do_not_matter():
    x, w = random(64).abs() + 0.1, random(30, 64, seed=1)
    torch.testing.assert_close(smoothing_factor(x * 1e12, w * 1e-9, 0.3), smoothing_factor(x, w, 0.3))


def test_salience_by_scipy():
    absmax, w = random(6, 64, seed=2).abs(), random(30, 64, seed=1)
    absmax[3, 10:20] = 0.5  # ties
    peak = w.abs().amax(dim=0)
    rho = torch.tensor([spearmanr(row, peak).statistic for row in absmax])
    expected = torch.softmax(-rho, dim=0).float() @ absmax
    torch.testing.assert_close(salience(absmax, w), expected)


def test_a_bucket_that_follows_the_weight_counts_less():
    w = random(30, 64, seed=1)
    peak = w.abs().amax(dim=0)
    with_the_weight, against_it = peak, peak.max() + 0.1 - peak
    found = salience(torch.stack([with_the_weight, against_it]), w)
    eta = torch.softmax(torch.tensor([-1.0, 1.0]), dim=0)
    torch.testing.assert_close(found, eta[0] * with_the_weight + eta[1] * against_it)


def test_empty_buckets_do_not_count():
    absmax, w = random(4, 64, seed=2).abs(), random(30, 64, seed=1)
    padded = torch.cat([torch.zeros(2, 64), absmax, torch.zeros(1, 64)])
    assert torch.equal(salience(padded, w), salience(absmax, w))
    torch.testing.assert_close(salience(absmax[:1], w), absmax[0])
    assert torch.equal(salience(torch.zeros(3, 64), w), torch.zeros(64))


def test_constant_magnitudes_have_no_rank():
    assert torch.equal(salience(torch.ones(2, 16), torch.ones(3, 16)), torch.ones(16))


def test_channel_rms_from_stats():
    x = outliers(200, 60)
    seen = stats.update(stats.init(60, 1), x, 0)
    torch.testing.assert_close(channel_rms(seen.gram, seen.count), x.square().mean(dim=0).sqrt())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rotated", [False, True])
def test_smoothing_is_never_worse_than_none(seed: int, rotated: bool):
    x, w = outliers(80, 64, seed), random(40, 64, seed=seed + 100)
    base = Transform(premultiplier=random_sign(64, seed), block=64) if rotated else None
    error = output_error(x, w)
    choice = choose(x.abs().amax(dim=0), w, error, base)
    assert set(choice.errors) == {None, *ALPHAS}
    assert choice.errors[None] == error(base or Transform())
    assert error(choice.transform) == choice.errors[choice.alpha] == min(choice.errors.values())
    if not rotated:
        assert choice.alpha is not None  # 4 bits and channels of 25 sigma
        assert choice.errors[choice.alpha] < 0.75 * choice.errors[None]


def test_no_smoothing_wins_ties_and_nan_loses():
    x, w = random(16).abs() + 0.1, random(5, 16)
    none = choose(x, w, lambda t: 1.0)
    assert (none.alpha, none.factor, none.transform.identity) == (None, None, True)
    some = choose(x, w, lambda t: 1.0 if t.smoothed else float("nan"), alphas=(0.5, 0.7))
    assert some.alpha == 0.5
    assert torch.equal(some.transform.premultiplier, transform.smooth(Transform(), some.factor).premultiplier)
    with pytest.raises(ValueError, match="finite output error"):
        choose(x, w, lambda t: float("nan"))


def test_a_layer_of_zeros():
    choice = choose(torch.zeros(60), random(5, 60), output_error(torch.zeros(4, 60), random(5, 60)))
    assert choice.alpha is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_numbers_are_refused(bad: float):
    x, w = torch.ones(8), torch.ones(3, 8)
    broken_x, broken_w = x.clone(), w.clone()
    broken_x[2], broken_w[1, 4] = bad, bad
    with pytest.raises(ValueError, match="smoothing: 1 activation magnitudes are NaN or infinite"):
        smoothing_factor(broken_x, w, 0.5)
    with pytest.raises(ValueError, match="smoothing: 1 weights are NaN or infinite"):
        smoothing_factor(x, broken_w, 0.5)
    with pytest.raises(ValueError, match="smoothing: 1 activation magnitudes are NaN or infinite"):
        salience(broken_x[None], w)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_out_of_range(alpha: float):
    with pytest.raises(ValueError, match=r"alpha in 0\.\.1"):
        smoothing_factor(torch.ones(4), torch.ones(2, 4), alpha)


def test_negative_magnitudes_are_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        smooth.smoothing_factor(-torch.ones(4), torch.ones(2, 4), 0.5)
