"""Measures of clips: VBench's flickering to the last digit, the proxies on clips whose motion is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from quantdit.evaluation.metrics.video import (
    as_bytes,
    consistency_proxy,
    dynamic_degree_proxy,
    motion_smoothness_proxy,
    temporal_flickering,
)

FRAMES, SIDE = 12, 32


def moving(speed: float, jitter: float = 0.0, noise: float = 0.0) -> Tensor:
    """A soft disc that moves to the right by `speed` pixels a frame, `[FRAMES, 3, SIDE, SIDE]`; jitter moves it to and fro."""
    y, x = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    frames = []
    for t in range(FRAMES):
        centre = SIDE / 2 + speed * (t - FRAMES / 2) + jitter * (-1) ** t
        frames.append(2 * torch.exp(-((x - centre) ** 2 + (y - SIDE / 2) ** 2) / 40) - 1)
    clip = torch.stack(frames)[:, None].expand(-1, 3, -1, -1)
    return (clip + noise * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)


def test_temporal_flickering_is_vbench_s():
    """VBench's loop: `255 - mean of cv2.absdiff` of successive 8-bit frames, over 255."""
    clip = moving(1.0, noise=0.1)
    frames = [((f + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for f in clip]
    differences = [np.mean(np.maximum(a, b) - np.minimum(a, b), dtype=np.float64) for a, b in itertools.pairwise(frames)]
    assert temporal_flickering(clip) == pytest.approx((255.0 - np.mean(differences)) / 255.0, abs=1e-12)
    assert temporal_flickering(clip[:1].expand(FRAMES, -1, -1, -1)) == 1.0
    assert np.array_equal(as_bytes(clip), np.stack(frames))


def test_a_still_is_not_dynamic_and_a_fast_thing_is():
    pytest.importorskip("skimage")
    # VBench's threshold is 6 pixels for a side of 256, hence 0.75 for 32.
    assert [dynamic_degree_proxy(moving(speed)) for speed in (0.0, 0.2, 1.5)] == [0.0, 0.0, 1.0]


def test_even_motion_is_smoother_than_jerky_motion():
    pytest.importorskip("skimage")
    even, jerky = motion_smoothness_proxy(moving(1.0)), motion_smoothness_proxy(moving(1.0, jitter=1.5))
    assert 0.98 < even <= 1 and jerky < even - 0.01


def test_consistency_is_vbench_s_formula():
    """On features that are the pixels: the mean of the cosines to the frame before and to the first, none below 0."""
    clip = moving(1.0)
    x = clip.flatten(1).double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    expected = [(max(0.0, x[t] @ x[t - 1]) + max(0.0, x[t] @ x[0])) / 2 for t in range(1, FRAMES)]
    assert consistency_proxy(clip, lambda images: images.flatten(1)) == pytest.approx(np.mean(expected))
