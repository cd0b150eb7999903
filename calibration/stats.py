"""`Stats`: what calibration saw at the input of one linear, accumulated as a stream.

A Gram matrix of unrotated inputs serves every rotation: `R^T (sum x x^T) R` is the Gram matrix of the rotated ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

GOLDEN = (5**0.5 - 1) / 2
SAMPLED_ROWS = 64  # rows kept of each update, until there are more than MOST_ROWS
MOST_ROWS = 8192  # in all: 450 MB where an input is 13,824 wide
CHUNK = 4096  # rows added at once: what is converted and sorted out at a time
BLOCK = 1280  # columns of the Gram matrix summed at once
HARDLY_VARY = 1 / 16  # part of the inputs' power that is not their mean's


@dataclass(frozen=True)
class Stats:
    """Sums over the `count` rows seen so far at an input of width k.

    Attributes:
        count: rows (tokens).
        total: `sum x`, float32 `[k]`.
        gram: `sum x x^T`, float32 `[k, k]`.
        absmax: largest magnitude per timestep bucket and channel, float32 `[buckets, k]`.
        rows: an even sample of the rows themselves, float32 `[r, k]`, to measure output errors with quantized activations.
        row_buckets: the timestep bucket of each of `rows`, int64 `[r]`.
        rows_an_update: how many the next update adds at most. It is halved, as the rows are, when they exceed MOST_ROWS.
    """

    count: int
    total: Tensor
    gram: Tensor
    absmax: Tensor
    rows: Tensor
    row_buckets: Tensor
    rows_an_update: int = SAMPLED_ROWS

    @property
    def mean(self) -> Tensor:
        """Return the mean row `[k]`."""
        return self.total / max(1, self.count)

    @property
    def centred_gram(self) -> Tensor:
        """Return `sum (x - mean) (x - mean)^T` `[k, k]`: what is left of output errors once the bias takes up their mean."""
        mean = self.mean.double()
        centred = torch.empty_like(self.gram)
        for rows, sums, m in zip(*(t.split(BLOCK) for t in (centred, self.gram, mean)), strict=True):
            rows.copy_(sums.double().addr_(m, mean, alpha=-self.count))
        # What float32 lost of the sums would leave a matrix that is not positive.
        trace = float(self.gram.diagonal().sum())
        lost = 2.0**-23 * trace
        diagonal = centred.diagonal().add_(lost)
        if float(diagonal.sum()) < HARDLY_VARY * trace:
            # Sums of nearly equal rows (the padding of short texts) lose more: each is rounded in the same way.
            while int(torch.linalg.cholesky_ex(centred).info):
                diagonal.add_(lost)
                lost *= 2
        return centred

    @property
    def rms(self) -> float:
        """Return J of LRQ-DiT section 4.2: `||X||_F / sqrt(rows * channels)`."""
        return float((self.gram.diagonal().double().sum() / max(1, self.count * self.gram.shape[0])).sqrt())


def init(width: int, buckets: int) -> Stats:
    """Return the Stats of no rows."""
    shapes = (width, (width, width), (buckets, width), (0, width))
    total, gram, absmax, rows = (torch.zeros(shape, dtype=torch.float32) for shape in shapes)
    return Stats(0, total, gram, absmax, rows, torch.zeros(0, dtype=torch.int64))


def update(stats: Stats, x: Tensor, bucket: int) -> Stats:
    """Return `stats` with the rows x `[..., k]` of one timestep bucket added.

    The Gram matrix is added to where it is: what is returned takes the place of `stats`, whose own `gram` is no longer its sum.

    Raises:
        ValueError: x has a NaN or an infinity; nothing is added then.
    """
    x = x.detach().reshape(-1, x.shape[-1])
    absmax, total = stats.absmax.clone(), stats.total.clone()
    for part in x.split(CHUNK):
        absmax[bucket] = torch.maximum(absmax[bucket], part.float().abs().amax(dim=0))
    finite = torch.isfinite(absmax[bucket])
    if not bool(finite.all()):
        raise ValueError(f"{int((~finite).sum())} of {x.shape[1]} input channels are NaN or infinite")
    for part in x.split(CHUNK):
        part = part.float()
        total += part.sum(dim=0)
        _add_products(stats.gram, part)
    sample = x[spread(len(x), len(stats.rows), stats.rows_an_update)].float()
    rows, row_buckets = torch.cat([stats.rows, sample]), torch.cat([stats.row_buckets, torch.full((len(sample),), bucket)])
    rows_an_update = stats.rows_an_update
    while len(rows) > MOST_ROWS:
        rows, row_buckets, rows_an_update = rows[::2].clone(), row_buckets[::2].clone(), max(1, rows_an_update // 2)
    return replace(
        stats,
        count=stats.count + len(x),
        total=total,
        absmax=absmax,
        rows=rows,
        row_buckets=row_buckets,
        rows_an_update=rows_an_update,
    )


def _add_products(gram: Tensor, x: Tensor) -> None:
    """Add `x^T x` to `gram` `[k, k]`: its upper half, block row by block row, and the same again below the diagonal."""
    width = len(gram)
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        gram[start:end, start:].addmm_(x[:, start:end].T, x[:, start:])
        gram[end:, start:end] = gram[start:end, end:].T


def spread(count: int, start: int, limit: int) -> Tensor:
    """Return up to `limit` of `count` row numbers, ascending, evenly spread whatever the period of the rows.

    One from each of `limit` equal parts, its place there the next multiple of the golden ratio: any fixed stride can meet
    the same token of every image.
    """
    if count <= limit:
        return torch.arange(count)
    part = torch.arange(limit, dtype=torch.float64)
    return ((part + (part + start) * GOLDEN % 1) * count / limit).long().unique()
