"""Measures of image pairs that two models generated from the same seeds, one value for each pair."""

from __future__ import annotations

import torch

from quantdit.system.optional_import import require

# An image counts for at most this much in a mean of PSNRs (identical ones have infinity). 100 dB is a root mean square error of
# 1e-5 of the data range, some 400 times finer than a step of 8-bit pixels: nothing above it can be seen.
PSNR_CEILING = 100.0

# Half width of the Gaussian window of SSIM in pixels: scikit-image cuts it at 3.5 deviations of 1.5 pixels.
_SSIM_RADIUS = int(3.5 * 1.5 + 0.5)
SSIM_WINDOW = 2 * _SSIM_RADIUS + 1  # least height and width of an image


def psnr(reference: torch.Tensor, candidate: torch.Tensor, data_range: float = 2.0) -> torch.Tensor:
    """Peak signal-to-noise ratio of each pair, 10 log10(data_range^2 / mean squared error).

    The error is averaged over the channels and pixels of one image, and the logarithm taken for each image: the mean of the
    result is a mean of decibels. Use `capped` before a mean, since identical images give infinity.

    Args:
        reference: `[n, c, h, w]` float.
        candidate: the same shape.
        data_range: largest minus smallest possible value, 2 for images in [-1, 1].

    Returns:
        `[n]` float64, decibels.

    Raises:
        ValueError: if the shapes differ, values are not finite, or data_range is not positive.
    """
    reference, candidate = _pair(reference, candidate)
    if not data_range > 0:
        raise ValueError(f"data_range is {data_range}, expected a positive number: 2 for images in [-1, 1]")
    error = (reference - candidate).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(data_range**2 / error)


def capped(decibels: torch.Tensor) -> torch.Tensor:
    """Return PSNRs with everything above `PSNR_CEILING`, infinity included, set to it: finite means, valid JSON."""
    return decibels.clamp(max=PSNR_CEILING)


def ssim(reference: torch.Tensor, candidate: torch.Tensor, data_range: float = 2.0) -> torch.Tensor:
    """Structural similarity of each pair, by scikit-image with the settings of the paper.

    (Wang et al. 2004, IEEE TIP 13(4), section III: Gaussian window of deviation 1.5, 11 x 11 pixels, biased covariances,
    K1 = 0.01, K2 = 0.03; mean over windows inside the image and over channels.)

    Args:
        reference: `[n, c, h, w]` float, h and w >= 11.
        candidate: the same shape.
        data_range: largest minus smallest possible value, 2 for images in [-1, 1].

    Returns:
        `[n]` float64 in [-1, 1]; 1 for identical images.

    Raises:
        ValueError: if the shapes differ, values are not finite, or images are smaller than the window.
        ModuleNotFoundError: if the `eval` extra is not installed.
    """
    reference, candidate = _pair(reference, candidate)
    if min(reference.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"images are {list(reference.shape[2:])} pixels, SSIM needs at least {SSIM_WINDOW} x {SSIM_WINDOW}")
    similarity = require("skimage.metrics").structural_similarity
    values = [
        similarity(x, y, data_range=data_range, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        for x, y in zip(reference.numpy(), candidate.numpy(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def perceptual_distance(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Relative distance of the features of each pair, `|f(y) - f(x)| / |f(x)|`: 0 for equal images.

    A proxy of LPIPS, which compares features of several depths of a network that is not shipped.

    Args:
        reference: features `[n, d]` float.
        candidate: the same shape.

    Returns:
        `[n]` float64.
    """
    a, b = reference.double(), candidate.double()
    return (b - a).norm(dim=1) / a.norm(dim=1).clamp_min(1e-30)


def cosine(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Cosine of the angle between each pair of latents `[n, ...]`, in `[n]` float64; 1 for equal ones."""
    a, b = (x.double().flatten(1) for x in (reference, candidate))
    # Of unit vectors 1 - |a - b|^2 / 2: their product would lose what is below 1e-16 of it, and be above 1.
    return 1 - (_unit(a) - _unit(b)).square().sum(1) / 2


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=1, keepdim=True).clamp_min(1e-30)


def _pair(reference: torch.Tensor, candidate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if reference.shape != candidate.shape or reference.ndim != 4 or len(reference) == 0:
        raise ValueError(
            f"reference is {list(reference.shape)} and candidate {list(candidate.shape)}, expected the same [n, c, h, w]: "
            "generate both from the same seeds"
        )
    for name, images in (("reference", reference), ("candidate", candidate)):
        if not torch.isfinite(images).all():
            raise ValueError(f"{name} images contain NaN or inf: find the layer that overflowed before measuring")
    return reference.detach().to("cpu", torch.float64), candidate.detach().to("cpu", torch.float64)
