"""One linear, from Stats and plan to the tensors of a quantized layer: smooth, rotate, low rank, quantize, mend the bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import quantdit.kernels.ops  # noqa: F401 - defines torch.ops.quantdit
from quantdit import files, transform
from quantdit.calibration import rotate, smooth
from quantdit.calibration.lowrank import LowRank, low_rank
from quantdit.calibration.quantize import energy, quantize_weight
from quantdit.calibration.stats import Stats
from quantdit.layer_spec import ActivationSpec, LayerSpec
from quantdit.qtensor import QTensor
from quantdit.recipe import LayerPlan
from quantdit.threads import one_thread
from quantdit.transform import Transform

HISTOGRAM_BINS = 97
ALPHAS = (0.2, 0.35, 0.5, 0.65, 0.8)
STATIC_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)


@dataclass(frozen=True)
class Quantized:
    """A linear after quantization: its specification, its tensors by name, its bias `[out]` or None, its report (JSON)."""

    spec: LayerSpec
    tensors: dict[str, Tensor]
    bias: Tensor | None
    report: dict


@one_thread()
def quantize_layer(weight: Tensor, bias: Tensor | None, stats: Stats, plan: LayerPlan, seed: int) -> Quantized:
    """Return one linear quantized as its plan says; the bytes do not depend on the number of threads.

    Args:
        weight: `[out, in]` float.
        bias: `[out]` float or None.
        stats: what calibration saw at its input.
        plan: the rule that matched it, made concrete.
        seed: of random signs, greedy rotations and k-means.

    Raises:
        ValueError: NaN or infinite weights or inputs.
    """
    rule = plan.rule
    weight = weight.detach().float()
    centred = rule.bias_correction and bias is not None
    gram = stats.centred_gram if centred else stats.gram
    buckets = stats.absmax.shape[0]
    activation = rule.activation(plan.activation_group_size, buckets)

    def quantize(W: Tensor, G: Tensor) -> QTensor:
        return quantize_weight(
            W,
            G,
            rule.weight,
            plan.group_size,
            rule.method,
            rule.table,
            seed,
            act_order=rule.act_order,
            descent=rule.descent,
            table_rows=rule.table_rows,
        )

    # Rotations are fitted to every other sampled row and compared on the rest.
    fitted, held = stats.rows[::2], stats.rows[1::2]
    held_buckets = stats.row_buckets[1::2]

    def error(t: Transform) -> float:
        dense = quantize(transform.apply_to_weight(t, weight), transform.gram(t, gram)).dequantize()
        x = transform.apply(t, held)
        seen = quantized_inputs(x, activation, static_scales(x, held_buckets, activation), held_buckets)
        difference = seen @ dense.T - held @ weight.T
        if centred:
            difference = difference - (dense - transform.apply_to_weight(t, weight)) @ transform.apply(t, stats.mean)
        return float(difference.norm() / (held @ weight.T).norm().clamp_min(1e-30))

    t, choices = _choose_transform(weight, stats, plan, fitted, error, seed)
    W, G = transform.apply_to_weight(t, weight), transform.gram(t, gram)
    gram = G  # the other, as large, is not needed any more
    rows = transform.apply(t, stats.rows)
    scales = static_scales(rows, stats.row_buckets, activation)
    branch = _low_rank(W, G, rows, scales, stats, activation, rule.low_rank, lambda w: quantize(w, G).dequantize(), seed)
    product = branch.product if branch is not None else torch.zeros((), dtype=torch.float32)
    q = quantize(W - product, G)
    delta = (q.dequantize() + product).sub_(W)
    tensors = q.tensors() | transform.tensors(t)
    if scales is not None:
        tensors["static_scale"] = scales
    if branch is not None:
        tensors |= {"up": branch.up, "down": branch.down}
    spec = LayerSpec(q.spec, activation, t.kind, t.rotation_block, t.smoothed, branch.up.shape[1] if branch is not None else 0)
    mended = bias
    if bias is not None and centred:
        mended = as_stored((bias.detach().float() - delta @ transform.apply(t, stats.mean)), bias)
    report = {
        "spec": spec.to_dict(),
        "method": rule.method,
        "rms": stats.rms,
        "weight_only_rel_rmse": relative_error(delta, G, weight, stats.gram),
        **choices,
        "low_rank": _describe(branch),
        "activation_absmax": [round(float(v), 5) for v in stats.absmax.amax(dim=1)],
        "weight_histogram": histogram(W - product, q.scale),
    }
    return Quantized(spec, {name: tensor.contiguous() for name, tensor in tensors.items()}, mended, report)


def quantized_inputs(x: Tensor, activation: ActivationSpec, scales: Tensor | None, buckets: Tensor) -> Tensor:
    """Return transformed inputs x `[r, k]` as a layer sees them after quantization, float32.

    `scales` `[buckets]` of static activations, and the bucket of each row, `[r]`.
    """
    if activation.edge_bits:
        at_edge = (buckets == 0) | (buckets == activation.last_bucket)
        seen = torch.empty_like(x)
        for rows, how in ((at_edge, activation.edge), (~at_edge, activation.between)):
            seen[rows] = quantized_inputs(x[rows], how, scales, buckets[rows])
        return seen
    if activation.bits == 16:
        return x
    if activation.format == "fp8":
        codes, scale = torch.ops.quantdit.quantize_tokens_fp8(x)
        return codes.float() * scale[:, None]
    affine = activation.format == "affine"
    if scales is None:
        codes, scale = torch.ops.quantdit.quantize_tokens(x, activation.bits, activation.group_size, affine)
        return codes.float() * scale[:, None]
    seen = torch.empty_like(x)
    for bucket in buckets.unique().tolist():
        of_bucket, static = buckets == bucket, scales[bucket : bucket + 1]
        codes, scale = torch.ops.quantdit.quantize_tokens(x[of_bucket], activation.bits, activation.group_size, affine, static)
        seen[of_bucket] = codes.float() * scale[:, None]
    return seen


def static_scales(x: Tensor, buckets: Tensor, activation: ActivationSpec) -> Tensor | None:
    """Return one scale per timestep bucket `[buckets]` float32 for transformed rows x `[r, k]`; None if scales are dynamic.

    The clip of least squared error among STATIC_CLIPS of the largest magnitude. A bucket that saw nothing takes the scale of the
    nearest that did (the noisier one first).
    """
    if not activation.buckets:
        return None
    # Groups divide the token's int8 grid further, so that their static scale is the grid's.
    top = 127 if activation.group_size else 2 ** (activation.bits - 1) - 1
    seen = buckets.unique().tolist()
    scales = torch.zeros(activation.buckets, dtype=torch.float32)
    for bucket in seen:
        rows = x[buckets == bucket]
        peak = rows.abs().max().clamp_min(1e-30) / top
        clipped = [(rows - (rows / (peak * c)).round().clamp(-top, top) * peak * c).square().sum() for c in STATIC_CLIPS]
        scales[bucket] = peak * STATIC_CLIPS[int(torch.stack(clipped).argmin())]
    for bucket in set(range(activation.buckets)) - set(seen):
        nearest = min(seen, key=lambda b: (abs(b - bucket), b), default=None)
        scales[bucket] = 1.0 if nearest is None else scales[nearest]
    return scales


def as_stored(value: Tensor, like: Tensor) -> Tensor:
    """Return `value` rounded to the narrowest dtype that holds `like` exactly, in the dtype of `like`.

    A bias that was stored in 16 bits stays a bias that can be: the checkpoint writes floats as narrow as is lossless.
    """
    return value.to(files.narrowest(like).dtype).to(like.dtype)


def _choose_transform(
    weight: Tensor, stats: Stats, plan: LayerPlan, fitted: Tensor, error: Callable[[Transform], float], seed: int
) -> tuple[Transform, dict]:
    """Return the smoothing and rotation of the layer, and what the report says about the choice."""
    rule = plan.rule
    factor, report = None, {}
    if rule.smooth != "none":
        activation = {
            "rms": lambda: smooth.channel_rms(stats.gram, stats.count),
            "absmax": lambda: stats.absmax.amax(dim=0),
            "salience": lambda: smooth.salience(stats.absmax, weight),
        }[rule.smooth]()
        base = "hadamard" if rule.rotation in ("ars", "auto") else rule.rotation
        chosen = smooth.choose(activation, weight, error, rotate.build(base, fitted, seed), ALPHAS)
        factor = chosen.factor
        report["smoothing"] = {"alpha": chosen.alpha, "errors": {str(a): _six(e) for a, e in chosen.errors.items()}}
    choice = rotate.choose(rule.rotation, fitted, stats.rms, error, seed, factor, rule.ars_threshold)
    report["rotation"] = {
        "asked": rule.rotation,
        "chosen": choice.transform.kind,
        "errors": {kind: _six(e) for kind, e in choice.errors.items()},
    }
    return choice.transform, report


def relative_error(delta: Tensor, gram: Tensor, weight: Tensor, whole_gram: Tensor) -> float:
    """Return rel_rmse of the output: of `delta` under `gram`, which may be centred and rotated, relative to all of `weight`'s."""
    power = energy(weight, whole_gram)
    return (energy(delta, gram) / power) ** 0.5 if power > 0 else 0.0


def _low_rank(
    W: Tensor,
    G: Tensor,
    rows: Tensor,
    scales: Tensor | None,
    stats: Stats,
    activation: ActivationSpec,
    rank: int,
    quantize: Callable[[Tensor], Tensor],
    seed: int,
) -> LowRank | None:
    rank = min(rank, *W.shape)
    if not rank:
        return None
    noise = (quantized_inputs(rows, activation, scales, stats.row_buckets) - rows).square().sum(dtype=torch.float64)
    noise = float(noise) * stats.count / max(1, len(rows)) / W.shape[1]
    return low_rank(W, G, rank, quantize, noise, seed=seed)


def _describe(branch: LowRank | None) -> dict | None:
    if branch is None:
        return None
    plain = {f: v for f, v in vars(branch).items() if not isinstance(v, Tensor)}
    return {"rank": branch.up.shape[1]} | {f: _six(v) if isinstance(v, float) else v for f, v in plain.items()}


def histogram(weight: Tensor, scale: Tensor) -> dict:
    """Return what the report keeps of a weight `[out, in]` in units of its channels' scales `[out]`: a histogram's counts."""
    normal = weight / torch.where(scale > 0, scale, torch.ones_like(scale))[:, None]
    reach = float(normal.abs().max())
    return {"reach": reach, "counts": torch.histc(normal, HISTOGRAM_BINS, -reach, reach).long().tolist()}


def _six(value: float) -> float:
    return float(f"{value:.6g}")
