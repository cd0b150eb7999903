"""Intervals of means: their coverage, and closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from quantdit.evaluation.metrics.intervals import bootstrap, bootstrap_many, clusters_of, jackknife


def test_intervals_cover_as_often_as_they_say():
    """Means of 12 prompts with 2 seeds each: the 95 % interval holds the truth in 93 to 100 % of 400 draws.

    Resampling prompts and then seeds counts the spread between seeds twice in part: never too narrow, somewhat too wide.
    """
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(12), 2)
    held = 0
    for i in range(400):
        values = rng.normal(0, 1, 12)[clusters] + rng.normal(0, 1, 24)
        found = bootstrap(values, clusters, seed=i)
        held += found.low <= 0 <= found.high
    assert held / 400 >= 0.93


def test_simultaneous_intervals_hold_all_layers_at_once():
    rng = np.random.default_rng(0)
    missed = sum(
        any(not f.low <= 0 <= f.high for f in bootstrap_many(rng.normal(0, 1, (20, 40)), np.arange(20), i, simultaneous=True))
        for i in range(100)
    )
    assert missed <= 12  # 5 expected; 12 or more happen once in two hundred times


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(0, 1, 20)
    whole, error = jackknife(lambda rows: float(values[rows].mean()), np.arange(20))
    assert whole == pytest.approx(values.mean()) and error == pytest.approx(values.std(ddof=1) / 20**0.5)


def test_bootstrap_of_many_independent_values_is_the_normal_interval():
    """400 normal values: the interval is the mean +- 1.96 s / sqrt(n); the bootstrap quantiles err by a few per cent."""
    values = np.random.default_rng(0).normal(10, 3, 400)
    half = 1.96 * values.std(ddof=1) / 20
    found = bootstrap(values)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert bootstrap(values) == found != bootstrap(values, seed=1)


def test_bootstrap_of_equal_values_has_no_width_and_others_are_refused():
    same = bootstrap(np.full(5, 100.0))
    assert (same.low, same.high) == (100.0, 100.0)
    for values in (np.array([1.0, np.inf]), np.array([1.0])):
        with pytest.raises(ValueError, match="expected finite values of at least two prompts"):
            bootstrap(values)


def test_prompts_are_clusters_unless_there_are_too_few_of_them():
    prompts = ["a bat", "a fox", "a bat", "an owl"]
    assert clusters_of(prompts).tolist() == [0, 1, 0, 2]
    assert clusters_of(prompts, least=4).tolist() == [0, 1, 2, 3]
    assert clusters_of(["a bat"] * 3).tolist() == [0, 1, 2]
