"""Errors of outputs in parts of the outputs themselves: rel_rmse, `|error| / |expected|`.

Squared errors and squared outputs (the power) are summed first, over rows, calls or layers, and divided at the end by `relative`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantdit.system.threads import one_thread

ENERGY_BLOCK = 1024


def relative(error: float, power: float) -> float:
    """Return rel_rmse, `sqrt(error / power)`, of a sum of squared errors; 0 where the power is."""
    return (error / power) ** 0.5 if power != 0 else 0.0


@one_thread()
def squared(x: Tensor) -> float:
    """Return `|x|^2`, summed in the dtype that x has."""
    return float(x.square().sum())


def squares(got: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return `|got - expected|^2` and `|expected|^2`, summed in the dtype that the tensors have."""
    return squared(got - expected), squared(expected)


def energy(weight: Tensor, gram: Tensor) -> float:
    """Return `tr(W G W^T)`, not negative: the squared norm of the outputs of weight W `[out, in]`.

    G `[in, in]`, the Gram matrix of the inputs, is symmetric, so blocks of columns p, q < p count twice and half of the product
    is enough. It is computed in the weight's dtype and summed in float64.
    """
    gram, total = gram.to(weight.dtype), 0.0
    for start in range(0, len(gram), ENERGY_BLOCK):
        part = slice(start, start + ENERGY_BLOCK)
        projected = weight[:, part] @ gram[part, part]
        projected.addmm_(weight[:, :start], gram[:start, part], alpha=2)
        total += float(projected.mul_(weight[:, part]).sum(dtype=torch.float64))
    return max(0.0, total)  # rounding can leave a tiny negative one of a layer that is reproduced exactly


def output_error(delta: Tensor, weight: Tensor, gram: Tensor, delta_gram: Tensor | None = None) -> float:
    """Return rel_rmse of a layer's output, `sqrt(tr(D G' D^T) / tr(W G W^T))`.

    Args:
        delta: the weight error D `[out, in]`.
        weight: W `[out, in]`.
        gram: G `[in, in]` of the inputs.
        delta_gram: G' `[in, in]` of the inputs as D meets them, centred and transformed; G if None.
    """
    return relative(energy(delta, gram if delta_gram is None else delta_gram), energy(weight, gram))
