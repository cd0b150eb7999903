"""Which rotation a layer's inputs get: LRQ-DiT's Adaptive Rotation Scheme (section 4.2), or the least measured output error.

Outlier-aware rotation after DuQuant (Lin et al. 2024, arXiv 2406.01721): R1 P R2, greedily built block by block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantdit import hadamard, transform
from quantdit.transform import Transform

ROTATIONS = ("none", "hadamard", "outlier", "ars", "auto", "regular")
BUILT = (*transform.KINDS, "regular")
GREEDY_STEPS = 256
ARS_THRESHOLD = 1.0


@dataclass(frozen=True)
class Choice:
    """The rotation chosen, a name of transform.KINDS; its transform; the error of each candidate that was compared."""

    kind: str
    transform: Transform
    errors: dict[str, float]


def ars(rms: float, threshold: float = ARS_THRESHOLD) -> str:
    """Return the rotation that J = rms of a layer's inputs asks for: `hadamard` below the threshold, `outlier` from it on."""
    return "hadamard" if rms < threshold else "outlier"


def build(kind: str, rows: Tensor, seed: int, factor: Tensor | None = None, steps: int = GREEDY_STEPS) -> Transform:
    """Return the transform of one rotation for inputs like `rows`.

    Blocks are the largest power of two that divides the width, at most 128. For an odd width there are none, and nothing is
    rotated whatever the kind.

    Args:
        kind: a name of transform.KINDS, or `regular`: a Hadamard whose signs make it ConvRot's (`hadamard.regular_sign`).
        rows: `[r, k]` float, a sample of the inputs as they come, neither smoothed nor rotated.
        seed: of the Hadamard's signs (`hadamard.random_sign`) and of the greedy rotations.
        factor: smoothing factor `[k]`, which inputs are divided by before the rotation; None for none.
        steps: greedy steps per block of an outlier rotation, at most.

    Raises:
        ValueError: unknown kind, or rows with NaN or infinite entries.
    """
    if kind not in BUILT:
        raise ValueError(f"unknown rotation {kind!r}; known: {', '.join(BUILT)}")
    width = rows.shape[1]
    block = hadamard.regular_block_size(width) if kind == "regular" else hadamard.block_size(width)
    if kind == "none" or block == 1:
        rotation = Transform()
    elif kind == "hadamard":
        rotation = Transform(premultiplier=hadamard.random_sign(width, seed), block=block)
    elif kind == "regular":
        rotation = Transform(premultiplier=hadamard.regular_sign(width, block), block=block)
    else:
        rotation = outlier_rotation(transform.apply(transform.smooth(Transform(), factor), rows.float()), block, seed, steps)
    return transform.smooth(rotation, factor)


def candidates(rows: Tensor, seed: int, factor: Tensor | None = None, steps: int = GREEDY_STEPS) -> dict[str, Transform]:
    """Return `build(kind, ...)` of every kind."""
    return {kind: build(kind, rows, seed, factor, steps) for kind in transform.KINDS}


def choose(
    rotation: str,
    rows: Tensor,
    rms: float,
    error: Callable[[Transform], float],
    seed: int,
    factor: Tensor | None = None,
    threshold: float = ARS_THRESHOLD,
) -> Choice:
    """Return the rotation of one layer.

    Args:
        rotation: a kind; `ars`, which takes the kind J asks for; or `auto`, which takes the kind of least `error`, the simplest
            if they tie.
        rows: `[r, k]`, the inputs an outlier rotation is fitted to.
        rms: J, root mean square of the layer's inputs (Stats.rms).
        error: the output error of the layer quantized with a transform, measured on rows other than `rows`. It is asked only
            where there is something to compare, that is for `auto`.
        seed: see `build`.
        factor: see `build`.
        threshold: of J.

    Raises:
        ValueError: unknown rotation, rows with NaN or infinite entries, or no candidate with a finite error.
    """
    if rotation not in ROTATIONS:
        raise ValueError(f"unknown rotation {rotation!r}; known: {', '.join(ROTATIONS)}")
    if rotation != "auto":
        kind = ars(rms, threshold) if rotation == "ars" else rotation
        built = build(kind, rows, seed, factor)
        return Choice(built.kind if kind == "regular" else kind, built, {})
    built = candidates(rows, seed, factor)
    errors = {kind: error(t) for kind, t in built.items()}
    finite = {kind: e for kind, e in errors.items() if e < float("inf")}  # NaN is not
    if not finite:
        raise ValueError(f"no rotation gives a finite output error: {errors}")
    best = min(finite, key=finite.__getitem__)
    return Choice(best, built[best], errors)


def outlier_rotation(x: Tensor, block: int, seed: int, steps: int = GREEDY_STEPS) -> Transform:
    """Return DuQuant's R1 P R2 fitted to inputs x `[r, k]`: `max |x R1 P R2| <= max |x|`, in each block and so in all.

    Args:
        x: float, finite; any number of rows, also none.
        block: size of the blocks, divides k.
        seed: of the random parts of the greedy steps.
        steps: greedy steps per block, at most.

    Raises:
        ValueError: x has NaN or infinite entries.
    """
    x = x.detach().float()
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{int((~torch.isfinite(x)).any(dim=1).sum())} of {len(x)} input rows have NaN or infinite entries")
    rotation1 = greedy_blocks(x, block, 2 * seed, steps)
    x = transform.block_product(x, rotation1)
    permutation = zigzag(x.abs().amax(dim=0) if len(x) else x.new_zeros(x.shape[1]), block)
    rotation2 = greedy_blocks(x[:, permutation], block, 2 * seed + 1, steps)
    return Transform(rotation1=rotation1, permutation=permutation.to(torch.int32), rotation2=rotation2)


def zigzag(peak: Tensor, block: int) -> Tensor:
    """Return the permutation `[k]` int64 that deals channels, largest peak `[k]` first, to blocks 1..n, n..1, 1..n, ...

    Channel `permutation[j]` goes to place j. Block means differ by at most (largest - smallest peak) / block.
    """
    order = peak.argsort(descending=True, stable=True).reshape(block, -1)  # [block, n]: one deal a row
    order[1::2] = order[1::2].flip(1)
    return order.T.reshape(-1)


def greedy_blocks(x: Tensor, block: int, seed: int, steps: int) -> Tensor:
    """Return orthogonal blocks `[k / block, block, block]` float32 that flatten the peaks of x `[r, k]` (DuQuant).

    Each step moves the channel of the block's largest entry to the front, multiplies by an orthogonal matrix whose first row is
    uniform and whose others are random, and moves it back. The best of all steps, the identity included, is kept.
    """
    rows, count = len(x), x.shape[1] // block
    best = torch.eye(block, dtype=torch.float32).repeat(count, 1, 1)
    if rows == 0:
        return best
    generator = torch.Generator().manual_seed(seed)
    least = torch.full((count,), float("inf"), dtype=torch.float32)
    # Rows of the identity go along and become the product of all steps. Two buffers: allocating a new one costs as much as the
    # product.
    now = torch.cat([x.unflatten(1, (count, block)).transpose(0, 1), best], dim=1)  # [count, rows + block, block]
    then = torch.empty_like(now)
    for step in range(steps + 1):
        peak, channel = torch.maximum(now[:, :rows].amax(dim=1), -now[:, :rows].amin(dim=1)).max(dim=1)
        better = peak < least * (1 - 1e-5)  # by more than rounding
        least = torch.where(better, peak, least)
        best[better] = now[better, rows:]
        if step < steps:
            torch.bmm(now, _spread(block, channel, generator), out=then)
            now, then = then, now
    # One Newton-Schulz step: hundreds of float32 products leave 1e-5 of non-orthogonality, this squares it.
    best = best.double()
    return (best @ (3 * torch.eye(block, dtype=torch.float64) - best.mT @ best) / 2).float()


def _spread(block: int, channel: Tensor, generator: torch.Generator) -> Tensor:
    """Return orthogonal `[n, block, block]`, for each block one that spreads its `channel` `[n]` evenly over the block.

    It is E M E, E exchanging 0 and the channel, with M one random orthogonal matrix whose first row is uniform.
    """
    start = torch.randn(block, block, generator=generator, dtype=torch.float32)
    start[:, 0] = 1
    m = torch.linalg.qr(start).Q.T.repeat(len(channel), 1, 1)
    n = torch.arange(len(channel))
    m[n, 0], m[n, channel] = m[n, channel], m[n, 0]
    m[n, :, 0], m[n, :, channel] = m[n, :, channel], m[n, :, 0]
    return m
