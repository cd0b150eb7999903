"""PSNR and SSIM against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from quantdit.evaluation.metrics.paired import PSNR_CEILING, capped, psnr, ssim


def random_images(seed: int, size: int = 16) -> torch.Tensor:
    return torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def test_psnr_of_known_offsets():
    """An offset of e is 20 log10(range / e) dB, image by image."""
    reference = random_images(0)
    offset = torch.tensor([0.02, 0.2, -0.2, 2.0], dtype=torch.float64)
    decibels = psnr(reference, reference + offset[:, None, None, None])
    torch.testing.assert_close(decibels, torch.tensor([40.0, 20.0, 20.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-9)
    eight_bit = psnr(reference * 127.5, (reference + 0.02) * 127.5, data_range=255)
    torch.testing.assert_close(eight_bit, torch.full((4,), 40.0, dtype=torch.float64), rtol=0, atol=1e-9)


def test_psnr_averages_the_error_inside_an_image():
    """Half of the pixels off by e: 3.01 dB better than all of them."""
    reference = random_images(0)
    candidate = reference.clone()
    candidate[:, :, :8] += 0.2
    assert psnr(reference, candidate).tolist() == pytest.approx([20 + 10 * math.log10(2)] * 4)


def test_identical_images_are_infinite_and_capped():
    reference = random_images(0)
    candidate = reference.clone()
    candidate[0] += 0.2
    decibels = psnr(reference, candidate)
    assert torch.isinf(decibels).tolist() == [False, True, True, True]
    assert capped(decibels).mean().item() == pytest.approx((20 + 3 * PSNR_CEILING) / 4)


def test_ssim_of_constant_images():
    """Without variance only the luminance term is left: (2 x y + C1) / (x^2 + y^2 + C1), C1 = (0.01 range)^2."""
    pytest.importorskip("skimage")
    x, y, c1 = 0.5, -0.2, 0.02**2
    values = ssim(torch.full((2, 1, 16, 16), x), torch.full((2, 1, 16, 16), y))
    # skimage keeps float64; the inputs are float32 constants.
    assert values.tolist() == pytest.approx([(2 * x * y + c1) / (x**2 + y**2 + c1)] * 2, rel=1e-5)


def test_ssim_falls_with_noise():
    pytest.importorskip("skimage")
    reference, noise = random_images(0), random_images(1)
    means = [ssim(reference, reference + scale * noise).mean().item() for scale in (0.0, 0.05, 0.2, 0.8)]
    assert means[0] == pytest.approx(1, abs=1e-12)
    assert means == sorted(means, reverse=True) and means[-1] < 0.9


def test_refuses_what_cannot_be_compared():
    reference = random_images(0)
    with pytest.raises(ValueError, match="same seeds"):
        psnr(reference, reference[:2])
    with pytest.raises(ValueError, match="candidate images contain NaN"):
        psnr(reference, reference / 0)
    with pytest.raises(ValueError, match="data_range"):
        psnr(reference, reference, data_range=0)
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(random_images(0, size=8), random_images(1, size=8))
