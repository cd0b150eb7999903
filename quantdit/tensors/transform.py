"""`Transform`: the change of space a linear's inputs undergo before they are quantized, `Y = (X T)(W T^-T)^T = X W^T`.

    T = diag(premultiplier) R,   R orthogonal: a block-Hadamard rotation, DuQuant's R1 P R2, or nothing

The premultiplier holds the Hadamard's random signs and the smoothing `1 / s` in one tensor (SmoothQuant, Xiao et al. 2022, Eq. 3;
QuaRot, Ashkboos et al. 2024; DuQuant, Lin et al. 2024). Only X and W are transformed, never the bias or Y.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantdit.formats import Field
from quantdit.tensors import hadamard
from quantdit.tensors.row_chunks import in_row_chunks

KINDS = ("none", "hadamard", "outlier")
DENSE = ("rotation1", "rotation2")
STEPS = ("steps1", "steps2")
NAMES = ("premultiplier", "permutation", *STEPS, *DENSE)
MAX_STEPS = 32
NO_STEP = 255
GRAM_ROWS = 1024  # transformed at once
# A smoothing's premultipliers take one byte: a sign, a power of two, and 1, 1.25, 1.5 or 1.75 of it.
PREMULTIPLIER = torch.float8_e5m2
ORTHONORMAL_TOLERANCE = 1e-4  # of R^T R; rounding a block of 128 to float32 leaves 1e-6


@dataclass(frozen=True)
class Transform:
    """What happens to a token x `[k]`: `x -> ((x * premultiplier) R1)[permutation] R2`, or `(x * premultiplier) (1 kron H)`.

    `Transform()` is the identity.

    Attributes:
        premultiplier: `[k]`, not zero: int8 signs of a rotation alone, float32 `sign / s` of a smoothed layer (rounded by
            `smooth`); None means 1.
        block: size of the Hadamard blocks, a power of two dividing k; 1 means no Hadamard.
        rotation1: outlier rotation R1, block-diagonal, float32 `[k/b, b, b]`, each block orthogonal; or None.
        permutation: int32 `[k]`, channel `permutation[j]` of `x R1` goes to place j; with rotation1 only.
        rotation2: as rotation1, after the permutation.
        steps1: what rotation1 is made of (`product`), uint8 `[steps, k/b]`; None if it is stored itself, as up to spec 3.
        steps2: the same of rotation2.
    """

    premultiplier: Tensor | None = None
    block: int = 1
    rotation1: Tensor | None = None
    permutation: Tensor | None = None
    rotation2: Tensor | None = None
    steps1: Tensor | None = None
    steps2: Tensor | None = None

    def __post_init__(self) -> None:
        """Check that the parts go together.

        Raises:
            ValueError: part of an outlier rotation is missing, or there is a Hadamard besides it.
        """
        if (self.steps1 is None) != (self.steps2 is None) or (self.steps1 is not None and self.rotation1 is None):
            raise ValueError("the steps of an outlier rotation go together, and with the rotations they make")
        outlier = [t is not None for t in (self.rotation1, self.permutation, self.rotation2)]
        if any(outlier) and not all(outlier):
            raise ValueError("an outlier rotation needs rotation1, permutation and rotation2 together")
        if any(outlier) and self.block > 1:
            raise ValueError(f"a transform has one rotation, got an outlier rotation and a Hadamard of block {self.block}")

    @property
    def kind(self) -> str:
        """Return which rotation this is: a name of KINDS."""
        return "outlier" if self.rotation1 is not None else "hadamard" if self.block > 1 else "none"

    @property
    def rotation_block(self) -> int:
        """Return the block size of the rotation, whichever it is; 1 without one."""
        return self.block if self.rotation1 is None else self.rotation1.shape[-1]

    @property
    def steps(self) -> int:
        """Return the greedy steps of an outlier rotation; 0 of one that is stored itself, and without one."""
        return 0 if self.steps1 is None else len(self.steps1)

    @property
    def smoothed(self) -> bool:
        """Return whether the premultiplier is more than signs."""
        return self.premultiplier is not None and self.premultiplier.is_floating_point()

    @property
    def identity(self) -> bool:
        """Return whether nothing happens to a token."""
        return self.premultiplier is None and self.kind == "none"


def smooth(t: Transform, factor: Tensor | None) -> Transform:
    """Return t with inputs divided by `factor` float `[k]`, positive, before anything else; None leaves t as it is.

    Premultipliers are rounded to the nearest normal number of PREMULTIPLIER, at most an eighth away. That loses nothing: the
    weight is divided by what the inputs are multiplied with.
    """
    if factor is None:
        return t
    kept = torch.finfo(PREMULTIPLIER)
    rounded = (1 / factor.float()).clamp(kept.smallest_normal, kept.max).to(PREMULTIPLIER).float()
    return replace(t, premultiplier=rounded if t.premultiplier is None else rounded * t.premultiplier.float())


def kept_in(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of transformed tokens, or of sums in their space, that came in this dtype: float32 for float16, else it.

    A rotation adds up to 128 inputs in one place and smoothing stretches them, which may leave float16's range, where the product
    with the weight would be back in it.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def apply(t: Transform, x: Tensor) -> Tensor:
    """Return `x T` for x `[..., k]` of any float dtype, in `kept_in` that dtype; the arithmetic is float32 or wider.

    Wide copies are of some tokens at a time (row_chunks.py). The bits are those of all at once; in float64, on some processors,
    all but the last.
    """
    if t.identity:
        return x.to(kept_in(x.dtype))
    return in_row_chunks(lambda rows: (_apply(t, rows),), x)[0]


def _apply(t: Transform, x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if t.premultiplier is not None:
        wide = wide * t.premultiplier.to(wide.dtype)
    return _rotate(t, wide).to(kept_in(x.dtype))


def apply_to_weight(t: Transform, weight: Tensor) -> Tensor:
    """Return the weight `[out, k]` that goes with transformed inputs, `W T^-T`: `(x T)(W T^-T)^T = x W^T`."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if t.premultiplier is not None:
        wide = wide / t.premultiplier.to(wide.dtype)
    return _rotate(t, wide).to(weight.dtype)


def weight_back(t: Transform, transformed: Tensor) -> Tensor:
    """Return the weight `[out, k]` that `apply_to_weight` made `transformed` of."""
    wide = _rotate_back(t, transformed.to(torch.promote_types(transformed.dtype, torch.float32)))
    if t.premultiplier is not None:
        wide = wide * t.premultiplier.to(wide.dtype)
    return wide.to(transformed.dtype)


def gram(t: Transform, G: Tensor) -> Tensor:
    """Return `T^T G T`: from the Gram matrix `[k, k]` of inputs x that of `apply(t, x)`.

    The columns of `G T` are replaced by those of `T^T G T`, which are its rows as well, so that no third matrix is needed.
    """
    if t.identity:
        return G
    product = torch.empty_like(G)
    for rows, given in zip(product.split(GRAM_ROWS), G.split(GRAM_ROWS), strict=True):
        rows.copy_(apply(t, given))
    for columns in product.split(GRAM_ROWS, dim=1):
        columns.copy_(apply(t, columns.T.contiguous()).T)
    return product


def tensors(t: Transform) -> dict[str, Tensor]:
    """Return the tensors that t is stored as by attribute name: those that are not None, nor made of others."""
    names = [name for name in NAMES if not t.steps or name not in DENSE]
    return {name: tensor for name in names if (tensor := getattr(t, name)) is not None}


def from_tensors(kind: str, block: int, named: Mapping[str, Tensor]) -> Transform:
    """Return the Transform of tensors that agree with `fields(kind, ..., block, ...)`; `block` is t.rotation_block.

    Of `named`, a layer's tensors, those of other names are left alone. Rotations are made of their steps if they are not there.
    """
    found = {name: tensor for name in NAMES if (tensor := named.get(name)) is not None}
    for number, (steps, rotation) in enumerate(zip(STEPS, DENSE, strict=True)):
        if steps in found and rotation not in found:
            found[rotation] = product(found[steps], block, number * MAX_STEPS)
    return Transform(block=block if kind == "hadamard" else 1, **found)


def product(steps: Tensor, block: int, first: int) -> Tensor:
    """Return the rotation `[n, block, block]` float32 of greedy steps, on their device, the same bits on every machine.

    Args:
        steps: uint8 `[steps, n]`, the channel that a step spreads over its block (`hadamard.spread`); NO_STEP: there is no such
            step.
        block: size of the blocks.
        first: number of the first step, which decides on signs.
    """
    if steps.device.type == "meta":
        return torch.empty(steps.shape[1], block, block, dtype=torch.float32, device="meta")
    made = torch.eye(block, dtype=torch.float64).repeat(steps.shape[1], 1, 1)  # the transposed rotation
    for number, channel in enumerate(steps.cpu().long()):
        taken = channel != NO_STEP
        made[taken] = hadamard.spread(made[taken], channel[taken], first + number)
    return made.mT.contiguous().float().to(steps.device)


def fields(kind: str, width: int, block: int = 1, smoothed: bool = False, steps: int = 0) -> dict[str, Field]:
    """Return name, dtype and shape of every tensor of a transform, t.kind, t.rotation_block, t.smoothed and t.steps as given.

    Raises:
        ValueError: unknown kind, a width below 1, a block that is no power of two dividing the width (1 for `none` alone), or
            steps that are too many or of a rotation that has none.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown rotation {kind!r}; known: {', '.join(KINDS)}")
    if width < 1:
        raise ValueError(f"a transform needs a positive width, got {width}")
    if block < 1 or block & (block - 1) or width % block or (block == 1) != (kind == "none"):
        raise ValueError(f"rotation {kind!r} of width {width} cannot have blocks of {block}")
    if not 0 <= steps <= (MAX_STEPS if kind == "outlier" else 0) or (steps and block > hadamard.LARGEST_BLOCK):
        raise ValueError(f"rotation {kind!r} of blocks of {block} cannot have {steps} steps")
    expected = {}
    if smoothed or kind == "hadamard":
        expected["premultiplier"] = Field(torch.float32 if smoothed else torch.int8, (width,))
    if kind == "outlier":
        count = width // block
        stored = Field(torch.uint8, (steps, count)) if steps else Field(torch.float32, (count, block, block))
        expected |= dict.fromkeys(STEPS if steps else DENSE, stored)
        expected["permutation"] = Field(torch.int32, (width,))
    return expected


def check_steps(block: int, named: Mapping[str, Tensor]) -> str | None:
    """Return what is wrong with the greedy steps among a layer's tensors, or None; to be asked before they are multiplied."""
    for name in STEPS:
        if name in named and not bool(((named[name] < block) | (named[name] == NO_STEP)).all()):
            return f"{name} names channels beyond the {block} of a block"
    return None


def check_values(t: Transform) -> str | None:
    """Return what is wrong with the values of a transform whose tensors have the right dtypes and shapes, or None."""
    if t.premultiplier is not None:
        if not t.smoothed and not bool((t.premultiplier.abs() == 1).all()):
            return "premultiplier has signs other than +1 and -1"
        usable = torch.isfinite(t.premultiplier.float()) & torch.isfinite(1 / t.premultiplier.float())
        if not bool(usable.all()):
            return "premultiplier has entries that are zero or not finite"
    if t.permutation is not None and not torch.equal(
        t.permutation.sort().values, torch.arange(len(t.permutation), dtype=torch.int32, device=t.permutation.device)
    ):
        return "permutation does not name each channel once"
    for name in DENSE:
        rotation = getattr(t, name)
        if rotation is None or t.steps:
            continue
        one = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
        excess = (rotation.mT @ rotation - one).abs().max()
        if not bool(excess <= ORTHONORMAL_TOLERANCE):  # NaN is not
            return f"{name} is not orthonormal: its Gram matrix is off by {float(excess):.2g}"
    return None


def _rotate(t: Transform, x: Tensor) -> Tensor:
    """Return `x R` in x's dtype."""
    if t.rotation1 is not None:
        assert t.permutation is not None and t.rotation2 is not None
        x = block_product(x, t.rotation1).index_select(-1, t.permutation)
        return block_product(x, t.rotation2)
    if t.block > 1:
        return (x.unflatten(-1, (-1, t.block)) @ hadamard.hadamard(t.block, x.dtype, str(x.device))).flatten(-2)
    return x


def _rotate_back(t: Transform, x: Tensor) -> Tensor:
    """Return `x R^T` in x's dtype."""
    if t.rotation1 is not None:
        assert t.permutation is not None and t.rotation2 is not None
        x = block_product(x, t.rotation2.mT).index_select(-1, t.permutation.argsort())
        return block_product(x, t.rotation1.mT)
    return _rotate(t, x)  # a Sylvester Hadamard matrix is symmetric


def block_product(x: Tensor, blocks: Tensor) -> Tensor:
    """Return x `[..., n b]` times the block-diagonal matrix of `blocks` `[n, b, b]`."""
    x = x.unflatten(-1, blocks.shape[:2])
    return torch.einsum("...nb,nbc->...nc", x, blocks.to(x.dtype)).flatten(-2)
