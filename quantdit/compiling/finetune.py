"""Calibrated assignments: which codeword each sub-vector gets is trained on the outputs of blocks.

(VQ4DiT, Deng et al. 2024, arXiv 2408.17131, Eq. 5 to 9.)

    W_hat = sum_m r_m C[a_m],   r = softmax(z),   a_1 .. a_n the candidates of a sub-vector
    loss  = E (1 + weight * n mean(r (1 - r))),   E = |block(W_hat) - block(W)|^2 / |block(W)|^2, a constant in the second term

The logits z are trained until each sub-vector has one codeword left; then the codebook, the channel scales and the bias are (with
`rmsprop`, the paper's way, they are from the first step on). A sub-vector is frozen once a ratio passes 0.99; what is not frozen
when the steps for assignments are over takes its largest ratio. The paper weighs the second term by a constant: beside errors of
.001 a constant near 1 makes the choice alone, and two candidates are then no better than one (reports/papers.md).

Levels of a table are codewords of one weight, for which this is AdaRound (Nagel et al. 2020, arXiv 2004.10568) with a softmax.
Trellis codes stay as they are, since none can change alone, and their table is fixed: scales and biases are what is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quantdit.calibration import gptvq
from quantdit.calibration.activations import quantized_inputs
from quantdit.calibration.layer import Quantized, as_stored, histogram, relative_error
from quantdit.calibration.observe.recorded_calls import Call, rows_of
from quantdit.calibration.stats import Stats
from quantdit.formats import FORMATS, QSpec
from quantdit.formats.codebook import entries_of
from quantdit.recipes.recipe import BEST, METHODS, Rule
from quantdit.tensors import transform
from quantdit.tensors.layer_spec import LayerSpec

FROZEN = 0.99
CERTAIN = 30.0  # of a logit: the others' ratios are then 0 in float32
OWN = 4.0  # times as large as another's is at least the first ratio of the code a group has, where that is not the best
ASSIGNMENT_PART = 0.6  # of the steps; the rest is the codebooks'
CHECKS = 10  # of the held-out error while codebooks are trained
PATIENCE = 3  # checks without a gain, after which they are as good as they get
HELD_OUT = 8  # one in so many samples is held out
INITIAL = ("distance", "uniform")
MODES = ("block", "end-to-end")
OPTIMIZERS = ("adam", "rmsprop")
DISTANCES = ("output", "weight")
MOST_CANDIDATES = 4

Run = Callable[[Call], Sequence[Tensor]]  # makes a call and returns its tensors


@dataclass(frozen=True)
class Training:
    """How assignments are calibrated.

    Attributes:
        steps: of the optimizer.
        mode: `block`: one block after another, on the inputs that the quantized blocks before it make; `end-to-end`: all blocks
            at once, each on what the ones before it return meanwhile, which needs the model in memory twice.
        candidates: codewords a sub-vector may choose among; 1 trains codebooks, scales and biases alone. Trellis codes have one.
        initial: ratios begin as 1 / n (`uniform`) or in inverse proportion to the candidates' errors (`distance`).
        logit_rate: learning rate of the logits.
        codebook_rate: of codebooks, scales and biases, as a part of their size; with `rmsprop` in units of weights and biases.
        regulariser: weight of the ratios' term, in parts of the step's error: much more, and the term makes the choice.
        gated: that term counts only while it is above the least it ever was, as in the released code; otherwise it grows with the
            square of the steps, so that nearly all is decided in the end.
        optimizer: `adam`: codebooks, scales and biases are trained once the choice is made, at a rate that falls to 0; `rmsprop`,
            the paper's: codebooks and biases at a constant rate, from the first step on, together with the logits.
        distance: what makes codewords candidates: the layer's error in the `output`, or in the `weight` (Eq. 5).
        rows: samples of a call in one step.
        memory: bytes that logits, their gradients and averages, candidates and soft weights may take at once; layers that take
            more are trained in parts, one after the other.
    """

    steps: int = 300
    mode: str = "block"
    candidates: int = 2
    initial: str = "distance"
    logit_rate: float = 5e-2
    codebook_rate: float = 1e-3
    regulariser: float = 10.0
    gated: bool = False
    optimizer: str = "adam"
    distance: str = "output"
    rows: int = 16
    memory: int = 2 * 2**30

    def __post_init__(self) -> None:
        """Check what the command line does not.

        Raises:
            ValueError: an unknown word or an impossible number.
        """
        known = {
            "calibration mode": (self.mode, MODES),
            "initial ratios": (self.initial, INITIAL),
            "optimizer": (self.optimizer, OPTIMIZERS),
            "distance": (self.distance, DISTANCES),
        }
        for what, (value, allowed) in known.items():
            if value not in allowed:
                raise ValueError(f"{what} {value!r} not known; use one of {', '.join(allowed)}")
        if self.memory < 1:
            raise ValueError(f"{self.memory} bytes of memory are not enough to train anything")
        if self.steps < 1 or not 1 <= self.candidates <= MOST_CANDIDATES:
            raise ValueError(
                f"{self.steps} steps with {self.candidates} candidates are not possible: at least one step, 1 to"
                f" {MOST_CANDIDATES} candidates"
            )


def preset(bits: str, method: str = BEST) -> Training | None:
    """Return what a method of recipe.METHODS calibrates of `wXaY`; None for nothing.

    `best` does at 2 bits: scales and biases, and codebooks where there are. One candidate: after error feedback, steps spent on
    the choice among two gain less than as many on codebooks (reports/study).
    """
    if method != BEST:
        return Training(**METHODS[method].training) if METHODS[method].training else None
    return Training(candidates=1) if bits.startswith("w2a") else None


class SoftLinear(nn.Module):
    """A quantized linear whose codes are not decided yet. `bucket` as in QuantLinear.

    Attributes:
        candidates: uint8 `[n, out, in / d]`, codes (int32 where they have signs); None where codes stay as they are (trellis).
        logits: float32, the same shape; a parameter. None without candidates.
        codebook: float32 `[k, d]`; a parameter. None without candidates.
        integers: int8 `[out, in]`, what codes that stay as they are stand for; None with candidates.
        scale: float32 `[out]`; a parameter.
        centre: float32 `[in]`, the mean of the transformed inputs; None without a bias.
        output: float32 `[out]`, the mean output; a parameter. The bias follows from it: whatever becomes of the weight, it takes
            up what that does to the mean.
    """

    def __init__(
        self,
        spec: LayerSpec,
        tensors: Mapping[str, Tensor],
        centre: Tensor | None,
        output: Tensor | None,
        candidates: Tensor | None,
        logits: Tensor | None,
    ) -> None:
        super().__init__()
        self.spec, self.bucket = spec, 0
        self.transform = transform.from_tensors(spec.rotation, spec.block, tensors)
        self.static = tensors.get("static_scale")
        self.branch = _branch(tensors)
        f, self.candidates = FORMATS[spec.weight.format], candidates
        if candidates is None:
            self.logits = self.codebook = None
            self.integers = f.decode8(f, spec.weight, tensors)
            self.scale = nn.Parameter(tensors["scale"].clone())
        else:
            # Entries are trained in units of the largest, so that one rate suits all layers.
            unit = tensors["codebook"].float().abs().max().clamp_min(1)
            self.logits = nn.Parameter(logits)
            self.codebook = nn.Parameter(tensors["codebook"].float().reshape(-1, f.dim) / unit)
            self.integers = None
            self.scale = nn.Parameter(tensors["scale"] * unit)
        self.centre = centre
        self.output = None if output is None else nn.Parameter(output)

    def weight(self) -> Tensor:
        """Return the weight `[out, in]` in the transformed space."""
        if self.candidates is None:
            return self.integers * self.scale[:, None]
        f = FORMATS[self.spec.weight.format]
        found = [entries_of(self.codebook, part.int(), f.sign_split) for part in self.candidates]
        soft = found[0] if len(found) == 1 else sum(r[..., None] * word for r, word in zip(self.ratios, found, strict=True))
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
        return self.logits.softmax(dim=0)

    @torch.no_grad()
    def freeze(self, least: float = FROZEN) -> float:
        """Decide every sub-vector one of whose ratios is above `least`; returns the part that is decided."""
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
            "weight_only_rel_rmse": relative_error(dense - W, gram, weight.detach().float(), stats.gram),
            "weight_histogram": histogram(W, stored["scale"]),
            "codebook_rounding": float(f"{rounding:.3g}"),
        }
        mended = None if bias is None else as_stored(self.output - dense @ self.centre, bias)
        return replace(made, tensors=made.tensors | stored, bias=mended, report=made.report | report)

    def _stored(self) -> tuple[dict[str, Tensor], Tensor, float]:
        """Return what changed as it is stored, `I` float32, and the relative error of rounding the codebook."""
        if self.candidates is None:
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


def bytes_of(made: Quantized, training: Training) -> int:
    """Return what training a layer takes: of each candidate a code, a logit, its gradient and average; soft weights, float32."""
    weight, f = made.spec.weight, FORMATS[made.spec.weight.format]
    size = weight.out_features * weight.in_features
    if f.state_bits:
        return size * (1 + 3 * 4)  # the integers, as float32, times the scales, the gradient
    # Each candidate's codewords are kept for the backward pass; the mixture, its product with the scales, the gradient.
    n = training.candidates
    return size // f.dim * n * (f.code_dtype.itemsize + 3 * 4) + size * 4 * (n + 3)


def parts(made: Mapping[str, Quantized], training: Training) -> list[tuple[str, ...]]:
    """Return the names of the layers that can be trained, in order, cut into parts that training has memory for."""
    found: list[tuple[str, ...]] = []
    room = 0
    for name in (name for name, layer in made.items() if is_trainable(layer)):
        needed = bytes_of(made[name], training)
        if not found or needed > room:
            found, room = [*found, ()], training.memory
        found[-1] += (name,)
        room -= needed
    return found


def trains(rule: Rule) -> bool:
    """Return whether layers of a rule are such (`is_trainable`); False where the weight is not one format, but dense or open."""
    return chooses(rule) or (rule.weight in FORMATS and FORMATS[rule.weight].state_bits > 0)


def chooses(rule: Rule) -> bool:
    """Return whether layers of a rule have one int8 codebook for the whole weight, to choose codewords of."""
    if rule.weight not in FORMATS:
        return False
    f = FORMATS[rule.weight]
    codebook = f.fields(f, QSpec(f.name, 64, 64, 64)).get("codebook")
    return codebook is not None and codebook.dtype == torch.int8 and (f.dim > 1 or rule.table_rows == "layer")


def check_trains(rules: Iterable[Rule]) -> None:
    """Refuse training where there is nothing to train.

    Raises:
        ValueError: no layer of these rules is such as `trains` says.
    """
    rules = list(rules)
    if not any(map(trains, rules)):
        weights = ", ".join(sorted({rule.weight for rule in rules}))
        raise ValueError(
            "calibration steps train codebooks, level tables of whole weights and the scales of trellis codes, and these layers"
            f" have none ({weights}); take weight format table, vq or trellis, or no calibration steps"
        )


def is_trainable(made: Quantized) -> bool:
    """Return whether a layer has one int8 codebook for the whole weight, or trellis codes."""
    if FORMATS[made.spec.weight.format].state_bits:
        return True
    codebook = made.tensors.get("codebook")
    return codebook is not None and codebook.dtype == torch.int8 and made.spec.weight.codebook_rows == 1


def soft_linear(made: Quantized, weight: Tensor, bias: Tensor | None, stats: Stats, training: Training) -> SoftLinear:
    """Return a layer to be trained, from what `quantize_layer` made of it.

    Args:
        made: the quantized layer, of a codebook for the whole weight or of trellis codes.
        weight: `[out, in]`, before it was quantized.
        bias: `[out]` or None, before it was mended.
        stats: of its inputs.
        training: how many candidates, and their first ratios.
    """
    spec = made.spec
    t = transform.from_tensors(spec.rotation, spec.block, made.tensors)
    branch = _branch(made.tensors)
    candidates = logits = None
    if not FORMATS[spec.weight.format].state_bits:
        gram = transform.gram(t, stats.gram if bias is None else stats.centred_gram)
        candidates, logits = _choices(made, _beside_branch(t, weight, branch), gram, training)
    centre = None if bias is None else transform.apply(t, stats.mean)
    output = None if bias is None else bias.detach().float() + weight.detach().float() @ stats.mean
    if centre is not None and branch is not None:
        output = output - branch[0] @ (branch[1] @ centre)
    return SoftLinear(spec, made.tensors, centre, output, candidates, logits)


def _choices(made: Quantized, W: Tensor, H: Tensor, training: Training) -> tuple[Tensor, Tensor]:
    """Return candidates and logits, both `[n, out, in / d]`, for W in the transformed space.

    Candidates are the code that a sub-vector has, and the codewords that would leave the least output error, all else held.
    """
    f = FORMATS[made.spec.weight.format]
    scale = torch.where(made.tensors["scale"] > 0, made.tensors["scale"], 1.0)
    codebook = made.tensors["codebook"].float().reshape(-1, f.dim)
    codes = f.unpack(f, made.tensors["data"], W.shape[1] // f.dim).long()
    metric = torch.eye(W.shape[1], dtype=H.dtype) if training.distance == "weight" else H
    candidates, errors = best_codes(codes, W / scale[:, None], metric, codebook, training.candidates, f.sign_split)
    if training.initial == "uniform":
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

    The error of codeword c at group g is `(t - c) H_gg (t - c)^T` with t the best real numbers for it (vectors.descend).
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
    return tuple(torch.stack(parts, 2).transpose(0, 1).contiguous() for parts in (found, errors))


@dataclass(frozen=True)
class Examples:
    """Calls to train on, and what a part of the model in full precision returned.

    Attributes:
        calls: of the part.
        outputs: of call number i, its tensors.
    """

    calls: Sequence[Call]
    outputs: Callable[[int], Sequence[Tensor]]

    def batches(self, rows: int, generator: torch.Generator) -> Iterator[tuple[Call, list[Tensor]]]:
        """Yield for ever random calls, cut down to `rows` random samples, and the outputs that belong to them."""
        while True:
            number = int(torch.randint(len(self.calls), (1,), generator=generator))
            call, outputs = self.calls[number], self.outputs(number)
            count = batch_of(call)
            if count < 2 * HELD_OUT:
                if number < self._trained:
                    yield call, list(outputs)
                continue
            free = torch.tensor([i for i in range(count) if i % HELD_OUT])
            yield cut(call, outputs, free[torch.randperm(len(free), generator=generator)[:rows]], count)

    def held_out(self) -> Iterator[tuple[Call, list[Tensor]]]:
        """Yield what `batches` never has: samples of every few calls, or where calls have few samples the last ones.

        A single call of few samples is all there is, for both.
        """
        if batch_of(self.calls[0]) < 2 * HELD_OUT:
            for number in range(min(self._trained, len(self.calls) - 1), len(self.calls)):
                yield self.calls[number], list(self.outputs(number))
            return
        for number in range(0, len(self.calls), max(1, len(self.calls) // 8)):
            call = self.calls[number]
            count = batch_of(call)
            yield cut(call, self.outputs(number), torch.arange(0, count, HELD_OUT), count)

    @property
    def _trained(self) -> int:
        return max(1, len(self.calls) - max(1, len(self.calls) // HELD_OUT))


def batch_of(call: Call) -> int:
    """Return how many samples a call has: the length of its first tensor."""
    lead = next((v for v in (*call.args, *call.kwargs.values()) if isinstance(v, Tensor) and v.ndim), None)
    return 1 if lead is None else len(lead)


def cut(call: Call, outputs: Sequence[Tensor], keep: Tensor, count: int) -> tuple[Call, list[Tensor]]:
    """Return a call with some of its samples, and the outputs that belong to them."""
    smaller = Call(rows_of(call.args, keep, count), rows_of(call.kwargs, keep, count), call.bucket)
    return smaller, rows_of(list(outputs), keep, count)


def train(
    layers: Sequence[SoftLinear],
    run: Run,
    examples: Examples,
    training: Training,
    seed: int,
    progress: Callable[[int], object] = lambda steps: None,
) -> dict:
    """Train layers in place until every sub-vector has one codeword; returns what the report says of it.

    Of the codebooks' steps those are kept that had the least error on held-out samples.

    Args:
        layers: of the part that is run.
        run: makes a call of that part and returns its tensors.
        examples: what to train on.
        training: steps and rates.
        seed: of the choice of samples.
        progress: told how many steps were made.
    """
    choosing = [layer for layer in layers if layer.is_open]
    until = round(training.steps * ASSIGNMENT_PART) if choosing else 0
    batches = examples.batches(training.rows, torch.Generator().manual_seed(seed))
    tables, rates = _tables(layers, training)
    optimizer, together = _optimizer(tables, rates, training), training.optimizer == "rmsprop"

    def step_on(optimizers: Sequence[torch.optim.Optimizer], spread: Tensor | float = 0.0) -> None:
        loss = _error(run, *next(batches))
        loss = loss + float(loss.detach()) * spread
        for each in optimizers:
            each.zero_grad()
        loss.backward()
        for each in optimizers:
            each.step()
        progress(1)

    report = {}
    if choosing:
        soft, least = [layer.logits for layer in choosing], math.inf
        logits = torch.optim.RMSprop(soft, lr=training.logit_rate, alpha=0.9)
        for step in range(until):
            ratios = [z.softmax(dim=0) for z in soft]
            spread = sum((r * (1 - r)).mean() * len(r) for r in ratios) / len(soft)
            if training.gated:
                pull = training.regulariser if float(spread.detach()) > least else 0.0
                least = min(least, float(spread.detach()))
            else:
                pull = training.regulariser * (step / until) ** 2
            step_on([logits, optimizer] if together else [logits], pull * spread)
            frozen = [layer.freeze() for layer in choosing]
        report["frozen"] = round(sum(frozen) / len(frozen), 4) if until else 0.0
        for layer in choosing:
            layer.freeze(0.0)
            layer.logits.requires_grad_(False)
        if not together:  # else tables have followed the ratios, and other codes would not fit them
            report |= _keep_if_better(choosing, run, examples)
    best = held_out_error(run, examples), [p.detach().clone() for p in tables]
    report["held_out_assigned"] = best[0]
    left, checks, made = training.steps - until, 0, 0
    for step in range(left):
        if not together:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - step / left)
        step_on([optimizer])
        if (step + 1) % max(1, left // CHECKS) == 0:
            made, now, checks = step + 1, held_out_error(run, examples), checks + 1
            if now < best[0]:
                best, checks = (now, [p.detach().clone() for p in tables]), 0
            if checks == PATIENCE:
                progress(left - step - 1)
                break
    with torch.no_grad():
        for p, kept in zip(tables, best[1], strict=True):
            p.copy_(kept)
    return report | {"held_out": best[0], "codebook_steps": made}


def _tables(layers: Sequence[SoftLinear], training: Training) -> tuple[list[Tensor], list[float]]:
    """Return what is trained besides logits, and the learning rate of each.

    `rmsprop` has one rate in units of weights; codebooks are in units of their channels' scales, which then stay as they are.
    """
    if training.optimizer == "rmsprop":
        coded = [layer for layer in layers if layer.codebook is not None]
        parts = [(layer.codebook, 1 / float(layer.scale.detach().mean().clamp_min(1e-30))) for layer in coded]
        parts += [(layer.output, 1.0) for layer in layers if layer.output is not None]
    else:
        tables = [p for layer in layers for p in (layer.codebook, layer.scale, layer.output) if p is not None]
        parts = [(p, float(p.detach().square().mean().sqrt().clamp_min(1e-3))) for p in tables]
    return [p for p, _ in parts], [training.codebook_rate * size for _, size in parts]


def _optimizer(tables: Sequence[Tensor], rates: Sequence[float], training: Training) -> torch.optim.Optimizer:
    groups = [{"params": [p], "lr": rate} for p, rate in zip(tables, rates, strict=True)]
    if training.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, alpha=0.9)
    return torch.optim.Adam(groups, betas=(0.9, 0.99))


@torch.no_grad()
def _keep_if_better(layers: Sequence[SoftLinear], run: Run, examples: Examples) -> dict:
    """Go back to the codes that the layers had where those that were found are no better on held-out samples."""
    found = [layer.logits.clone() for layer in layers]
    after = held_out_error(run, examples)
    for layer in layers:
        layer.logits.fill_(-CERTAIN)
        layer.logits[0] = CERTAIN
    before = held_out_error(run, examples)
    if after < before:
        for layer, logits in zip(layers, found, strict=True):
            layer.logits.copy_(logits)
    return {"held_out_found": after, "held_out_had": before, "assignments_kept": after < before}


def held_out_error(run: Run, examples: Examples) -> float:
    """Return the root of the mean relative squared error on samples that training never has."""
    with torch.no_grad():
        found = [float(_error(run, *pair)) for pair in examples.held_out()]
    return (sum(found) / len(found)) ** 0.5


def _error(run: Run, call: Call, expected: Sequence[Tensor]) -> Tensor:
    found = [relative(got, wanted) for got, wanted in zip(run(call), expected, strict=True)]
    return sum(found) / len(found)


def relative(got: Tensor, wanted: Tensor) -> Tensor:
    """Return the squared error relative to what was wanted."""
    return (got.float() - wanted.float()).square().sum() / wanted.float().square().sum().clamp_min(1e-30)
