"""The embedded classifier knows the classes of real images, and does not see them where they are not."""

from __future__ import annotations

import pytest
import torch

from fashion_classifier import recognised
from quantdit.evaluation.real_images import load_real


def test_real_images_are_recognised():
    """At 91 % accuracy, 200 images deviate by 2 points; four of those below is 83 %. Every wrong label is refused."""
    real = load_real()
    assert recognised(real.images, real.labels) >= 0.83
    assert recognised(real.images, (real.labels + 1) % 10) <= 0.1
    half = torch.where(torch.arange(200) < 100, real.labels, (real.labels + 1) % 10)
    assert 0.35 < recognised(real.images, half) < 0.6


def test_noise_is_not_recognised():
    """Noise falls into one or two classes: about a tenth of balanced labels."""
    noise = torch.randn(200, 1, 28, 28, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert recognised(noise, torch.arange(200) % 10) < 0.3


def test_refuses_other_shapes():
    with pytest.raises(ValueError, match="28, 28"):
        recognised(torch.zeros(2, 1, 32, 32), torch.zeros(2))
    with pytest.raises(ValueError, match=r"\[n\]"):
        recognised(torch.zeros(2, 1, 28, 28), torch.zeros(3))
