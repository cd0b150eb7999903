"""Linears of one input, from Stats and plan to tensors of quantized layers: smooth, rotate, low rank, quantize, mend biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from quantdit.calibration.activations import quantized_inputs, relative_noise, static_scales
from quantdit.calibration.choice import RotationChoice, choose
from quantdit.calibration.errors import output_error
from quantdit.calibration.lowrank import LowRank, low_rank
from quantdit.calibration.quantize import quantize_as_planned
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
    """The linears quantized behind one transform; `error`, `activation_error` and `noise` as `choice.Measured` has them.

    `gram` `[in, in]` is that of the transformed inputs.
    """

    error: float
    activation_error: float
    noise: float
    gram: Tensor
    coded: dict[str, _Coded]


@dataclass(frozen=True)
class _Group:
    """Linears that share an input, and how they are quantized.

    Attributes:
        weights: `[out, in]` float32 by name.
        whole: all of them, one below the other, `[sum of out, in]`.
        stats: what calibration saw at the input.
        plan: of each of them.
        seed: of random signs, greedy rotations and k-means.
        centred: whether biases take up the mean of the outputs' errors.
        activation: how inputs are quantized.
        gram: `[in, in]` of the inputs, centred or not.
    """

    weights: dict[str, Tensor]
    whole: Tensor
    stats: Stats
    plan: LayerPlan
    seed: int
    centred: bool
    activation: ActivationSpec
    gram: Tensor

    @cached_property
    def held(self) -> tuple[Tensor, Tensor]:
        """Return the rows `[r, in]` that errors are measured on, and their buckets: rotations are fitted to the others."""
        return self.stats.rows[1::2], self.stats.row_buckets[1::2]

    @cached_property
    def norm(self) -> Tensor:
        """Return the norm of the outputs of the held rows."""
        return (self.held[0] @ self.whole.T).norm().clamp_min(1e-30)

    def attempt(self, t: Transform) -> _Attempt:
        """Quantize the linears behind a transform, and measure the error on the held rows."""
        G = transform.gram(t, self.gram)
        coded = {n: _coded(transform.apply_to_weight(t, w), G, self.plan, self.seed) for n, w in self.weights.items()}
        delta = torch.cat([made.delta for made in coded.values()])
        x, tokens, difference = self._seen(t)
        activation_error = float(difference.norm() / self.norm)
        difference = difference + tokens @ delta.T
        if self.centred:
            difference = difference - delta @ transform.apply(t, self.stats.mean)
        return _Attempt(float(difference.norm() / self.norm), activation_error, relative_noise(tokens, x), G, coded)

    def activation_error(self, t: Transform) -> float:
        """Return `_Attempt.activation_error` without quantizing weights."""
        return float(self._seen(t)[2].norm() / self.norm)

    def _seen(self, t: Transform) -> tuple[Tensor, Tensor, Tensor]:
        """Return the transformed held rows, what quantization makes of them, and the difference that makes to the outputs."""
        held, buckets = self.held
        x = transform.apply(t, held)
        tokens = quantized_inputs(x, self.activation, static_scales(x, buckets, self.activation), buckets)
        return x, tokens, (tokens - x) @ transform.apply_to_weight(t, self.whole).T

    def noise(self, rows: Tensor, scales: Tensor | None) -> float:
        """Return the `noise` of `lowrank.low_rank` for transformed rows `[r, in]`."""
        seen = quantized_inputs(rows, self.activation, scales, self.stats.row_buckets)
        squared = float((seen - rows).square().sum(dtype=torch.float64))
        return squared * self.stats.count / max(1, len(rows)) / rows.shape[1]


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
    activation = rule.activation(plan.activation_group_size, stats.absmax.shape[0])
    group = _Group(weights, whole, stats, plan, seed, centred, activation, stats.centred_gram if centred else stats.gram)
    choice = choose(rule, whole, stats, stats.rows[::2], activation, group.attempt, group.activation_error, seed)
    rows = transform.apply(choice.transform, stats.rows)
    scales = static_scales(rows, stats.row_buckets, activation)
    noise = group.noise(rows, scales) if rule.low_rank else 0.0
    found = {}
    for name, (_, bias) in linears.items():
        made = choice.made.coded[name]
        if rule.low_rank:
            made = _with_branch(made, choice.made.gram, plan, noise, seed)
        found[name] = _quantized(group, name, bias, made, choice, scales)
    return found


def _coded(W: Tensor, G: Tensor, plan: LayerPlan, seed: int, branch: LowRank | None = None) -> _Coded:
    """Quantize a weight in the transformed space, or what a branch leaves of it."""
    rest = W if branch is None else W - branch.product
    q = quantize_as_planned(rest, G, plan, seed)
    return _Coded(W, q, branch, q.dequantize().sub_(rest))


def _with_branch(made: _Coded, G: Tensor, plan: LayerPlan, noise: float, seed: int) -> _Coded:
    """Return the weight with a low-rank branch beside it; as it was, if none helps."""
    W, rank = made.weight, min(plan.rule.low_rank, *made.weight.shape)
    branch = low_rank(W, G, rank, lambda w: quantize_as_planned(w, G, plan, seed).dequantize(), noise, seed=seed)
    return made if branch is None else _coded(W, G, plan, seed, branch)


def _quantized(
    group: _Group, name: str, bias: Tensor | None, made: _Coded, choice: RotationChoice[_Attempt], scales: Tensor | None
) -> Quantized:
    """Return the layer to be stored; `scales` `[buckets]` of static activations."""
    rule, stats, t, q, branch = group.plan.rule, group.stats, choice.transform, made.q, made.branch
    shared = transform.tensors(t) | ({} if scales is None else {"static_scale": scales})
    tensors = q.tensors() | {key: tensor.clone() for key, tensor in shared.items()}  # a file takes a tensor once
    if branch is not None:
        tensors |= {"up": branch.up, "down": branch.down}
    rank = branch.up.shape[1] if branch is not None else 0
    spec = LayerSpec(q.spec, group.activation, t.kind, t.rotation_block, t.smoothed, rank, t.steps)
    mended = bias
    if bias is not None and rule.bias_correction:
        mended = as_stored((bias.detach().float() - made.delta @ transform.apply(t, stats.mean)), bias)
    report = {
        "spec": spec.to_dict(),
        "method": rule.method,
        "rms": stats.rms,
        "weight_only_rel_rmse": output_error(made.delta, group.weights[name], stats.gram, choice.made.gram),
        **choice.report,
        "low_rank": _describe(branch),
        "activation_absmax": [round(float(v), 5) for v in stats.absmax.amax(dim=1)],
        "weight_histogram": histogram(made.weight if branch is None else made.weight - branch.product, q.scale),
    }
    return Quantized(spec, {key: tensor.contiguous() for key, tensor in tensors.items()}, mended, report)


def as_stored(value: Tensor, like: Tensor) -> Tensor:
    """Return `value` rounded to the narrowest dtype that holds `like` exactly, in the dtype of `like`.

    A bias that was stored in 16 bits stays a bias that can be: the checkpoint writes floats as narrow as is lossless.
    """
    return value.to(files.narrowest(like).dtype).to(like.dtype)


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
