"""Rotations of a layer's inputs, and LRQ-DiT's Adaptive Rotation Scheme (section 4.2), which takes one by the inputs' RMS.

Outlier-aware rotation after DuQuant (Lin et al. 2024, arXiv 2406.01721): R1 P R2, greedily built block by block, of inputs that
are smoothed first: both released codes do, DuQuant's with `max|X|^.6 / max|W|^.4`, LRQ-DiT's with `max|X|^.5 / max|W|^.5`.
What they do and is not followed: one rotation shared by all blocks, and the row of the largest entry taken for its channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantdit.tensors import hadamard, transform
from quantdit.tensors.transform import Transform

BUILT = (*transform.KINDS, "regular")
GREEDY_STEPS = 8  # on rows that were not fitted, 256 random rotations are no flatter
ARS_THRESHOLD = 1.0


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
        seed: of the Hadamard's signs (`hadamard.random_sign`).
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
        rotation = outlier_rotation(transform.apply(transform.smooth(Transform(), factor), rows.float()), block, steps)
    return transform.smooth(rotation, factor)


def outlier_rotation(x: Tensor, block: int, steps: int = GREEDY_STEPS) -> Transform:
    """Return DuQuant's R1 P R2 fitted to inputs x `[r, k]`: `max |x R1 P R2| <= max |x|`, in each block and so in all.

    R1 spreads the largest channels over their blocks, P deals what that makes to all blocks, R2 spreads it over these: a large
    channel ends up in block^2 places or the whole width, where a block-Hadamard leaves it in one block.

    Args:
        x: float, finite; any number of rows, also none.
        block: size of the blocks, divides k.
        steps: greedy steps per block, at most.

    Raises:
        ValueError: x has NaN or infinite entries.
    """
    x = x.detach().float()
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{int((~torch.isfinite(x)).any(dim=1).sum())} of {len(x)} input rows have NaN or infinite entries")
    steps1 = greedy_steps(x, block, 0, steps)
    x = transform.block_product(x, transform.product(steps1, block, 0))
    permutation = zigzag(x.abs().amax(dim=0) if len(x) else x.new_zeros(x.shape[1]), block)
    steps2 = greedy_steps(x[:, permutation], block, transform.MAX_STEPS, steps)
    taken = max(1, *(int((s != transform.NO_STEP).any(dim=1).sum()) for s in (steps1, steps2)))
    named = {"steps1": steps1[:taken], "steps2": steps2[:taken], "permutation": permutation.to(torch.int32)}
    return transform.from_tensors("outlier", block, named)


def zigzag(peak: Tensor, block: int) -> Tensor:
    """Return the permutation `[k]` int64 that deals channels, largest peak `[k]` first, to blocks 1..n, n..1, 1..n, ...

    Channel `permutation[j]` goes to place j. Block means differ by at most (largest - smallest peak) / block.
    """
    order = peak.argsort(descending=True, stable=True).reshape(block, -1)  # [block, n]: one deal a row
    order[1::2] = order[1::2].flip(1)
    return order.T.reshape(-1)


def greedy_steps(x: Tensor, block: int, first: int, steps: int) -> Tensor:
    """Return the steps uint8 `[max(1, steps), k / block]` of a rotation that flattens the peaks of x `[r, k]` (DuQuant).

    Each step spreads the channel, not the row, of the block's largest entry evenly over the block (`hadamard.spread`). The best
    of all products, the identity included, is kept: what follows it is NO_STEP.

    Args:
        x: float32, finite.
        block: size of the blocks, divides k.
        first: number of the first step (`transform.product`).
        steps: at most.
    """
    count = x.shape[1] // block
    chosen = torch.full((max(1, steps), count), transform.NO_STEP, dtype=torch.uint8)
    if len(x) == 0:
        return chosen
    least = torch.full((count,), float("inf"), dtype=torch.float32)
    kept = torch.zeros(count, dtype=torch.int64)
    now = x.T.reshape(count, block, -1)
    for step in range(steps + 1):
        peak, channel = now.abs().amax(dim=2).max(dim=1)
        better = peak < least * (1 - 1e-5)  # by more than rounding
        least = torch.where(better, peak, least)
        kept[better] = step
        if step < steps:
            chosen[step] = channel.to(torch.uint8)
            now = hadamard.spread(now, channel, first + step)
    chosen[torch.arange(len(chosen))[:, None] >= kept] = transform.NO_STEP
    return chosen
