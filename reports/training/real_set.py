"""Write `fashion-real.safetensors`: 200 real Fashion-MNIST test images and feature statistics of all 10,000.

The statistics are the mean and a triangular factor R of the covariance, R^T R = S, from a QR decomposition of the centred
features: 1,280 * 1,281 / 2 values, 1.6 MB in fp16. That keeps every one of the 10,000 images (a Frechet distance is biased by
1 / images), where fp16 features of 1,000 images would take 2.6 MB, and a truncated factor would lose directions. S stays positive
semi-definite whatever the rounding. The effect of fp16 on a Frechet distance is printed.

The data is Debian's `dataset-fashion-mnist` (MIT). Run `python reports/training/real_set.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from quantdit.evaluation.metrics.frechet import frechet_distance, summarise
from quantdit.evaluation.networks.efficientnet import WIDTH, efficientnet_lite0_features
from quantdit.evaluation.real_images import REAL_SET, feature_definition, load_real
from train_fashion_dit import read_idx, save_atomic

CLASSES = 10
LICENCE = "Fashion-MNIST images and labels: MIT licence, Copyright (c) 2017 Zalando SE, https://github.com/zalandoresearch/fashion-mnist"


def balanced(labels: torch.Tensor, per_class: int) -> torch.Tensor:
    """Return indices `[10 * per_class]` of the first images of each class, the classes in turn (0, 1, ..., 9, 0, ...)."""
    return torch.stack([(labels == c).nonzero()[:per_class, 0] for c in range(CLASSES)], dim=1).flatten()


def main() -> None:
    """Compute the features of the test set and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=REAL_SET)
    parser.add_argument("--per-class", type=int, default=20)
    args = parser.parse_args()

    pixels, labels = read_idx("t10k")
    features = efficientnet_lite0_features(pixels.float() / 127.5 - 1)
    exact = summarise(features)
    pick = balanced(labels, args.per_class)
    rows, columns = torch.triu_indices(WIDTH, WIDTH)
    tensors = {
        "images": pixels[pick],
        "labels": labels[pick].to(torch.uint8),
        "mean": exact.mean.float(),
        "factor": exact.factor[rows, columns].half(),
    }
    metadata = feature_definition() | {"count": str(len(pixels)), "split": "t10k", "licence": LICENCE}
    save_atomic(tensors, args.output, metadata)
    args.output.chmod(0o644)  # safetensors writes files that only their owner can read

    stored = load_real(args.output).statistics
    sample = summarise(features[pick])
    print(f"{args.output.name}: {args.output.stat().st_size:,} bytes, {len(pick)} images, statistics of {len(pixels)}")
    print(f"distance of stored to exact statistics: {frechet_distance(stored, exact):.3g}")
    to_stored, to_exact = frechet_distance(sample, stored), frechet_distance(sample, exact)
    print(f"distance of the images to the stored statistics: {to_stored:.4f}, to the exact: {to_exact:.4f}")


if __name__ == "__main__":
    main()
