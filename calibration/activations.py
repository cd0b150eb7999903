"""A linear's inputs as it sees them once they are quantized, and the static scales that some are quantized by."""

from __future__ import annotations

import torch
from torch import Tensor

import quantdit.kernels  # noqa: F401 - defines torch.ops.quantdit
from quantdit.tensors.layer_spec import ActivationSpec

STATIC_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)


def quantized_inputs(x: Tensor, activation: ActivationSpec, scales: Tensor | None, buckets: Tensor) -> Tensor:
    """Return transformed inputs x `[r, k]` as a layer sees them after quantization, float32.

    `scales` `[buckets]` of static activations, and the bucket of each row, `[r]`.
    """
    if activation.edge_bits:
        at_edge = (buckets == 0) | (buckets == activation.last_bucket)
        seen = torch.empty_like(x)
        for rows, how in ((at_edge, activation.edge), (~at_edge, activation.between)):
            seen[rows] = quantized_inputs(x[rows], how, scales, buckets[rows])
        return seen
    if activation.bits == 16:
        return x
    if activation.format == "fp8":
        codes, scale = torch.ops.quantdit.quantize_tokens_fp8(x)
        return codes.float() * scale[:, None]
    affine = activation.format == "affine"
    if scales is None:
        codes, scale = torch.ops.quantdit.quantize_tokens(x, activation.bits, activation.group_size, affine)
        return codes.float() * scale[:, None]
    seen = torch.empty_like(x)
    for bucket in buckets.unique().tolist():
        of_bucket, static = buckets == bucket, scales[bucket : bucket + 1]
        codes, scale = torch.ops.quantdit.quantize_tokens(x[of_bucket], activation.bits, activation.group_size, affine, static)
        seen[of_bucket] = codes.float() * scale[:, None]
    return seen


def static_scales(x: Tensor, buckets: Tensor, activation: ActivationSpec) -> Tensor | None:
    """Return one scale per timestep bucket `[buckets]` float32 for transformed rows x `[r, k]`; None if scales are dynamic.

    The clip of least squared error among STATIC_CLIPS of the largest magnitude. A bucket that saw nothing takes the scale of the
    nearest that did (the noisier one first).
    """
    if not activation.buckets:
        return None
    # Groups divide the token's int8 grid further, so that their static scale is the grid's.
    top = 127 if activation.group_size else 2 ** (activation.bits - 1) - 1
    seen = buckets.unique().tolist()
    scales = torch.zeros(activation.buckets, dtype=torch.float32)
    for bucket in seen:
        rows = x[buckets == bucket]
        peak = rows.abs().max().clamp_min(1e-30) / top
        clipped = [(rows - (rows / (peak * c)).round().clamp(-top, top) * peak * c).square().sum() for c in STATIC_CLIPS]
        scales[bucket] = peak * STATIC_CLIPS[int(torch.stack(clipped).argmin())]
    for bucket in set(range(activation.buckets)) - set(seen):
        nearest = min(seen, key=lambda b: (abs(b - bucket), b), default=None)
        scales[bucket] = 1.0 if nearest is None else scales[nearest]
    return scales


def relative_noise(seen: Tensor, x: Tensor) -> float:
    """Return the mean over rows of `|seen - x|^2 / |x|^2`, for rows x `[r, k]` and what quantization makes of them."""
    return float(((seen - x).square().sum(dim=1) / x.square().sum(dim=1).clamp_min(1e-30)).mean()) if len(x) else 0.0
