"""Low-rank branch: `Y = X down^T up^T + Q(X) Q(W - up down)^T`, the two thin factors kept in bfloat16.

SVDQuant (Li et al. 2024, arXiv 2411.05007, section 4): alternate the branch and the quantized rest, keep the best output error.
Output-aware truncation as in LQER and CALDERA: the singular vectors are taken in the inputs' Gram matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantdit.calibration.errors import energy, relative

OVERSAMPLING = 16
POWER_STEPS = 16
MIN_GAIN = 0.01  # a refit quantizes the whole weight again; error feedback leaves refits next to nothing
EXACT_SIZE = 512  # up to this many outputs an eigendecomposition takes no longer than subspace iteration


@dataclass(frozen=True)
class LowRank:
    """A branch: `up` `[out, r]` and `down` `[r, in]`, bfloat16.

    Attributes:
        up: second factor.
        down: first factor, applied to the same (transformed, unquantized) inputs that the quantized rest gets.
        error: rel_rmse of the layer's output with the branch.
        error_without: the same without a branch.
        start: what the branch began as, `weight`, `weight-gram` or `residual`.
        rounds: how many times the branch was fitted.
    """

    up: Tensor
    down: Tensor
    error: float
    error_without: float
    start: str
    rounds: int

    @property
    def product(self) -> Tensor:
        """Return `up down` `[out, in]` float32: what to subtract from the weight before it is quantized."""
        return self.up.float() @ self.down.float()


def truncate(E: Tensor, rank: int, gram: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return bfloat16 `up` `[out, r]`, `down` `[r, in]` whose product is nearest to E `[out, in]`.

    Nearest in `tr((E - L) G (E - L)^T)`, plain least squares without a Gram matrix G. For any G = S S^T the best L S is the
    truncated SVD of E S, so `L = U_r U_r^T E` with U_r the leading eigenvectors of `E G E^T`: no root nor inverse of G is needed,
    and G may be singular.

    Raises:
        ValueError: a rank below 1 or above either side of E, or NaN or infinite entries.
    """
    if not 1 <= rank <= min(E.shape):
        raise ValueError(f"a low-rank branch of a weight {tuple(E.shape)} needs a rank in 1..{min(E.shape)}, got {rank}")
    if not bool(torch.isfinite(E).all()):
        raise ValueError(f"low-rank branch: {int((~torch.isfinite(E)).sum())} values are NaN or infinite")
    E = E.float()
    if E.shape[0] <= EXACT_SIZE:
        half = E if gram is None else E @ gram.float()
        product = half.double() @ E.double().T
        U = torch.linalg.eigh((product + product.T) / 2).eigenvectors[:, -rank:].flip(1).float()
    else:
        U = _leading(E, rank, gram, seed)
    up = U.to(torch.bfloat16)
    # Least squares for the rounded up, as U^T U is 1 only before rounding. Not by lstsq: its float32 result depends on where in
    # memory its operands happen to lie.
    wide = up.double()
    down = torch.linalg.solve(wide.T @ wide, wide.T @ E.double())
    return up, down.to(torch.bfloat16)


def _leading(E: Tensor, rank: int, gram: Tensor | None, seed: int) -> Tensor:
    """Return nearly the leading eigenvectors `[out, rank]` of `E G E^T`, by subspace iteration (Halko et al. 2011)."""
    size = min(rank + OVERSAMPLING, *E.shape)
    start = torch.randn(E.shape[1], size, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    Q = torch.linalg.qr(E @ (start if gram is None else gram.float() @ start)).Q
    for _ in range(POWER_STEPS):
        back = E.T @ Q
        Q = torch.linalg.qr(E @ (back if gram is None else gram.float() @ back)).Q
    back = E.T @ Q
    small = back.T @ (back if gram is None else gram.float() @ back)
    return Q @ torch.linalg.eigh((small + small.T).double() / 2).eigenvectors[:, -rank:].flip(1).float()


def low_rank(
    weight: Tensor,
    gram: Tensor,
    rank: int,
    quantize: Callable[[Tensor], Tensor],
    noise: float = 0.0,
    rounds: int = 8,
    seed: int = 0,
) -> LowRank | None:
    """Return the branch of least output error, or None if quantizing the whole weight is no worse.

    Three starts: the weight's own leading directions (SVDQuant), the same as the inputs see them, and those of its quantization
    error (LQER). Each is refitted to `W - Q(W - L)` until the error falls by less than MIN_GAIN. Errors are those of the factors
    as stored.

    Args:
        weight: W `[out, in]`, in the space the inputs are in (smoothed, rotated).
        gram: G `[in, in]`, `sum x x^T` of those inputs.
        rank: at most either side of W.
        quantize: weight `[out, in]` -> what it is after quantization, dequantized.
        noise: `sum |n|^2 / in` over the same inputs, n their own quantization error; it adds `noise |Q|^2` to the squared output
            error of the quantized rest Q. The branch sees inputs before quantization, so it lowers this share by making Q
            smaller. Taken as white: a rotation leaves it nearly so. 0 if inputs stay 16 bit.
        rounds: refits per start, at most.
        seed: of the subspace iteration of wide weights.

    Raises:
        ValueError: see `truncate`.
    """
    W, G = weight.detach().float(), gram.float()
    power = energy(W, G)

    def error(product: Tensor, rest: Tensor) -> float:
        squared = energy(product + rest - W, G) + noise * float(rest.square().sum(dtype=torch.float64))
        return relative(squared, power)

    whole = quantize(W)
    without = error(torch.zeros_like(W), whole)
    best = None
    # What the branch is nearest to first, and in which metric.
    starts = {"residual": (W - whole, G), "weight": (W, None), "weight-gram": (W, G)}
    for start, (target, metric) in starts.items():
        last = float("inf")
        for fitted in range(1, rounds + 1):
            up, down = truncate(target, rank, metric, seed)
            product = up.float() @ down.float()
            rest = quantize(W - product)
            now = error(product, rest)
            if now < (without if best is None else best.error):
                best = LowRank(up, down, now, without, start, fitted)
            if not now < (1 - MIN_GAIN) * last:
                break
            last, target, metric = now, W - rest, G
    return best
