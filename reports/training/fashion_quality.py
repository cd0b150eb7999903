"""Measure `fashion-dit`: the share of guided samples that a classifier trained on real images recognises as their class."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from scipy.stats import binomtest

from fashion_classifier import CLASSIFIER, recognised
from quantdit.pipelines.generate import generate
from quantdit.pipelines.pipeline import load_pipeline


def main() -> None:
    """Sample, classify, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="fashion-dit")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("reports/fashion-dit-quality.json"))
    args = parser.parse_args()
    pipeline, _ = load_pipeline(args.model)
    images = generate(pipeline, args.samples, args.seed, 20, args.guidance, batch=100)
    labels = torch.arange(args.samples) % 10
    share = recognised(images, labels)
    interval = binomtest(round(share * args.samples), args.samples).proportion_ci(method="wilson")
    per_class = {str(c): round(recognised(images[labels == c], labels[labels == c]), 3) for c in range(10)}
    report = {
        "model": args.model,
        "samples": args.samples,
        "seed": args.seed,
        "guidance": args.guidance,
        "steps": 20,
        "recognised": round(share, 4),
        "interval_95": [round(interval.low, 4), round(interval.high, 4)],
        "per_class": per_class,
        "classifier": CLASSIFIER.name,
    }
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
