"""The table of measures: label, unit, range, margin of the gate, and how a value becomes decibels of error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

FORMAT = 2
CEILING_DB = 100.0  # of PSNR, and -100 dB the least error: a squared error of 1e-10 of its reference counts as none
LAYERS = "layers"
FROM_FULL = "less full precision's"
READING = (
    f"-{CEILING_DB:g} dB stands for no error, and a PSNR of {CEILING_DB:g} dB for equal pictures: a squared error up to 1e-10"
    " counts as none. KID and MMD are unbiased estimates, so that those of sets which hardly differ may lie below zero."
)
LARGEST = 1e12  # of a number in a report; nothing that is measured comes near


@dataclass(frozen=True)
class Metric:
    """What is gated, and how.

    Attributes:
        label: as people read it.
        margin: how much worse than the baseline's the mean may be, in dB of error; with `equal`, how much further from full
            precision, in the measure's own unit.
        harm: maps a sample's value to its harm, larger being worse: to dB of error, or with `equal` to itself.
        low: smallest valid value of a sample.
        high: largest valid value.
        unit: of a value, as printed; empty for none.
        equal: neither more nor less is better. Samples hold the difference from full precision, which may not grow either way.
        decides: rank. Inconclusive findings of the highest rank in a report keep the gate from passing; of rank 0, never.
    """

    label: str
    margin: float
    harm: Callable[[float], float]
    low: float = -LARGEST
    high: float = LARGEST
    unit: str = ""
    equal: bool = False
    decides: int = 0


def decibels(relative: float) -> float:
    """Return a squared error relative to its power in dB, no less than -CEILING_DB.

    Raises:
        ValueError: NaN, or infinite.
    """
    if not math.isfinite(relative):
        raise ValueError(f"an error of {relative} is no number: find the layer that overflowed")
    return max(10 * math.log10(relative), -CEILING_DB) if relative > 0 else -CEILING_DB


def _as_it_is(value: float) -> float:
    return value


# By the names of a report's samples. Margins of differences are in the measure's own unit.
METRICS = {
    "psnr": Metric("PSNR", 2.0, lambda v: -min(v, CEILING_DB), -1e4, CEILING_DB, "dB", decides=1),
    "ssim": Metric("SSIM", 3.0, lambda v: decibels(1 - v), -1.001, 1.001, decides=1),
    "perceptual": Metric("perceptual distance (proxy)", 3.0, lambda v: decibels(v * v), 0.0),
    "latent_cosine": Metric("latent cosine", 3.0, lambda v: decibels(1 - v), -1.001, 1.001),
    "output_error": Metric("model output error", 1.5, _as_it_is, -CEILING_DB, 1e4, "dB", decides=2),
    "temporal_flickering": Metric("temporal flickering", 0.01, _as_it_is, equal=True),
    "motion_smoothness_proxy": Metric("motion smoothness (proxy)", 0.01, _as_it_is, equal=True),
    "dynamic_degree_proxy": Metric("dynamic degree (proxy)", 0.15, _as_it_is, equal=True),
    "consistency_proxy": Metric("subject and background consistency (proxy)", 0.02, _as_it_is, equal=True),
    "text_alignment_proxy": Metric("text alignment (proxy)", 0.05, _as_it_is, equal=True),
    "clip_score": Metric("CLIP score", 1.0, _as_it_is, equal=True),
}
LAYER_MARGIN = 6.0
SHARE_MARGIN = 0.1  # of precision and recall
DISTANCE_MARGIN = 2.0  # of other distances: a factor on the baseline's; distances are squared, so 2 is 3 dB


def is_share(name: str) -> bool:
    """Tell a share of the samples, 1 - precision or 1 - recall, from a squared distance of sets."""
    return name.startswith("1 -")


def meanings(row: dict) -> dict[str, str]:
    """Return what the figures of a report's row are, by their names in it."""
    return {name: f"{metric.label}{f', {FROM_FULL}' if metric.equal else ''}" for name, metric in METRICS.items() if name in row}
