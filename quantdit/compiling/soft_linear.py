"""`SoftLinear`: a quantized linear whose codes, tables, scales and bias are still open to training (finetune.py).

(VQ4DiT, Deng et al. 2024, arXiv 2408.17131, Eq. 5 to 9.)

    W_hat = sum_m r_m C[a_m],   r = softmax(z),   a_1 .. a_n the candidates of a sub-vector
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from quantdit.calibration import gptvq
from quantdit.calibration.activations import quantized_inputs
from quantdit.calibration.errors import output_error
from quantdit.calibration.layer import Quantized, as_stored, histogram
from quantdit.calibration.stats import Stats
from quantdit.formats import FORMATS
from quantdit.formats.codebook import entries_of
from quantdit.recipes.finetuning import FineTuning
from quantdit.tensors import transform
from quantdit.tensors.layer_spec import LayerSpec

FROZEN = 0.99
CERTAIN = 30.0  # of a logit: the others' ratios are then 0 in float32
OWN = 4.0  # times as large as another's is at least the first ratio of the code a group has, where that is not the best


class SoftLinear(nn.Module):
    """A quantized linear whose codes are not decided yet. `bucket` as in QuantLinear.

    Attributes:
        candidates: uint8 `[n, out, in / d]`, codes (int32 where they have signs); None where codes stay as they are (trellis).
        logits: float32, the same shape; a parameter. None without candidates.
        codebook: float32 `[k, d]`; a parameter. None without candidates.
        integers: int8 `[out, in]`, what codes that stay as they are stand for; None with candidates.
        unit: float32 `[out]`: the scales as they were, where training is in units of each channel: if a few channels are a
            thousand times as large, one rate for all would suit these alone. Else 1.
        gain: float32 `[out]`, the scales in these units; a parameter.
        centre: float32 `[in]`, the mean of the transformed inputs; None without a bias.
        level: float32 `[out]`, the mean output in these units; a parameter. The bias follows from it: whatever becomes of the
            weight, it takes up what that does to the mean.
    """

    def __init__(
        self,
        spec: LayerSpec,
        tensors: Mapping[str, Tensor],
        centre: Tensor | None,
        output: Tensor | None,
        candidates: Tensor | None,
        logits: Tensor | None,
        in_units: bool,
    ) -> None:
        super().__init__()
        self.spec, self.bucket = spec, 0
        self.transform = transform.from_tensors(spec.rotation, spec.block, tensors)
        self.static = tensors.get("static_scale")
        self.branch = _branch(tensors)
        f, self.candidates = FORMATS[spec.weight.format], candidates
        if candidates is None or logits is None:
            self.logits = self.codebook = None
            self.integers = f.decode8(f, spec.weight, tensors)
            scale = tensors["scale"].clone()
        else:
            # Entries are trained in units of the largest, so that one rate suits all layers.
            unit = tensors["codebook"].float().abs().max().clamp_min(1)
            self.logits = nn.Parameter(logits)
            self.codebook = nn.Parameter(tensors["codebook"].float().reshape(-1, f.dim) / unit)
            self.integers = None
            scale = tensors["scale"] * unit
        self.unit = scale.abs().clamp_min(torch.finfo(torch.float32).tiny) if in_units else torch.ones_like(scale)
        self.gain = nn.Parameter(scale / self.unit)
        self.centre = centre
        self.level = None if output is None else nn.Parameter(output / self.unit)

    @property
    def scale(self) -> Tensor:
        return self.gain * self.unit

    @property
    def output(self) -> Tensor | None:
        return None if self.level is None else self.level * self.unit

    def weight(self) -> Tensor:
        """Return the weight `[out, in]` in the transformed space."""
        if self.candidates is None or self.codebook is None:
            assert self.integers is not None
            return self.integers * self.scale[:, None]
        f = FORMATS[self.spec.weight.format]
        found = [entries_of(self.codebook, part.int(), f.sign_split) for part in self.candidates]
        soft = found[0] if len(found) == 1 else _sum([r[..., None] * word for r, word in zip(self.ratios, found, strict=True)])
        return soft.flatten(1) * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """Map x `[..., in]` to `[..., out]`; gradients pass through the quantization of inputs as if there were none."""
        tokens = transform.apply(self.transform, x.reshape(-1, x.shape[-1]).float())
        activation = self.spec.activation
        if activation.bits < 16:
            with torch.no_grad():
                buckets = torch.full((len(tokens),), self.bucket)
                noise = quantized_inputs(tokens, activation, self.static, buckets) - tokens
            seen = tokens + noise
        else:
            seen = tokens
        y = nn.functional.linear(seen if self.centre is None else seen - self.centre, self.weight(), self.output)
        if self.branch is not None:
            up, down = self.branch
            y = y + nn.functional.linear(nn.functional.linear(tokens, down), up)
        return y.reshape(*x.shape[:-1], -1).to(x.dtype)

    @property
    def is_open(self) -> bool:
        """Return whether sub-vectors have codewords to choose among."""
        return self.logits is not None and len(self.logits) > 1

    @property
    def ratios(self) -> Tensor:
        """Return `[n, out, in / d]`."""
        assert self.logits is not None, "codes that stay as they are have no ratios"
        return self.logits.softmax(dim=0)

    @torch.no_grad()
    def freeze(self, least: float = FROZEN) -> float:
        """Decide every sub-vector one of whose ratios is above `least`; returns the part that is decided."""
        assert self.logits is not None, "codes that stay as they are have nothing to decide"
        best = self.ratios.max(dim=0)
        decided = best.values > least
        winner = torch.arange(len(self.logits))[:, None, None] == best.indices
        certain = torch.where(winner, CERTAIN, -CERTAIN)
        self.logits.copy_(torch.where(decided, certain, self.logits))
        return float(decided.float().mean())

    @torch.no_grad()
    def decided(self, made: Quantized, weight: Tensor, bias: Tensor | None, stats: Stats) -> Quantized:
        """Return the layer that `made` was with what was found; weight and bias are those of the source."""
        stored, integers, rounding = self._stored()
        W = _beside_branch(self.transform, weight, self.branch)
        dense = stored["scale"][:, None] * integers
        gram = transform.gram(self.transform, stats.gram if bias is None else stats.centred_gram)
        report = {
            "weight_only_rel_rmse": output_error(dense - W, weight.detach().float(), stats.gram, gram),
            "weight_histogram": histogram(W, stored["scale"]),
            "codebook_rounding": float(f"{rounding:.3g}"),
        }
        if bias is None or self.output is None or self.centre is None:
            mended = None
        else:
            mended = as_stored(self.output - dense @ self.centre, bias)
        return replace(made, tensors=made.tensors | stored, bias=mended, report=made.report | report)

    def _stored(self) -> tuple[dict[str, Tensor], Tensor, float]:
        """Return what changed as it is stored, `I` float32, and the relative error of rounding the codebook."""
        if self.candidates is None or self.logits is None or self.codebook is None:
            assert self.integers is not None
            return {"scale": gptvq.in_16_bits(self.scale.abs())}, self.integers.float(), 0.0
        f = FORMATS[self.spec.weight.format]
        winner = self.logits.argmax(dim=0, keepdim=True)
        codes = self.candidates.gather(0, winner)[0]
        entries, unit = gptvq.on_int8_grid(self.codebook.clamp_min(0) if f.sign_split else self.codebook)
        error = float((entries * unit - self.codebook).norm() / self.codebook.norm().clamp_min(1e-30))
        codebook = entries.to(torch.int8).reshape(1, -1) if f.dim == 1 else entries.to(torch.int8)
        scale = gptvq.in_16_bits((self.scale * unit).abs())
        stored = {"data": f.pack(f, codes), "codebook": codebook.contiguous(), "scale": scale}
        return stored, entries_of(entries, codes.int(), f.sign_split).flatten(1), error


def bytes_of(made: Quantized, finetuning: FineTuning) -> int:
    """Return what training a layer takes: of each candidate a code, a logit, its gradient and average; soft weights, float32."""
    weight, f = made.spec.weight, FORMATS[made.spec.weight.format]
    size = weight.out_features * weight.in_features
    if f.state_bits:
        return size * (1 + 3 * 4)  # the integers, as float32, times the scales, the gradient
    # Each candidate's codewords are kept for the backward pass; the mixture, its product with the scales, the gradient.
    n = finetuning.candidates
    return size // f.dim * n * (f.code_dtype.itemsize + 3 * 4) + size * 4 * (n + 3)


def is_trainable(made: Quantized) -> bool:
    """Return whether a layer has one int8 codebook for the whole weight, or trellis codes."""
    if FORMATS[made.spec.weight.format].state_bits:
        return True
    codebook = made.tensors.get("codebook")
    return codebook is not None and codebook.dtype == torch.int8 and made.spec.weight.codebook_rows == 1


def soft_linear(made: Quantized, weight: Tensor, bias: Tensor | None, stats: Stats, finetuning: FineTuning) -> SoftLinear:
    """Return a layer to be trained, from what `quantize_layer` made of it.

    Args:
        made: the quantized layer, of a codebook for the whole weight or of trellis codes.
        weight: `[out, in]`, before it was quantized.
        bias: `[out]` or None, before it was mended.
        stats: of its inputs.
        finetuning: how many candidates, and their first ratios.
    """
    spec = made.spec
    t = transform.from_tensors(spec.rotation, spec.block, made.tensors)
    branch = _branch(made.tensors)
    candidates = logits = None
    if not FORMATS[spec.weight.format].state_bits:
        gram = transform.gram(t, stats.gram if bias is None else stats.centred_gram)
        candidates, logits = _choices(made, _beside_branch(t, weight, branch), gram, finetuning)
    centre = None if bias is None else transform.apply(t, stats.mean)
    output = None if bias is None else bias.detach().float() + weight.detach().float() @ stats.mean
    if output is not None and centre is not None and branch is not None:
        output = output - branch[0] @ (branch[1] @ centre)
    return SoftLinear(spec, made.tensors, centre, output, candidates, logits, in_units=finetuning.optimizer == "adam")


def _choices(made: Quantized, W: Tensor, H: Tensor, finetuning: FineTuning) -> tuple[Tensor, Tensor]:
    """Return candidates and logits, both `[n, out, in / d]`, for W in the transformed space.

    Candidates are the code that a sub-vector has, and the codewords that would leave the least output error, all else held.
    """
    f = FORMATS[made.spec.weight.format]
    scale = torch.where(made.tensors["scale"] > 0, made.tensors["scale"], 1.0)
    codebook = made.tensors["codebook"].float().reshape(-1, f.dim)
    codes = f.unpack(f, made.tensors["data"], W.shape[1] // f.dim).long()
    metric = torch.eye(W.shape[1], dtype=H.dtype) if finetuning.distance == "weight" else H
    candidates, errors = best_codes(codes, W / scale[:, None], metric, codebook, finetuning.candidates, f.sign_split)
    if finetuning.initial == "uniform":
        logits = torch.zeros(candidates.shape, dtype=torch.float32)
    else:
        # Ratios in inverse proportion to the errors; that of the best may be zero. Where another code is better than the one a
        # group has, all else held, its ratio must not be larger all the same: all groups moving at once would overshoot.
        errors[0] = torch.minimum(errors[0], errors.amin(dim=0) / OWN)
        floor = 1e-3 * errors.mean().clamp_min(1e-30)
        logits = -(errors + floor).log()
    return candidates.to(f.code_dtype), logits.contiguous()


def _branch(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return `up`, `down` float32 of a low-rank branch; None without one."""
    return (tensors["up"].float(), tensors["down"].float()) if "up" in tensors else None


def _beside_branch(t: transform.Transform, weight: Tensor, branch: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return what of a source's weight `[out, in]` is to be quantized: transformed, less its low-rank branch."""
    W = transform.apply_to_weight(t, weight.detach().float())
    return W if branch is None else W - branch[0] @ branch[1]


def best_codes(
    codes: Tensor, W: Tensor, H: Tensor, codebook: Tensor, count: int, sign_split: bool = False
) -> tuple[Tensor, Tensor]:
    """Return for each group its code and the best other codewords, all other groups held, and their errors.

    Both are `[count, out, in / d]`. With `sign_split` the others have the signs that are best for the group.

    The error of codeword c at group g is `(t - c) H_gg (t - c)^T` with t the best real numbers for it (gptvq.descend).
    """
    (k, d), H = codebook.shape, H.float()
    D = entries_of(codebook, codes, sign_split).flatten(1) - W
    slope = D @ H
    found, errors = [], []
    for g, root in enumerate(gptvq.group_roots(H, d)):
        part = slice(g * d, g * d + d)
        target = W[:, part] + D[:, part] - torch.cholesky_solve(slope[:, part].T, root).T
        has = codes[:, g, None]
        if sign_split:
            distance, flips = gptvq.signed_errors(target, codebook, root)
            distance, flips = distance + (target @ root).square().sum(dim=1, keepdim=True), flips[:, None]
        else:
            distance, flips = torch.cdist(target @ root, codebook @ root).square(), 0
        # The code it has stays the first: all groups moving to what is best with the others held would overshoot.
        own = ((entries_of(codebook, codes[:, g], sign_split) - target) @ root).square().sum(dim=1, keepdim=True)
        others = distance.scatter(1, has % k, torch.where(has // k * k == flips, torch.inf, distance.gather(1, has % k)))
        chosen = others.topk(count - 1, dim=1, largest=False)
        found.append(torch.cat([has, chosen.indices + flips], dim=1))
        errors.append(torch.cat([own, chosen.values.clamp_min(0)], dim=1))
    return _stacked(found), _stacked(errors)


def _stacked(parts: list[Tensor]) -> Tensor:
    """Return `[count, out, in / d]` of a group's `[out, count]` each."""
    return torch.stack(parts, 2).transpose(0, 1).contiguous()


def _sum(terms: Sequence[Tensor]) -> Tensor:
    return sum(terms[1:], terms[0])
