"""Linears of one input, from Stats and plan to tensors of quantized layers: smooth, rotate, low rank, quantize, mend biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantdit.calibration.activations import quantized_inputs, relative_noise, static_scales
from quantdit.calibration.choice import choose
from quantdit.calibration.lowrank import LowRank, low_rank
from quantdit.calibration.quantize import energy, quantize_weight
from quantdit.calibration.stats import Stats
from quantdit.recipes.rules import LayerPlan
from quantdit.system import files
from quantdit.system.threads import one_thread
from quantdit.tensors import transform
from quantdit.tensors.layer_spec import ActivationSpec, LayerSpec
from quantdit.tensors.qtensor import QTensor
from quantdit.tensors.transform import Transform

HISTOGRAM_BINS = 97


@dataclass(frozen=True)
class Quantized:
    """A linear after quantization: its specification, its tensors by name, its bias `[out]` or None, its report (JSON)."""

    spec: LayerSpec
    tensors: dict[str, Tensor]
    bias: Tensor | None
    report: dict


@dataclass(frozen=True)
class _Coded:
    """A weight in the transformed space `[out, in]`, what it became, and what that leaves of it, the branch included."""

    weight: Tensor
    q: QTensor
    branch: LowRank | None
    delta: Tensor


@dataclass(frozen=True)
class _Attempt:
    """The linears quantized behind one transform; `error` and `noise` as `choice.Measured` has them.

    `gram` `[in, in]` is that of the transformed inputs.
    """

    error: float
    noise: float
    gram: Tensor
    coded: dict[str, _Coded]


def quantize_layer(weight: Tensor, bias: Tensor | None, stats: Stats, plan: LayerPlan, seed: int) -> Quantized:
    """Return one linear quantized as its plan says; see `quantize_layers`."""
    return quantize_layers({"": (weight, bias)}, stats, plan, seed)[""]


@one_thread()
def quantize_layers(
    linears: Mapping[str, tuple[Tensor, Tensor | None]], stats: Stats, plan: LayerPlan, seed: int
) -> dict[str, Quantized]:
    """Return linears that share an input (q, k, v) quantized as their plan says, behind one smoothing and rotation.

    The bytes do not depend on the number of threads.

    Args:
        linears: weight `[out, in]` float and bias `[out]` float or None by name; all have a bias or none has.
        stats: what calibration saw at the input.
        plan: the rule that matched them, made concrete.
        seed: of random signs, greedy rotations and k-means.

    Raises:
        ValueError: NaN or infinite weights or inputs.
    """
    rule = plan.rule
    weights = {name: weight.detach().float() for name, (weight, _) in linears.items()}
    whole = torch.cat(list(weights.values())) if len(weights) > 1 else next(iter(weights.values()))
    centred = rule.bias_correction and all(bias is not None for _, bias in linears.values())
    gram = stats.centred_gram if centred else stats.gram
    activation = rule.activation(plan.activation_group_size, stats.absmax.shape[0])

    # Rotations are fitted to every other sampled row and compared on the rest.
    fitted, held, held_buckets = stats.rows[::2], stats.rows[1::2], stats.row_buckets[1::2]
    wanted = held @ whole.T
    norm = wanted.norm().clamp_min(1e-30)

    def seen(t: Transform) -> tuple[Tensor, Tensor]:
        x = transform.apply(t, held)
        return x, quantized_inputs(x, activation, static_scales(x, held_buckets, activation), held_buckets)

    def attempt(t: Transform) -> _Attempt:
        G = transform.gram(t, gram)
        coded = {name: _coded(transform.apply_to_weight(t, weight), G, plan, seed) for name, weight in weights.items()}
        delta = torch.cat([made.delta for made in coded.values()])
        x, tokens = seen(t)
        difference = (tokens - x) @ transform.apply_to_weight(t, whole).T + tokens @ delta.T
        if centred:
            difference = difference - delta @ transform.apply(t, stats.mean)
        return _Attempt(float(difference.norm() / norm), relative_noise(tokens, x), G, coded)

    def activation_error(t: Transform) -> float:
        x, tokens = seen(t)
        return float(((tokens - x) @ transform.apply_to_weight(t, whole).T).norm() / norm)

    choice = choose(rule, whole, stats, fitted, activation, attempt, activation_error, seed)
    t, G = choice.transform, choice.made.gram
    rows = transform.apply(t, stats.rows)
    scales = static_scales(rows, stats.row_buckets, activation)
    noise = _noise(rows, scales, stats, activation) if rule.low_rank else 0.0
    found = {}
    for name, (weight, bias) in linears.items():
        made = choice.made.coded[name]
        if rule.low_rank:
            made = _with_branch(made, G, plan, noise, seed)
        found[name] = _quantized(weight, bias, made, t, G, scales, stats, plan, choice.report)
    return found


def _coded(W: Tensor, G: Tensor, plan: LayerPlan, seed: int, branch: LowRank | None = None) -> _Coded:
    """Quantize a weight in the transformed space, or what a branch leaves of it."""
    rest = W if branch is None else W - branch.product
    q = _quantize(rest, G, plan, seed)
    return _Coded(W, q, branch, q.dequantize().sub_(rest))


def _quantize(W: Tensor, G: Tensor, plan: LayerPlan, seed: int) -> QTensor:
    rule = plan.rule
    options = {"act_order": rule.act_order, "descent": rule.cd_passes, "table_rows": rule.table_rows}
    return quantize_weight(W, G, rule.weight, plan.group_size, rule.method, rule.table, seed, **options)


def _with_branch(made: _Coded, G: Tensor, plan: LayerPlan, noise: float, seed: int) -> _Coded:
    """Return the weight with a low-rank branch beside it; as it was, if none helps."""
    W, rank = made.weight, min(plan.rule.low_rank, *made.weight.shape)
    branch = low_rank(W, G, rank, lambda w: _quantize(w, G, plan, seed).dequantize(), noise, seed=seed)
    return made if branch is None else _coded(W, G, plan, seed, branch)


def _noise(rows: Tensor, scales: Tensor | None, stats: Stats, activation: ActivationSpec) -> float:
    """Return the `noise` of `lowrank.low_rank` for transformed rows `[r, k]`."""
    noise = (quantized_inputs(rows, activation, scales, stats.row_buckets) - rows).square().sum(dtype=torch.float64)
    return float(noise) * stats.count / max(1, len(rows)) / rows.shape[1]


def _quantized(
    weight: Tensor,
    bias: Tensor | None,
    made: _Coded,
    t: Transform,
    G: Tensor,
    scales: Tensor | None,
    stats: Stats,
    plan: LayerPlan,
    choices: dict,
) -> Quantized:
    """Return the layer to be stored."""
    rule, q, branch = plan.rule, made.q, made.branch
    activation = rule.activation(plan.activation_group_size, stats.absmax.shape[0])
    shared = transform.tensors(t) | ({} if scales is None else {"static_scale": scales})
    tensors = q.tensors() | {key: tensor.clone() for key, tensor in shared.items()}  # a file takes a tensor once
    if branch is not None:
        tensors |= {"up": branch.up, "down": branch.down}
    rank = branch.up.shape[1] if branch is not None else 0
    spec = LayerSpec(q.spec, activation, t.kind, t.rotation_block, t.smoothed, rank, t.steps)
    mended = bias
    if bias is not None and rule.bias_correction:
        mended = as_stored((bias.detach().float() - made.delta @ transform.apply(t, stats.mean)), bias)
    report = {
        "spec": spec.to_dict(),
        "method": rule.method,
        "rms": stats.rms,
        "weight_only_rel_rmse": relative_error(made.delta, G, weight.detach().float(), stats.gram),
        **choices,
        "low_rank": _describe(branch),
        "activation_absmax": [round(float(v), 5) for v in stats.absmax.amax(dim=1)],
        "weight_histogram": histogram(made.weight if branch is None else made.weight - branch.product, q.scale),
    }
    return Quantized(spec, {name: tensor.contiguous() for name, tensor in tensors.items()}, mended, report)


def as_stored(value: Tensor, like: Tensor) -> Tensor:
    """Return `value` rounded to the narrowest dtype that holds `like` exactly, in the dtype of `like`.

    A bias that was stored in 16 bits stays a bias that can be: the checkpoint writes floats as narrow as is lossless.
    """
    return value.to(files.narrowest(like).dtype).to(like.dtype)


def relative_error(delta: Tensor, gram: Tensor, weight: Tensor, whole_gram: Tensor) -> float:
    """Return rel_rmse of the output: of `delta` under `gram`, which may be centred and rotated, relative to all of `weight`'s."""
    power = energy(weight, whole_gram)
    return (energy(delta, gram) / power) ** 0.5 if power > 0 else 0.0


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
