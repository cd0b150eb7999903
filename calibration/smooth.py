"""Smoothing: per-channel factors that move difficulty from activations to weights, `X' = X / s`, `W' = W s`.

SmoothQuant (Xiao et al. 2022, arXiv 2211.10438, Eq. 4); the strength alpha is searched on the layer's output error as SVDQuant
does (Li et al. 2024, arXiv 2411.05007). Salience over timesteps: PTQ4DiT (Wu et al. 2024, arXiv 2405.16005), "Spearman's
rho-guided salience calibration".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantdit.tensors import transform
from quantdit.tensors.transform import Transform

ALPHAS = tuple(i / 10 for i in range(11))
USUAL_ALPHA, NARROW_ALPHA = 0.25, 0.4
NARROW_BITS = 4
REACH = 1e3  # a factor is at most this much above or below their geometric mean


@dataclass(frozen=True)
class SmoothingChoice:
    """The strength chosen, None for no smoothing; its factor `[k]` or None; its transform; the error of each strength."""

    alpha: float | None
    factor: Tensor | None
    transform: Transform
    errors: dict[float | None, float]


def salience(absmax: Tensor, weight: Tensor) -> Tensor:
    """Return PTQ4DiT's timestep-aware activation salience `[k]`, to be used in place of `max |X_j|`.

    `sum_t eta_t max|X_j^(t)|`, `eta = softmax_t(-rho(max|X^(t)|, max|W|))`, rho Spearman's rank correlation: a timestep counts
    the more, the less its large channels are those of the weight.

    Args:
        absmax: largest input magnitude per timestep bucket and channel, `[buckets, k]` (Stats.absmax). Buckets of zeros, which
            saw nothing, are left out.
        weight: `[out, k]`.

    Raises:
        ValueError: NaN or infinite entries.
    """
    from scipy.stats import rankdata

    _check_finite(absmax, "activation magnitudes")
    seen = absmax[absmax.amax(dim=1) > 0].float()
    if len(seen) == 0:
        return absmax.new_zeros(absmax.shape[1], dtype=torch.float32)
    magnitudes = torch.cat([seen, weight.abs().amax(dim=0, keepdim=True).float()])
    ranks = torch.from_numpy(rankdata(magnitudes.numpy(force=True), axis=1)).to(seen.device)  # ties share their mean, float64
    ranks = ranks - ranks.mean(dim=1, keepdim=True)
    unit = ranks / ranks.norm(dim=1, keepdim=True).clamp_min(1e-30)  # no correlation with what is constant
    eta = torch.softmax(-(unit[:-1] @ unit[-1]), dim=0).float()
    return eta @ seen


def channel_rms(gram: Tensor, count: int) -> Tensor:
    """Return the root mean square `[k]` of each input channel, from the Gram matrix `[k, k]` of `count` inputs."""
    return (gram.diagonal().float() / max(1, count)).clamp_min(0).sqrt()


def smoothing_factor(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Return `s_j = x_j^alpha / w_j^(1 - alpha)` `[k]` float32, of geometric mean 1 (SmoothQuant Eq. 4).

    Channels that are dead or whose weights are all zero get 1.

    Args:
        activation: x `[k]`, not negative: largest magnitude of each input channel, `salience` or `channel_rms`.
        weight: `[out, k]`; w_j is the largest magnitude of column j.
        alpha: 0 evens out the weight's columns, 1 the activations.

    Raises:
        ValueError: NaN or infinite entries, negative magnitudes, or alpha outside 0..1.
    """
    _check_finite(activation, "activation magnitudes")
    _check_finite(weight, "weights")
    if not 0 <= alpha <= 1:
        raise ValueError(f"smoothing needs alpha in 0..1, got {alpha}")
    x, w = activation.double(), weight.abs().amax(dim=0).double()
    if bool((x < 0).any()):
        raise ValueError("activation magnitudes must not be negative")
    live = (x > 0) & (w > 0)
    if not bool(live.any()):
        return torch.ones(len(x), dtype=torch.float32)
    # Logarithms: neither power can overflow, and the geometric mean is a mean.
    log = alpha * x.where(live, torch.ones_like(x)).log() - (1 - alpha) * w.where(live, torch.ones_like(w)).log()
    log = (log - log[live].mean()).clamp(-math.log(REACH), math.log(REACH))
    return log.exp().where(live, torch.ones_like(log)).float()


def usual_alpha(activation_bits: int) -> float:
    """Return the strength of `balanced` for activations of this width: USUAL_ALPHA, or NARROW_ALPHA up to 4 bits.

    Measured on tame layers and on layers with planted outliers. One half would make `|X'| |W'|` least (Cauchy and Schwarz) and so
    the error of rounded inputs; error feedback leaves an error that grows with `|W'|` alone and wants less.
    """
    return NARROW_ALPHA if activation_bits <= NARROW_BITS else USUAL_ALPHA


def balanced(rms: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Return `s_j = rms_j^alpha / |V_:j|^(1 - alpha)` `[k]` float32: `smoothing_factor` with root mean squares for maxima.

    V are the rows of W at length 1: each has its own scale, so a few long rows must not decide for all.

    Args:
        rms: of each input channel, `[k]`.
        weight: `[out, k]`, of all the layers that share the input, one below the other.
        alpha: 0 evens out the weight's columns, 1 the activations.

    Raises:
        ValueError: NaN or infinite entries.
    """
    weight = weight.float()
    rows = weight / weight.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return smoothing_factor(rms, rows.norm(dim=0, keepdim=True), alpha)


def choose(
    activation: Tensor,
    weight: Tensor,
    error: Callable[[Transform], float],
    base: Transform | None = None,
    alphas: tuple[float, ...] = ALPHAS,
) -> SmoothingChoice:
    """Return the smoothing of least output error; no smoothing is always among the candidates and wins ties.

    Args:
        activation: see `smoothing_factor`.
        weight: `[out, k]`, unsmoothed and unrotated.
        error: the output error of the layer quantized with a transform.
        base: the rotation that follows the smoothing; None for none.
        alphas: strengths to try.

    Raises:
        ValueError: see `smoothing_factor`; or no candidate has a finite error.
    """
    factors: dict[float | None, Tensor | None] = {None: None}
    factors |= {alpha: smoothing_factor(activation, weight, alpha) for alpha in alphas}
    transforms = {alpha: transform.smooth(base or Transform(), factor) for alpha, factor in factors.items()}
    errors = {alpha: error(t) for alpha, t in transforms.items()}
    finite = {alpha: e for alpha, e in errors.items() if e < float("inf")}  # NaN is not
    if not finite:
        raise ValueError(f"no strength of smoothing gives a finite output error: {errors}")
    best = min(finite, key=finite.__getitem__)
    return SmoothingChoice(best, factors[best], transforms[best], errors)


def _check_finite(values: Tensor, what: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"smoothing: {int((~torch.isfinite(values)).sum())} {what} are NaN or infinite")
