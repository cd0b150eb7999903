"""How far the images of a quantized model (the candidate) drift from those of the original (the reference)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from quantdit.evaluation.gate.judge import markdown
from quantdit.evaluation.metrics.frechet import FeatureStatistics, frechet_distance, summarise
from quantdit.evaluation.metrics.measures import EFFICIENTNET, Backbone, paired_of, sets_of, six
from quantdit.evaluation.metrics.paired import bootstrap_interval, capped
from quantdit.evaluation.samples import middle_frames

LEVEL = 0.95


@dataclass(frozen=True)
class DriftReport:
    """Drift of a candidate from its reference, beside what the reference's own images of other seeds are from it.

    "Drift" compares candidate and reference, image by image from the same seeds. "Other seeds" compares reference images of
    other seeds with the reference: what the distribution measures give for two samples of one model at this many images.
    A distribution measure of shared seeds can fall below that, as each image then has a near copy in the other set. (In reports
    the key is `noise_floor`; what the gate calls so is full precision against itself on the same seeds.)

    Of clips, PSNR is of a whole clip and SSIM the mean of its frames; the distribution measures, which take images to be drawn
    independently of each other, see the middle frame of each clip.

    Every figure has six significant digits, so that file, page and table round the same one.

    Attributes:
        count: pairs of images or clips.
        psnr_mean: mean PSNR in dB, each image capped at `paired.PSNR_CEILING`.
        psnr_interval: 95 % bootstrap interval of psnr_mean.
        psnr_min: PSNR of the worst pair in dB, capped.
        identical: pairs equal in every pixel.
        ssim_mean: mean SSIM.
        ssim_interval: 95 % bootstrap interval of ssim_mean.
        fd_drift: Frechet distance on the backbone's features, candidate to reference.
        fd_floor: the same, other seeds to reference.
        kid_drift: kernel distance on the same features, candidate to reference, and its standard error.
        kid_floor: the same, other seeds to reference.
        fd_reference_real: Frechet distance of the reference images to the real set; None without one.
        fd_candidate_real: Frechet distance of the candidate images to the real set; None without one.
        clips: the pairs are clips.
        names: of the two distances.
    """

    count: int
    psnr_mean: float
    psnr_interval: tuple[float, float]
    psnr_min: float
    identical: int
    ssim_mean: float
    ssim_interval: tuple[float, float]
    fd_drift: float
    fd_floor: float
    kid_drift: tuple[float, float]
    kid_floor: tuple[float, float]
    fd_reference_real: float | None
    fd_candidate_real: float | None
    clips: bool = False
    names: tuple[str, str] = (EFFICIENTNET.frechet, EFFICIENTNET.kernel)

    def to_json(self) -> dict[str, object]:
        """Return plain, finite values in a fixed order, metric names with their backbone."""
        kid = [{"mean": mean, "standard_error": error} for mean, error in (self.kid_drift, self.kid_floor)]
        frechet: dict[str, object] = {"drift": self.fd_drift, "noise_floor": self.fd_floor}
        if self.fd_reference_real is not None and self.fd_candidate_real is not None:
            frechet |= {"reference_to_real": self.fd_reference_real, "candidate_to_real": self.fd_candidate_real}
        return {
            "count": self.count,
            "of": "clips" if self.clips else "images",
            "interval_level": LEVEL,
            "PSNR": {
                "unit": "dB",
                "mean": self.psnr_mean,
                "interval": list(self.psnr_interval),
                "min": self.psnr_min,
                "identical": self.identical,
            },
            "SSIM": {"mean": self.ssim_mean, "interval": list(self.ssim_interval)},
            self.names[0]: frechet,
            self.names[1]: {"drift": kid[0], "noise_floor": kid[1]},
        }


def compare(
    reference: torch.Tensor,
    candidate: torch.Tensor,
    other_seeds: torch.Tensor,
    real_features: torch.Tensor | FeatureStatistics | None = None,
    seed: int = 0,
    features: Sequence[torch.Tensor] | None = None,
    backbone: Backbone = EFFICIENTNET,
    paired: Mapping[str, torch.Tensor] | None = None,
    sets: Mapping[str, Mapping[str, float]] | None = None,
) -> DriftReport:
    """Measure the drift of candidate images or clips from those of the reference.

    Args:
        reference: `[n, c, h, w]`, or clips `[n, f, c, h, w]`, float in [-1, 1], n >= 4, c = 1 or 3: of the original model.
        candidate: the same shape: images of the quantized model from the same seeds, labels and sampler.
        other_seeds: the same shape: images of the original model from other seeds.
        real_features: the backbone's features `[m, d]` of real images, or their statistics (`real.load_real`).
        seed: of the bootstrap.
        features: of reference, candidate and other seeds, `[n, d]` each, of the middle frames of clips; computed here if None.
        backbone: of the features.
        paired: what `measures.paired_of` says of reference and candidate, where it is known.
        sets: what `measures.sets_of` says of the features, where it is known; each image has a prompt of its own if None.

    Raises:
        ValueError: if the shapes differ, there are fewer than four images, or values are not finite.
        ModuleNotFoundError: if the `eval` extra is not installed.
    """
    if other_seeds.shape != reference.shape:
        raise ValueError(
            f"other_seeds is {list(other_seeds.shape)}, expected {list(reference.shape)} like reference: "
            "the Frechet distance depends on the number of images"
        )
    if len(reference) < 4:
        raise ValueError(f"{len(reference)} images, expected at least 4, better 64")
    clips = reference.ndim == candidate.ndim == 5
    paired = paired_of(reference, candidate) if paired is None else paired
    decibels, likeness = capped(paired["psnr"]), paired["ssim"]
    if features is None:
        features = [backbone.features(middle_frames(x)) for x in (reference, candidate, other_seeds)]
    if sets is None:
        sets = sets_of(*features, tuple(map(str, range(len(reference)))), backbone)
    fd, kid = sets[backbone.frechet], sets[backbone.kernel]
    to_real = [None if real_features is None else six(frechet_distance(summarise(x), real_features)) for x in features[:2]]
    return DriftReport(
        count=len(reference),
        psnr_mean=six(decibels.mean().item()),
        psnr_interval=_six(bootstrap_interval(decibels, seed, LEVEL)),
        psnr_min=six(decibels.min().item()),
        identical=int(torch.isinf(paired["psnr"]).sum()),
        ssim_mean=six(likeness.mean().item()),
        ssim_interval=_six(bootstrap_interval(likeness, seed, LEVEL)),
        fd_drift=fd["drift"],
        fd_floor=fd["noise_floor"],
        kid_drift=(kid["drift"], kid["standard_error"]),
        kid_floor=(kid["noise_floor"], kid["noise_floor_error"]),
        fd_reference_real=to_real[0],
        fd_candidate_real=to_real[1],
        clips=clips,
        names=(backbone.frechet, backbone.kernel),
    )


def _six(pair: tuple[float, float]) -> tuple[float, float]:
    return six(pair[0]), six(pair[1])


def table(report: DriftReport) -> str:
    """Return the report as a Markdown table that is readable as plain text, too."""
    same = f", {report.identical} identical" if report.identical else ""
    low, high = report.psnr_interval
    ssim_low, ssim_high = report.ssim_interval
    fd, kid = report.names
    rows = [
        (f"{report.count} {'clips' if report.clips else 'images'}", "drift", "other seeds"),
        ("PSNR, dB", f"{report.psnr_mean:.2f} [{low:.2f}, {high:.2f}], min {report.psnr_min:.2f}{same}", ""),
        ("SSIM", f"{report.ssim_mean:.4f} [{ssim_low:.4f}, {ssim_high:.4f}]", ""),
        (fd, f"{report.fd_drift:.2f}", f"{report.fd_floor:.2f}"),
        (kid, *(f"{mean:.5f} ± {error:.5f}" for mean, error in (report.kid_drift, report.kid_floor))),
    ]
    if report.fd_reference_real is not None:
        rows.append((f"{fd} to real images", f"{report.fd_candidate_real:.2f}", f"{report.fd_reference_real:.2f} (reference)"))
    note = f"[a, b]: {LEVEL:.0%} bootstrap interval. ±: standard error. Other seeds: the reference against itself."
    if report.clips:
        note += f" PSNR is of whole clips, SSIM the mean over frames; {fd} and {kid} are of each clip's middle frame."
    return "\n".join([*markdown(rows), "", note])
