"""Every measure against an independent implementation of it: torchmetrics where it has one, else a plain formula in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quantdit.evaluation.metrics.discrepancy import cmmd, gaussian, grams, kernel_distance, median_distance, polynomial
from quantdit.evaluation.metrics.frechet import frechet_distance
from quantdit.evaluation.metrics.paired import cosine, perceptual_distance, psnr, ssim
from quantdit.evaluation.metrics.precision_recall import precision_recall

COUNT, WIDTH = 40, 24
CLOSE = 1e-4


def features(seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(COUNT, WIDTH, generator=torch.Generator().manual_seed(seed)) * 1.3 + shift


def pictures(seed: int, channels: int = 3, size: int = 32) -> Tensor:
    return torch.rand(4, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Lookup(nn.Module):
    """A backbone whose feature of picture i is row i of a table: torchmetrics then sees the very features that we do."""

    num_features = WIDTH

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, images: Tensor) -> Tensor:
        return self.table[images[:, 0, 0, 0].long()]


def numbered(first: int) -> Tensor:
    """Pictures of one value each, `[COUNT, 3, 2, 2]` uint8: first, first + 1, ..."""
    return torch.arange(first, first + COUNT, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)


def test_frechet_distance_is_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    a, b = features(0), features(1, 0.4)
    metric = fid.FrechetInceptionDistance(feature=Lookup(torch.cat([a, b])), input_img_size=(3, 2, 2))
    metric.update(numbered(0), real=True)
    metric.update(numbered(COUNT), real=False)
    assert frechet_distance(a, b) == pytest.approx(metric.compute().item(), rel=CLOSE)


def test_kernel_distance_is_torchmetrics_over_all_pairings():
    """Ours leaves out the pairs i = i of the mixed term, since rows may belong together; over all shifts each is left out once.

    The mean of all shifts is thus the statistic that knows no pairs, torchmetrics' and the paper's.
    """
    kid = pytest.importorskip("torchmetrics.image.kid")
    a, b = features(0), features(1, 0.4)
    metric = kid.KernelInceptionDistance(feature=Lookup(torch.cat([a, b])), subsets=1, subset_size=COUNT)
    metric.update(numbered(0), real=True)
    metric.update(numbered(COUNT), real=False)
    expected = metric.compute()[0].item()
    shifted = [kernel_distance(a, b.roll(shift, 0)) for shift in range(COUNT)]
    assert np.mean(shifted) == pytest.approx(expected, rel=CLOSE)


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_and_ssim_are_torchmetrics(channels: int):
    functional = pytest.importorskip("torchmetrics.functional.image")
    a = pictures(0, channels)
    b = (a + 0.2 * pictures(1, channels)).clamp(-1, 1)
    expected = functional.peak_signal_noise_ratio(b, a, data_range=2.0, reduction="none", dim=(1, 2, 3))
    assert psnr(a, b).numpy() == pytest.approx(expected.numpy(), rel=CLOSE)
    options = {"data_range": 2.0, "sigma": 1.5, "reduction": "none", "return_full_image": True}
    _, everywhere = functional.structural_similarity_index_measure(b, a, **options)
    # torchmetrics also takes windows that reach beyond the edge, mirrored; ours, as the paper's, lie within the image.
    expected = everywhere[..., 5:-5, 5:-5].flatten(1).mean(1)
    assert ssim(a, b).numpy() == pytest.approx(expected.numpy(), rel=CLOSE)


def test_psnr_is_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = pictures(0).double(), pictures(1).double()
    expected = [metrics.peak_signal_noise_ratio(x, y, data_range=2) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert psnr(a, b).tolist() == pytest.approx(expected, rel=CLOSE)


def test_precision_and_recall_are_the_definition():
    """Of a set that lies within another, precision is high and recall low; both as a triple loop says."""
    a, b = (0.5 * features(2)).double().numpy(), features(3).double().numpy()

    def covered(points: np.ndarray, support: np.ndarray) -> float:
        hits = 0
        for x in points:
            for i, y in enumerate(support):
                radius = sorted(np.linalg.norm(y - z) for j, z in enumerate(support) if j != i)[2]
                if np.linalg.norm(x - y) <= radius:
                    hits += 1
                    break
        return hits / len(points)

    expected = covered(a, b), covered(b, a)
    assert precision_recall(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected)
    assert expected[0] > expected[1]
    with pytest.raises(ValueError, match="3 neighbours"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))


def test_discrepancies_are_the_definition():
    a, b = features(4).double(), features(5, 0.3).double()
    kernel = gaussian(2.0)
    assert kernel(a, b)[3, 7].item() == pytest.approx(np.exp(-((a[3] - b[7]) ** 2).sum().item() / 8))
    rows = torch.tensor([1, 4, 9, 30])
    pairs = [(i, j) for i in rows for j in rows if i != j]

    def k(x: Tensor, y: Tensor) -> float:
        return (x @ y / WIDTH + 1).item() ** 3

    plain = sum(k(a[i], a[j]) + k(b[i], b[j]) - k(a[i], b[j]) - k(a[j], b[i]) for i, j in pairs) / 12
    assert grams(a, b, polynomial).squared(rows) == pytest.approx(plain, rel=CLOSE)
    distances = [np.linalg.norm(a[i] - a[j]) for i in range(COUNT) for j in range(i)]
    assert median_distance(a) == pytest.approx(np.sort(distances)[(len(distances) - 1) // 2], rel=CLOSE)
    u, v = (x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (a, b))

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / 200).mean())

    assert cmmd(a, b) == pytest.approx(1000 * (mean(u, u) + mean(v, v) - 2 * mean(u, v)), rel=CLOSE)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-9)


def test_cosine_and_perceptual_distance_are_the_definition():
    a, b = features(6), features(7)
    x, y = a.double().numpy(), b.double().numpy()
    expected = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert cosine(a, b).numpy() == pytest.approx(expected, rel=CLOSE)
    assert cosine(a, a).tolist() == [1.0] * COUNT
    assert perceptual_distance(a, b).numpy() == pytest.approx(
        np.linalg.norm(y - x, axis=1) / np.linalg.norm(x, axis=1), rel=CLOSE
    )
