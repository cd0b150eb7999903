"""Real images: the embedded sample of Fashion-MNIST's test set with feature statistics of all of it, and a user's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from quantdit.evaluation.metrics.frechet import FeatureStatistics
from quantdit.evaluation.networks.efficientnet import BACKBONE, RESOLUTION, WEIGHTS_SHA256, WIDTH

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
REAL_SET = Path(__file__).resolve().parents[1] / "models" / "embedded" / "fashion-real.safetensors"


@dataclass(frozen=True)
class RealSet:
    """Real images, and statistics of many more.

    Attributes:
        images: `[n, 1, 28, 28]` float32 in [-1, 1]; image i has class i % 10.
        labels: `[n]` int64, class of each image, 0 to 9.
        statistics: EfficientNet-Lite0 feature statistics of the 10,000 test images.
    """

    images: Tensor
    labels: Tensor
    statistics: FeatureStatistics


def load_real(path: Path = REAL_SET) -> RealSet:
    """Load the embedded real set (Fashion-MNIST, MIT licence, Zalando SE).

    Raises:
        ValueError: if its statistics were made with other weights or another resolution than `features` uses now.
    """
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    expected = feature_definition()
    found = {key: metadata.get(key) for key in expected}
    if found != expected:
        raise ValueError(
            f"{path.name} was made with {found}, this version computes {expected}; "
            "remake it with: python reports/training/real_set.py"
        )
    # The factor is upper triangular (a QR factor): its rows are stored from the diagonal on.
    factor = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    rows, columns = torch.triu_indices(WIDTH, WIDTH)
    factor[rows, columns] = tensors["factor"].double()
    statistics = FeatureStatistics(tensors["mean"].double(), factor, int(metadata["count"]))
    return RealSet(tensors["images"].float() / 127.5 - 1, tensors["labels"].long(), statistics)


def feature_definition() -> dict[str, str]:
    """Return what must agree between stored and computed features, as safetensors metadata."""
    return {"backbone": BACKBONE, "resolution": str(RESOLUTION), "weights_sha256": WEIGHTS_SHA256}


def read_images(folder: Path) -> list[Tensor]:
    """Return the pictures of a folder, in order of their names, each `[1, 3, h, w]` in [-1, 1].

    Raises:
        ValueError: no folder, fewer than two pictures, or one that cannot be read.
    """
    from PIL import Image

    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES) if folder.is_dir() else []
    if len(paths) < 2:
        raise ValueError(f"{folder}: {len(paths)} pictures, expected a folder of at least two ({', '.join(PICTURES)})")
    found = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                pixels = torch.from_numpy(np.array(picture.convert("RGB")))
        except OSError as error:
            raise ValueError(f"{path}: no picture that can be read; remove it or fetch it again") from error
        found.append(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1)
    return found
