"""Train and load the small Fashion-MNIST classifier that tells whether a generated image shows the class asked for.

Four 3 x 3 convolutions with batch norm, AdamW with one cycle of the learning rate (Smith and Topin 2017, arXiv 1708.07120),
random flips and shifts by up to two pixels. The test set is only reported, never used to choose a checkpoint; the accuracy in the
file's header is that of the fp16 weights as saved.

The data is Debian's `dataset-fashion-mnist` (MIT). Run `python reports/training/fashion_classifier.py`.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from quantdit.models.known_models import EMBEDDED
from train_fashion_dit import read_idx, save_atomic

CLASSIFIER = EMBEDDED / "fashion-classifier.safetensors"
LOG = Path(__file__).with_suffix(".log.jsonl")
DATA_SOURCE = "Fashion-MNIST, MIT licence, Copyright (c) 2017 Zalando SE"
CLASSES = 10
SHIFT = 2


def build_classifier() -> nn.Sequential:
    """Return the untrained network: images `[n, 1, 28, 28]` in [-1, 1] to logits `[n, 10]`; 243 thousand parameters."""

    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *stage(1, 32),
        nn.MaxPool2d(2),  # [n, 32, 14, 14]
        *stage(32, 64),
        nn.MaxPool2d(2),  # [n, 64, 7, 7]
        *stage(64, 128),
        *stage(128, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(128, CLASSES),
    ).to(memory_format=torch.channels_last)


@functools.cache
def load_classifier(path: Path = CLASSIFIER) -> nn.Module:
    """Return the trained classifier, float32, in eval mode, on the CPU: `[n, 1, 28, 28]` in [-1, 1] to logits `[n, 10]`."""
    model = build_classifier()
    # strict=False: the only keys not stored are batch norm's counters of batches, which eval never reads.
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in load_file(path).items()}, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    return model.eval().requires_grad_(False)


def recognised(images: torch.Tensor, labels: torch.Tensor) -> float:
    """Fraction of images that the classifier puts into the class they were generated for.

    Args:
        images: `[n, 1, 28, 28]` float in [-1, 1], n >= 1.
        labels: `[n]` int, 0 to 9.

    Raises:
        ValueError: if the shapes are not these.
    """
    if images.shape != (len(labels), 1, 28, 28) or labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"images are {list(images.shape)} with labels {list(labels.shape)}, expected [n, 1, 28, 28] and [n]")
    return accuracy(load_classifier(), images, labels)


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Fraction of images `[n, 1, 28, 28]` in [-1, 1] whose largest logit is at their label `[n]`."""
    with torch.inference_mode():
        hits = [
            (model(x.to("cpu", torch.float32)).argmax(dim=1) == y.cpu()).sum()
            for x, y in zip(images.split(500), labels.split(500), strict=True)
        ]
    return sum(int(h) for h in hits) / len(labels)


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flip each image `[n, 1, 28, 28]` left to right with probability 1/2 and shift it by up to two pixels, black beyond."""
    size = x.shape[-1]
    padded = nn.functional.pad(x, (SHIFT, SHIFT, SHIFT, SHIFT), value=-1.0)
    top, left = torch.randint(2 * SHIFT + 1, (2, len(x), 1), generator=generator)
    steps = torch.arange(size)
    flip = torch.rand(len(x), 1, generator=generator) < 0.5
    columns = torch.where(flip, size - 1 - steps, steps) + left  # [n, size]
    rows = steps + top  # [n, size]
    return padded[torch.arange(len(x))[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def main() -> None:
    """Train, report, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=CLASSIFIER)
    parser.add_argument("--log", type=Path, default=LOG)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    (pixels, labels), (test_pixels, test_labels) = read_idx("train"), read_idx("t10k")
    images, test_images = pixels.float() / 127.5 - 1, test_pixels.float() / 127.5 - 1
    model = build_classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    steps = args.epochs * (len(images) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)
    settings = {"seed": args.seed, "batch": args.batch, "lr": args.lr, "torch": torch.__version__}
    args.log.write_text("")
    began = time.time()
    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        batches = torch.randperm(len(images), generator=generator).split(args.batch)[: len(images) // args.batch]
        for pick in batches:
            loss = nn.functional.cross_entropy(model(augment(images[pick], generator)), labels[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        row = {
            "epoch": epoch + 1,
            "loss": round(total / len(batches), 5),
            "test_accuracy": accuracy(model.eval(), test_images, test_labels),
            "seconds": round(time.time() - began, 1),
        }
        left = (args.epochs - epoch - 1) * row["seconds"] / (epoch + 1)
        print(f"{json.dumps(row)}, about {left:.0f} s left", flush=True)
        with args.log.open("a") as log:
            log.write(json.dumps(row | settings) + "\n")

    state = {k: v.half() for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    final = accuracy(model, test_images, test_labels)
    metadata = {"test_accuracy": str(final), "seed": str(args.seed), "epochs": str(args.epochs), "data": DATA_SOURCE}
    save_atomic(state, args.output, metadata)
    args.output.chmod(0o644)  # safetensors writes files that only their owner can read
    print(f"test accuracy {final:.4f}, {args.output.name} {args.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
