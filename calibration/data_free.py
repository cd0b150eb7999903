"""One linear quantized from its weight alone: smooth, rotate with random signs, round to nearest. Nothing is known of its inputs.

Channels that are large in the inputs tend to be small in the weight, so the weight says how to smooth: most of what would even
out its columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantdit.calibration import rotate, smooth
from quantdit.calibration.layer import Quantized, histogram
from quantdit.calibration.quantize import quantize_as_planned
from quantdit.recipes.rules import LayerPlan
from quantdit.system.threads import one_thread
from quantdit.tensors import transform
from quantdit.tensors.layer_spec import LayerSpec
from quantdit.tensors.timesteps import LEAST_BUCKETS

PART = 0.7  # of what evens out the columns; measured on tame and planted models


@one_thread()
def quantize_without_data(
    weight: Tensor, bias: Tensor | None, plan: LayerPlan, seed: int, buckets: int = LEAST_BUCKETS
) -> Quantized:
    """Return one linear quantized as its plan says, which `recipe.without_data` has made one that needs no inputs.

    Args:
        weight: `[out, in]` float.
        bias: `[out]` float or None; stays as it is.
        plan: the rule that matched it, made concrete.
        seed: of random signs and k-means.
        buckets: parts of a trajectory, the first and the last of which may have activations of their own.

    Raises:
        ValueError: NaN or infinite weights.
    """
    rule, width = plan.rule, weight.shape[1]
    factor = None if rule.smooth == "none" else smooth.balanced(torch.ones(width, dtype=torch.float32), weight, 1 - PART)
    rotation = "hadamard" if rule.rotation == "auto" else rule.rotation
    t = rotate.build(rotation, torch.zeros(0, width, dtype=torch.float32), seed, factor)
    W = transform.apply_to_weight(t, weight.detach().float())
    known = torch.ones(width, dtype=torch.float32).diag()
    q = quantize_as_planned(W, known, plan, seed)
    activation = rule.activation(plan.activation_group_size, buckets)
    spec = LayerSpec(q.spec, activation, t.kind, t.rotation_block, t.smoothed, steps=t.steps)
    tensors = q.tensors() | transform.tensors(t)
    report = {
        "spec": spec.to_dict(),
        "method": rule.method,
        "weight_rel_rmse": float((q.dequantize() - W).norm() / W.norm().clamp_min(1e-30)),
        "weight_histogram": histogram(W, q.scale),
    }
    return Quantized(spec, {name: tensor.contiguous() for name, tensor in tensors.items()}, bias, report)


def unit_seed(seed: int, number: int) -> int:
    """Return the seed of the linears in the block of this number; those outside of blocks have the number after the last."""
    return seed * 1009 + number
