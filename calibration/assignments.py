"""Calibrated assignments: which codeword each sub-vector gets is trained on the outputs of blocks.

(VQ4DiT, Deng et al. 2024, arXiv 2408.17131, Eq. 5 to 9.)

    W_hat = sum_m r_m C[a_m],   r = softmax(z),   a_1 .. a_n the candidates of a sub-vector
    loss  = |block(W_hat) - block(W)|^2 / |block(W)|^2 + weight * n mean(r (1 - r))

The logits z are trained until each sub-vector has one codeword left; then the codebook, the channel scales and the bias are. A
sub-vector is frozen once a ratio passes 0.99; the regulariser counts only while it is above the least it ever was, as in the
released code; whatever is not frozen when the steps for assignments are over takes its largest ratio.

Levels of a table are codewords of one weight, for which this is AdaRound (Nagel et al. 2020, arXiv 2004.10568) with a softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantdit import transform
from quantdit.calibration.grids import PAIR_LIMIT
from quantdit.calibration.layer import Quantized, quantized_inputs
from quantdit.formats import FORMATS
from quantdit.layer_spec import LayerSpec

FROZEN = 0.99
CERTAIN = 30.0  # of a logit: the others' ratios are then 0 in float32
ASSIGNMENT_PART = 0.6  # of the steps; the rest is the codebooks'
INITIAL = ("distance", "uniform")


@dataclass(frozen=True)
class Training:
    """How assignments are calibrated.

    Attributes:
        steps: of the optimizer; 0 for none.
        candidates: codewords a sub-vector may choose among; 1 trains codebooks, scales and biases alone.
        initial: ratios begin as 1 / n (`uniform`) or in inverse proportion to the candidates' errors (`distance`).
        logit_rate: learning rate of the logits.
        codebook_rate: of codebooks, scales and biases, as a part of their size.
        regulariser: weight of the ratios' term.
        rows: samples of a call in one step.
    """

    steps: int = 300
    candidates: int = 2
    initial: str = "distance"
    logit_rate: float = 5e-2
    codebook_rate: float = 1e-3
    regulariser: float = 0.1
    rows: int = 16


class SoftLinear(nn.Module):
    """A quantized linear whose codes are not decided yet. `bits` and `bucket` as in QuantLinear.

    Attributes:
        candidates: uint8 `[n, out, in / d]`, codes.
        logits: float32, the same shape; a parameter.
        codebook: float32 `[k, d]`, scale float32 `[out]`, bias `[out]` or None; parameters.
    """

    def __init__(
        self, spec: LayerSpec, tensors: Mapping[str, Tensor], bias: Tensor | None, candidates: Tensor, logits: Tensor
    ) -> None:
        super().__init__()
        self.spec, self.bucket = spec, 0
        self.transform = transform.from_tensors(
            spec.rotation, spec.block, {n: tensors[n] for n in transform.NAMES if n in tensors}
        )
        self.static = tensors.get("static_scale")
        self.branch = (tensors["up"].float(), tensors["down"].float()) if spec.rank else None
        self.candidates = candidates
        # Entries are trained in units of the largest, so that one rate suits all layers.
        unit = tensors["codebook"].float().abs().max().clamp_min(1)
        codebook = tensors["codebook"].float().reshape(FORMATS[spec.weight.format].levels, -1) / unit
        self.logits = nn.Parameter(logits)
        self.codebook = nn.Parameter(codebook)
        self.scale = nn.Parameter(tensors["scale"] * unit)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())

    def weight(self) -> Tensor:
        """Return the weight `[out, in]` in the transformed space."""
        words = [self.codebook[part.int()] for part in self.candidates]
        if len(words) == 1:
            soft = words[0]
        else:
            ratios = self.logits.softmax(dim=0)
            soft = sum(r[..., None] * word for r, word in zip(ratios, words, strict=True))
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
        y = nn.functional.linear(seen, self.weight(), self.bias)
        if self.branch is not None:
            up, down = self.branch
            y = y + nn.functional.linear(nn.functional.linear(tokens, down), up)
        return y.reshape(*x.shape[:-1], -1).to(x.dtype)

    @property
    def ratios(self) -> Tensor:
        """Return `[n, out, in / d]`."""
        return self.logits.softmax(dim=0)

    @torch.no_grad()
    def freeze(self, least: float = FROZEN) -> float:
        """Decide every sub-vector one of whose ratios is above `least`; returns the part that is decided."""
        if len(self.logits) == 1:
            return 1.0
        best = self.ratios.max(dim=0)
        decided = best.values > least
        winner = torch.arange(len(self.logits))[:, None, None] == best.indices
        certain = torch.where(winner, CERTAIN, -CERTAIN)
        self.logits.copy_(torch.where(decided, certain, self.logits))
        return float(decided.float().mean())

    @torch.no_grad()
    def tensors(self) -> tuple[dict[str, Tensor], Tensor | None, float]:
        """Return data, codebook and scale as they are stored, the bias, and the relative error of rounding the codebook."""
        f = FORMATS[self.spec.weight.format]
        winner = self.logits.argmax(dim=0, keepdim=True)
        codes = self.candidates.gather(0, winner)[0]
        element = torch.int8
        unit = self.codebook.abs().max().clamp_min(1e-30) / (PAIR_LIMIT // 2)
        entries = (self.codebook / unit).round()
        error = float((entries * unit - self.codebook).norm() / self.codebook.norm().clamp_min(1e-30))
        codebook = entries.to(element).reshape(1, -1) if f.dim == 1 else entries.to(element)
        stored = {"data": f.pack(f, codes), "codebook": codebook.contiguous(), "scale": (self.scale * unit).abs()}
        return stored, None if self.bias is None else self.bias.detach().clone(), error


def soft_linear(made: Quantized, weight: Tensor, gram: Tensor, training: Training) -> SoftLinear:
    """Return a layer to be trained, from what `quantize_layer` made of it.

    Candidates are the codewords that, all else held, leave the least output error at a sub-vector; the code it has comes first
    unless another is as good.

    Args:
        made: the quantized layer, of a codebook for the whole weight.
        weight: `[out, in]`, before it was quantized.
        gram: of its inputs, before they were transformed.
        training: how many candidates, and their first ratios.
    """
    spec, f = made.spec, FORMATS[made.spec.weight.format]
    t = transform.from_tensors(spec.rotation, spec.block, {n: made.tensors[n] for n in transform.NAMES if n in made.tensors})
    scale = torch.where(made.tensors["scale"] > 0, made.tensors["scale"], 1.0)
    W = transform.apply_to_weight(t, weight.detach().float())
    if spec.rank:
        W = W - made.tensors["up"].float() @ made.tensors["down"].float()
    W = W / scale[:, None]
    codebook = made.tensors["codebook"].float().reshape(f.levels, -1)
    codes = f.unpack(f, made.tensors["data"], W.shape[1] // f.dim).long()
    candidates, errors = nearest(codes, W, transform.gram(t, gram), codebook, training.candidates)
    if training.initial == "uniform":
        logits = torch.zeros(candidates.shape)
    else:
        # Ratios in inverse proportion to the errors; that of the best may be zero.
        floor = 1e-3 * errors.mean().clamp_min(1e-30)
        logits = -(errors + floor).log()
    return SoftLinear(spec, made.tensors, made.bias, candidates.to(torch.uint8), logits.contiguous())


def nearest(codes: Tensor, W: Tensor, H: Tensor, codebook: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` best codewords of each group, all others held, and their errors: both `[count, out, in / d]`.

    The error of codeword c at group g is `(t - c) H_gg (t - c)^T` with t the best real numbers for it (vectors.descend).
    """
    d, H = codebook.shape[1], H.float()
    D = codebook[codes].flatten(1) - W
    slope = D @ H
    found, errors = [], []
    for g in range(W.shape[1] // d):
        part = slice(g * d, g * d + d)
        block = H[part, part] + 1e-6 * H.diagonal().mean().clamp_min(1e-30) * torch.eye(d)
        root = torch.linalg.cholesky(block)
        target = W[:, part] + D[:, part] - torch.cholesky_solve(slope[:, part].T, root).T
        distance = torch.cdist(target @ root, codebook @ root).square()
        least = distance.topk(count, dim=1, largest=False)
        found.append(least.indices)
        errors.append(least.values)
    return tuple(torch.stack(parts, 2).transpose(0, 1).contiguous() for parts in (found, errors))


def train(
    layers: Sequence[SoftLinear],
    batches: Iterator[tuple[Callable[[], Sequence[Tensor]], Sequence[Tensor]]],
    held_out: Callable[[], float],
    training: Training,
    report: Callable[[dict], None] = lambda row: None,
) -> dict:
    """Train layers in place until every sub-vector has one codeword; returns what the report says of it.

    Args:
        layers: of the parts that are run.
        batches: endless pairs of what to run, and what it should return.
        held_out: error on calls that no batch has.
        training: steps and rates.
        report: told the loss and the part that is frozen, now and then.
    """
    soft = [layer.logits for layer in layers if len(layer.logits) > 1]
    tables = [p for layer in layers for p in (layer.codebook, layer.scale, layer.bias) if p is not None]
    rates = [
        {"params": [p], "lr": training.codebook_rate * float(p.detach().square().mean().sqrt().clamp_min(1e-3))} for p in tables
    ]
    of_logits = torch.optim.RMSprop(soft, lr=training.logit_rate, alpha=0.9) if soft else None
    of_tables = torch.optim.Adam(rates, betas=(0.9, 0.99))
    least, before = math.inf, held_out()
    until = round(training.steps * ASSIGNMENT_PART) if soft else 0
    history = []
    for step in range(training.steps):
        assigning = step < until
        if step == until:
            for layer in layers:
                layer.freeze(0.0)
                layer.logits.requires_grad_(False)
        run, expected = next(batches)
        error = sum(relative(got, wanted) for got, wanted in zip(run(), expected, strict=True)) / len(expected)
        loss = error
        if assigning:
            spread = sum(
                (r * (1 - r)).mean() * len(r) for r in (layer.ratios for layer in layers if len(layer.logits) > 1)
            ) / len(soft)
            if float(spread) > least:
                loss = loss + training.regulariser * spread
            least = min(least, float(spread))
        optimizer = of_logits if assigning else of_tables
        if not assigning:
            part = (step - until) / max(1, training.steps - until)
            for group, given in zip(of_tables.param_groups, rates, strict=True):
                group["lr"] = given["lr"] * (1 - part)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if assigning:
            frozen = sum(layer.freeze() for layer in layers) / len(layers)
        history.append(float(error.detach()))
        report({"step": step, "error": history[-1], "frozen": frozen if assigning else 1.0})
    return {"held_out_before": before, "held_out": held_out(), "first": history[:1], "last": history[-1:]}


def relative(got: Tensor, wanted: Tensor) -> Tensor:
    """Return the squared error relative to what was wanted."""
    return (got.float() - wanted.float()).square().sum() / wanted.float().square().sum().clamp_min(1e-30)
