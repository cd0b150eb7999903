"""`Stats`: what calibration saw at the input of one linear, accumulated as a stream.

A Gram matrix of unrotated inputs serves every rotation: `R^T (sum x x^T) R` is the Gram matrix of the rotated ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SAMPLED_ROWS = 16  # rows kept of each update


@dataclass(frozen=True)
class Stats:
    """Sums over the `count` rows seen so far at an input of width k.

    Attributes:
        count: rows (tokens).
        gram: `sum x x^T`, float32 `[k, k]`.
        absmax: largest magnitude per timestep bucket and channel, float32 `[buckets, k]`.
        rows: an even sample of the rows themselves, float32 `[r, k]`, to measure output errors with quantized activations.
    """

    count: int
    gram: Tensor
    absmax: Tensor
    rows: Tensor

    @property
    def rms(self) -> float:
        """Return J of LRQ-DiT section 4.2: `||X||_F / sqrt(rows * channels)`."""
        return float((self.gram.diagonal().double().sum() / max(1, self.count * self.gram.shape[0])).sqrt())


def init(width: int, buckets: int) -> Stats:
    """Return the Stats of no rows."""
    return Stats(0, torch.zeros(width, width), torch.zeros(buckets, width), torch.zeros(0, width))


def update(stats: Stats, x: Tensor, bucket: int) -> Stats:
    """Return `stats` with the rows x `[..., k]` of one timestep bucket added.

    Raises:
        ValueError: x has a NaN or an infinity.
    """
    x = x.detach().reshape(-1, x.shape[-1]).float()
    peak = x.abs().amax(dim=0)
    if not bool(torch.isfinite(peak).all()):
        raise ValueError(f"{int((~torch.isfinite(peak)).sum())} of {x.shape[1]} input channels are NaN or infinite")
    absmax = stats.absmax.clone()
    absmax[bucket] = torch.maximum(absmax[bucket], peak)
    # Odd stride: an even one would meet the same token positions of every image.
    stride = max(1, len(x) // SAMPLED_ROWS) | 1
    return replace(
        stats,
        count=stats.count + len(x),
        gram=stats.gram.addmm(x.T, x),
        absmax=absmax,
        rows=torch.cat([stats.rows, x[::stride][:SAMPLED_ROWS]]),
    )


def merge(a: Stats, b: Stats) -> Stats:
    """Return the Stats of the rows of both."""
    return Stats(a.count + b.count, a.gram + b.gram, torch.maximum(a.absmax, b.absmax), torch.cat([a.rows, b.rows]))
