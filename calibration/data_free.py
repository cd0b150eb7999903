"""One linear quantized from its weight alone: smooth, rotate with random signs, round to nearest. Nothing is known of its inputs.

Channels that are large in the inputs tend to be small in the weight, so the weight says how to smooth: most of what would even
out its columns.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from quantdit.calibration import rotate, smooth
from quantdit.calibration.layer import Quantized, histogram
from quantdit.calibration.quantize import quantize_as_planned, quantize_weight
from quantdit.formats import FORMATS, QSpec
from quantdit.recipes.rules import LayerPlan
from quantdit.system.threads import one_thread
from quantdit.tensors import transform
from quantdit.tensors.layer_spec import LayerSpec
from quantdit.tensors.qtensor import spec_fields
from quantdit.tensors.timesteps import LEAST_BUCKETS

TABLE_ROWS = 4096  # of a table that are in float32 at a time; fewer take longer
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


@one_thread()
def quantize_table(parts: Iterable[Tensor], rows: int, width: int, format: str, group_size: int) -> Quantized:
    """Return a table of embeddings quantized to nearest, part by part; no more than one part in float32 is beside the codes.

    Args:
        parts: the table `[rows, width]` float in parts of consecutive rows, such as TABLE_ROWS each.
        rows: number of embeddings.
        width: of an embedding.
        format: a name of FORMATS whose rows know nothing of each other: int2 to int8, or fp8_e4m3.
        group_size: for grouped formats; divides the width.

    Raises:
        ValueError: a format of another kind, parts of other sizes, or NaN or infinite entries.
    """
    if not FORMATS[format].by_row:
        raise ValueError(f"{format} has a codebook of all rows, and a table is quantized row by row; use int4 or int8")
    spec = LayerSpec(QSpec(format, rows, width, group_size))
    made = {name: torch.empty(field.shape, dtype=field.dtype) for name, field in spec_fields(spec.weight).items()}
    known, start, lost, size, shown = torch.ones(width, dtype=torch.float32).diag(), 0, 0.0, 0.0, {}
    for part in parts:
        q = quantize_weight(part, known, format, group_size, "rtn")
        shown = shown or histogram(part.float(), q.scale)  # of the first part
        if start + len(part) > rows:
            break
        for name, tensor in q.tensors().items():
            made[name][start : start + len(part)] = tensor
        lost += float((q.dequantize() - part).square().sum())
        size += float(part.float().square().sum())
        start += len(part)
    if start != rows:
        raise ValueError(f"the parts of a table of {rows} rows have another number of them; read the table again")
    report = {
        "spec": spec.to_dict(),
        "method": "rtn",
        "weight_rel_rmse": (lost / max(size, 1e-60)) ** 0.5,
        "weight_histogram": shown,
    }
    return Quantized(spec, made, None, report)


def unit_seed(seed: int, number: int) -> int:
    """Return the seed of the linears in the block of this number; those outside of blocks have the number after the last."""
    return seed * 1009 + number
