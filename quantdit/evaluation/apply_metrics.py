"""All measures of two models' samples: a row for each sample, distances of the sets, the probe, the trajectories."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from quantdit.evaluation.metrics.discrepancy import cmmd, gaussian, grams, median_distance, polynomial
from quantdit.evaluation.metrics.frechet import frechet_distance
from quantdit.evaluation.metrics.intervals import LEVEL, bootstrap, clusters_of, jackknife
from quantdit.evaluation.metrics.paired import PSNR_CEILING, capped, cosine, perceptual_distance, psnr, ssim
from quantdit.evaluation.metrics.precision_recall import NEIGHBOURS, precision_recall
from quantdit.evaluation.metrics.table import METRICS, decibels
from quantdit.evaluation.metrics.text_alignment import Alignment
from quantdit.evaluation.metrics.video import (
    consistency_proxy,
    dynamic_degree_proxy,
    motion_smoothness_proxy,
    temporal_flickering,
)
from quantdit.evaluation.networks.backbone import Backbone
from quantdit.evaluation.networks.efficientnet import efficientnet_lite0_features
from quantdit.evaluation.probe import Probe
from quantdit.evaluation.samples import Samples, as_images

LEAST_PRECISION_RECALL = 8  # samples; with fewer, each of them is most of the result
LEAST_PROMPTS = 3  # that intervals treat as clusters: of two prompts, leaving one out leaves one
CONSISTENCY_FRAMES = 8  # of a clip at most, evenly spread: the network takes longer than all other measures together


def alone_of(
    samples: Samples,
    features: Tensor,
    alignment: Alignment | None = None,
    clip_score: Callable[[Tensor, Sequence[str]], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the measures that a sample has without another to compare it with, `[n]` each.

    Args:
        samples: of a model.
        features: of them, `[n, d]`, of the middle frames.
        alignment: to texts, where there is one.
        clip_score: maps images and prompts to CLIP's score; None without CLIP weights.
    """
    found = {}
    if samples.images.ndim == 5:
        found = {name: torch.tensor([measure(clip) for clip in samples.images]) for name, measure in CLIP_MEASURES.items()}
    if alignment is not None:
        found["text_alignment_proxy"] = alignment(features, samples.prompts)
    if clip_score is not None:
        found["clip_score"] = clip_score(samples.images, samples.prompts)
    return found


def rows_of(
    reference: Samples,
    candidate: Samples,
    features: Sequence[Tensor],
    alone: Sequence[Mapping[str, Tensor]] = ({}, {}),
    paired: Mapping[str, Tensor] | None = None,
) -> list[dict]:
    """Return a row for each sample: its prompt, its seed, and every measure by its name in `table.METRICS`.

    Of measures of one sample alone it has the candidate's less the reference's; both stand beside it, under `_reference` and
    `_candidate`.

    Args:
        reference: samples of the original.
        candidate: of the same prompts and seeds.
        features: of both, `[n, d]`, of the middle frames.
        alone: `alone_of` both.
        paired: `paired_of` both, where it is known.
    """
    paired = paired_of(reference.images, candidate.images) if paired is None else paired
    columns: dict[str, Tensor] = {
        "psnr": capped(paired["psnr"]),
        "ssim": paired["ssim"],
        "perceptual": perceptual_distance(*features),
        "latent_cosine": cosine(reference.latents[:, -1], candidate.latents[:, -1]),
    }
    for name in alone[0]:
        first, second = (measured[name] for measured in alone)
        columns |= {name: second - first, f"{name}_reference": first, f"{name}_candidate": second}
    return [
        {"prompt": prompt, "seed": seed} | {name: six(values[i].item()) for name, values in columns.items()}
        for i, (prompt, seed) in enumerate(zip(reference.prompts, reference.seeds, strict=True))
    ]


def paired_of(reference: Tensor, candidate: Tensor) -> dict[str, Tensor]:
    """Return `psnr` (infinite for equal ones) and `ssim`, `[n]` each, of images `[n, c, h, w]` or clips `[n, f, c, h, w]`.

    Of a clip, the PSNR is of all its frames at once and the SSIM the mean over them.
    """
    a, b = (x.flatten(0, 1) if x.ndim == 5 else x for x in (reference, candidate))
    # Mean squared error over all frames: the frames of a clip one above the other are one tall image.
    return {"psnr": psnr(as_images(reference), as_images(candidate)), "ssim": ssim(a, b).reshape(len(reference), -1).mean(1)}


def _consistency(clip: Tensor) -> float:
    chosen = torch.linspace(0, len(clip) - 1, min(CONSISTENCY_FRAMES, len(clip))).round().long()
    return consistency_proxy(clip[chosen], efficientnet_lite0_features)


CLIP_MEASURES: dict[str, Callable[[Tensor], float]] = {
    "temporal_flickering": temporal_flickering,
    "motion_smoothness_proxy": motion_smoothness_proxy,
    "dynamic_degree_proxy": dynamic_degree_proxy,
    "consistency_proxy": _consistency,
}


Statistic = Callable[[np.ndarray], float]


def sets_of(reference: Tensor, candidate: Tensor, other: Tensor, prompts: tuple[str, ...], backbone: Backbone) -> dict[str, dict]:
    """Return the distances between the sets: `drift` (candidate to reference), `noise_floor` (other seeds), each with its error.

    Larger is worse for all of them; the errors are a jackknife's over prompts.

    Args:
        reference: features `[n, d]`.
        candidate: of the same prompts and seeds.
        other: of the same prompts and other seeds, by the reference.
        prompts: of each sample.
        backbone: of the features.
    """
    drift, floor = (_statistics(reference, x, backbone) for x in (candidate, other))
    return {name: _distance(drift[name], floor[name], prompts) for name in drift}


def cmmd_of(reference: Tensor, candidate: Tensor, other: Tensor, prompts: tuple[str, ...]) -> dict[str, float]:
    """Return the CMMD of CLIP embeddings `[n, d]`, as `sets_of` returns its distances."""
    return _distance(
        lambda rows: cmmd(candidate[rows], reference[rows]), lambda rows: cmmd(other[rows], reference[rows]), prompts
    )


def distances_of(reference: Tensor, candidate: Tensor, backbone: Backbone) -> dict[str, float]:
    """Return the `drift` of `sets_of` alone, without its error."""
    every = np.arange(len(reference))
    return {name: six(statistic(every)) for name, statistic in _statistics(reference, candidate, backbone).items()}


def _statistics(reference: Tensor, candidate: Tensor, backbone: Backbone) -> dict[str, Statistic]:
    """Return each distance of a set to the reference, as a function of the samples that are taken of both."""
    kernels = {backbone.kernel: polynomial, f"MMD-{backbone.name}": gaussian(median_distance(reference))}
    found: dict[str, Statistic] = {backbone.frechet: lambda rows: frechet_distance(candidate[rows], reference[rows])}
    for name, kernel in kernels.items():
        both = grams(candidate, reference, kernel)
        found[name] = lambda rows, both=both: both.squared(torch.from_numpy(rows))
    if len(reference) >= LEAST_PRECISION_RECALL:
        for i, name in enumerate(("1 - precision", "1 - recall")):
            found[f"{name} (k = {NEIGHBOURS}, {backbone.name})"] = lambda rows, i=i: (
                1 - precision_recall(candidate[rows], reference[rows])[i]
            )
    return found


def _distance(drift: Statistic, floor: Statistic, prompts: tuple[str, ...]) -> dict[str, float]:
    """Return two statistics of the samples' indices, candidate's and other seeds', with their errors."""
    clusters = clusters_of(prompts, LEAST_PROMPTS)
    (value, error), (floor_value, floor_error) = jackknife(drift, clusters), jackknife(floor, clusters)
    return {
        "drift": six(value),
        "standard_error": six(error),
        "noise_floor": six(floor_value),
        "noise_floor_error": six(floor_error),
    }


def drift_of(
    reference: Samples,
    paired: Mapping[str, Tensor],
    sets: Mapping[str, Mapping[str, float]],
    backbone: Backbone,
    to_real: Mapping[str, float] | None = None,
) -> dict[str, object]:
    """Return the figures that a person reads first: mean PSNR and SSIM with intervals over prompts, and the two distances.

    PSNR and SSIM compare pairs of the same seed, the distances compare the sets. `noise_floor` is here the distance of the
    reference's samples of other seeds; the gate's noise floor is full precision against itself on the same seeds. A distance of
    sets that share their seeds can fall below that of other seeds, since each image has a near copy in the other set.

    Args:
        reference: samples of the original.
        paired: `paired_of` these and the candidate's.
        sets: `sets_of` both.
        backbone: of the sets' features.
        to_real: Frechet distances of both models to real images, where there are any.
    """
    clusters = clusters_of(reference.prompts, LEAST_PROMPTS)
    psnrs, fd, kid = capped(paired["psnr"]), sets[backbone.frechet], sets[backbone.kernel]
    return {
        "count": len(psnrs),
        "of": "clips" if reference.images.ndim == 5 else "images",
        "interval_level": LEVEL,
        "PSNR": {
            "unit": "dB",
            **_mean(psnrs, clusters, PSNR_CEILING),
            "min": six(psnrs.min().item()),
            "identical": int(torch.isinf(paired["psnr"]).sum()),
        },
        "SSIM": _mean(paired["ssim"], clusters, 1.0),
        backbone.frechet: {"drift": fd["drift"], "noise_floor": fd["noise_floor"]} | dict(to_real or {}),
        backbone.kernel: {
            "drift": {"mean": kid["drift"], "standard_error": kid["standard_error"]},
            "noise_floor": {"mean": kid["noise_floor"], "standard_error": kid["noise_floor_error"]},
        },
    }


def psnr_of(reference: Samples, candidate: Tensor) -> dict[str, object]:
    """Return the mean PSNR in dB of samples against the reference's, with its interval over prompts."""
    found = psnr(as_images(reference.images), as_images(candidate))
    return _mean(capped(found), clusters_of(reference.prompts, LEAST_PROMPTS), PSNR_CEILING)


def _mean(values: Tensor, clusters: np.ndarray, largest: float) -> dict[str, object]:
    """Return the mean and its interval, which ends at the largest possible value."""
    found = bootstrap(values.double().numpy(), clusters)
    return {"mean": six(found.estimate), "interval": [six(found.low), six(min(found.high, largest))]}


def probe_of(probe: Probe, prompts: Sequence[str], seeds: Sequence[int]) -> dict:
    """Return a probe of these prompts and seeds as plain numbers: samples with their `output_error`, timesteps, layers; in dB."""
    output = probe.output.sum(1)
    return {
        "timesteps": [six(t) for t in probe.timesteps],
        "samples": [
            {"prompt": prompt, "seed": seed, "output_error": _db(pair)}
            for prompt, seed, pair in zip(prompts, seeds, output, strict=True)
        ],
        "by_timestep": [[_db(pair) for pair in row] for row in probe.output],
        "layers": {name: [_db(pair) for pair in pairs] for name, pairs in probe.layers.items()},
    }


def _db(pair: Tensor) -> float:
    """Return squared error over power in dB, no less than the floor."""
    error, power = pair.tolist()
    return round(decibels(error / power if power else float(error > 0)), 4)


def drift_over_steps(reference: Samples, candidate: Samples) -> dict[str, list[float]]:
    """Return how far the trajectories, which start at the same noise, are apart at each step: median and highest decile.

    Apart: the distance of what enters the transformer, relative to its size.
    """
    a, b = (x.latents.double().flatten(2) for x in (reference, candidate))
    relative = (b - a).norm(dim=2) / a.norm(dim=2).clamp_min(1e-30)
    return {
        "timesteps": [six(t) for t in reference.timesteps],
        "median": [six(v) for v in relative.median(0).values.tolist()],
        "highest_decile": [six(v) for v in relative.quantile(0.9, 0).tolist()],
    }


def means_of(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Return the mean of each measure: `mean` in its own unit, of the candidate's where it is a difference; `harm` as gated."""
    found = {}
    for name, metric in METRICS.items():
        having = [row for row in rows if name in row]
        if having:
            own = [row[f"{name}_candidate"] if metric.equal else row[name] for row in having]
            harms = [metric.harm(row[name]) for row in having]
            found[name] = {"mean": six(float(np.mean(own))), "harm": six(float(np.mean(harms)))}
    return found


def six(value: float) -> float:
    """Round to six significant digits: the last bits depend on the number of threads."""
    return float(f"{value:.6g}")
