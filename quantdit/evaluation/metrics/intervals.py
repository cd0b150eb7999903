"""Intervals for measures of prompts x seeds: a bootstrap that resamples prompts, then their seeds, and a jackknife over prompts.

The samples of one prompt are not independent of each other: a prompt that a model draws badly is drawn badly with every seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from quantdit.system.optional_import import require

LEVEL = 0.95
RESAMPLES = 2000
_DRAW = 200  # replicates at once: bounds the memory


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval of level LEVEL, and the standard error it comes from."""

    estimate: float
    low: float
    high: float
    standard_error: float


def clusters_of(prompts: Sequence[str], least: int = 2) -> np.ndarray:
    """Return the number `[n]` of each sample's prompt; with fewer prompts than `least`, each sample is a cluster of its own."""
    order = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    if len(order) < least:
        return np.arange(len(prompts))
    return np.array([order[prompt] for prompt in prompts])


def resampled(clusters: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Return indices `[resamples, m]` of samples: clusters drawn with replacement, then as many of each one's samples.

    Args:
        clusters: `[n]` integers, which prompt a sample is of.
        rng: of the draws.
        resamples: how many.
    """
    names, counts = np.unique(clusters, return_counts=True)
    order = np.argsort(clusters, kind="stable")
    first = np.cumsum(counts) - counts
    each = max(1, round(len(clusters) / len(names)))
    drawn = rng.integers(len(names), size=(resamples, len(names)))
    within = (rng.random((resamples, len(names), each)) * counts[drawn][..., None]).astype(int)
    return order[(first[drawn][..., None] + within).reshape(resamples, -1)]


def expansion(count: int) -> float:
    """Return by how much to widen a percentile interval of `count` clusters about its estimate.

    A bootstrap of few values is too narrow: its variance lacks the factor n / (n - 1), its quantiles are the normal's where
    Student's are due (Hesterberg 2015, The American Statistician 69(4), section 5.2, the expanded percentile interval).
    """
    stats = require("scipy.stats")
    tail = (1 + LEVEL) / 2
    return float(stats.t.ppf(tail, count - 1) / stats.norm.ppf(tail) * (count / (count - 1)) ** 0.5)


def bootstrap(values: np.ndarray, clusters: np.ndarray | None = None, seed: int = 0) -> Interval:
    """Return the mean of values `[n]` with its interval, clusters `[n]` resampled before the values in them.

    Args:
        values: finite.
        clusters: which prompt a value is of; None for values that are independent of each other.
        seed: of the resamples.

    Raises:
        ValueError: values of fewer than two clusters, or not finite.
    """
    return bootstrap_many(values[:, None], np.arange(len(values)) if clusters is None else clusters, seed)[0]


def bootstrap_many(values: np.ndarray, clusters: np.ndarray, seed: int = 0, simultaneous: bool = False) -> list[Interval]:
    """Return the mean of each column of values `[n, k]` with its interval, all from the same resamples.

    Args:
        values: finite.
        clusters: `[n]` integers.
        seed: of the resamples.
        simultaneous: intervals that hold all k true means at once with probability LEVEL: as many standard errors to both sides
            as the largest deviation among the k columns takes in that part of the resamples.

    Raises:
        ValueError: values of fewer than two clusters, or not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    count = len(np.unique(clusters))
    if count < 2 or not np.isfinite(values).all():
        raise ValueError(f"{count} prompts with {values.shape} values, expected finite values of at least two prompts")
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [values[resampled(clusters, rng, min(_DRAW, RESAMPLES - i))].mean(1) for i in range(0, RESAMPLES, _DRAW)]
    )  # [resamples, k]
    estimate, wide = values.mean(0), expansion(count)
    error = means.std(0) * (count / (count - 1)) ** 0.5
    if simultaneous:
        size = np.where(error > 0, error, 1)
        reach = np.quantile(np.abs((means - means.mean(0)) / size).max(1), LEVEL) * error * wide
        low, high = estimate - reach, estimate + reach
    else:
        tail = (1 - LEVEL) / 2
        low, high = (estimate + (np.quantile(means, q, axis=0) - estimate) * wide for q in (tail, 1 - tail))
    return [Interval(*map(float, column)) for column in zip(estimate, low, high, error, strict=True)]


def jackknife(statistic: Callable[[np.ndarray], float], clusters: np.ndarray, most: int = 32) -> tuple[float, float]:
    """Return a statistic of all samples and its standard error, from leaving out one group of prompts at a time.

    For statistics of a set, such as Frechet distances, which a bootstrap's repeated samples would bias.
    (Efron and Stein 1981; with groups: Shao and Tu 1995, section 2.3.)

    Args:
        statistic: of the indices of the samples kept.
        clusters: `[n]` integers, which prompt a sample is of.
        most: groups; more prompts than that are left out several at a time.
    """
    names = np.unique(clusters)
    groups = min(most, len(names))
    group_of = dict(zip(names.tolist(), (np.arange(len(names)) % groups).tolist(), strict=True))
    group = np.array([group_of[c] for c in clusters.tolist()])
    whole = statistic(np.arange(len(clusters)))
    parts = np.array([statistic(np.flatnonzero(group != g)) for g in range(groups)])
    return whole, float(np.sqrt((groups - 1) / groups * np.square(parts - parts.mean()).sum()))
