"""Fine-tuning: which codeword each sub-vector gets, and codebooks, scales and biases, trained on the outputs of blocks.

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
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantdit.calibration.layer import Quantized
from quantdit.calibration.observe import block_order, capture
from quantdit.calibration.observe import recorded_calls as call_files
from quantdit.calibration.observe.recorded_calls import Call, rows_of
from quantdit.calibration.observe.sensitivity import replaced
from quantdit.calibration.stats import Stats
from quantdit.compiling.block_inputs import call_name
from quantdit.compiling.job import OUTSIDE, Job, Segment
from quantdit.compiling.soft_linear import CERTAIN, SoftLinear, bytes_of, is_trainable, soft_linear
from quantdit.layers.quant_linear import QuantLinear
from quantdit.recipes.finetuning import FineTuning
from quantdit.system import progress
from quantdit.system.threads import one_thread

ASSIGNMENT_PART = 0.6  # of the steps; the rest is the codebooks'
CHECKS = 10  # of the held-out error while codebooks are trained
PATIENCE = 3  # checks without a gain, after which they are as good as they get
HELD_OUT = 8  # one in so many samples is held out

Run = Callable[[Call], Sequence[Tensor]]  # makes a call and returns its tensors


@one_thread()
def finetuned(
    job: Job, finetuning: FineTuning, segment: Segment, made: Mapping[str, Quantized], stats: Mapping[str, Stats]
) -> dict[str, Quantized]:
    """Return a segment's layers trained on the outputs of its block, or of all blocks; as they were, if that does not help.

    Args:
        job: the run.
        finetuning: how.
        segment: whose linears are in full precision still.
        made: its layers quantized.
        stats: of their inputs.
    """
    groups = parts({name: layer for name, layer in made.items() if name in stats}, finetuning)
    if not groups:
        return dict(made)
    folder = job.folder / "wanted"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    calls, linears = segment.calls, segment.linears
    assert calls is not None, "a finished block is not trained again"
    paths = job.blocks if segment.path == OUTSIDE else (segment.path,)

    def run(call: Call) -> list[Tensor]:
        with block_order.outputs_at(job.model, paths) as outputs:
            capture.set_bucket(segment.run, call.bucket)
            segment.run(*call.args, **call.kwargs)
        return [v for path in paths for v in outputs[path] if v is not None]

    with torch.no_grad():
        for i, call in enumerate(calls):
            call_files.save_outputs(folder / call_name(i), run(call))
    examples = Examples(calls, lambda number: tensors_of(call_files.load_outputs(folder / call_name(number))))
    made = dict(made)
    full = {name: (linears[name].weight, linears[name].bias, stats[name]) for names in groups for name in names}
    with progress.bar(finetuning.steps * len(groups), "train", "step", leave=False) as bar:
        for names in groups:
            before = {name: made[name] for name in names}
            with replaced(job.model, _hard(made)):
                made |= _trained(job, finetuning, before, full, run, examples, job.seed_of(segment), bar.update)
    shutil.rmtree(folder)
    return made


def tensors_of(outputs: Sequence[Tensor | None]) -> list[Tensor]:
    """Return outputs that are tensors."""
    return [v for v in outputs if v is not None]


def _trained(
    job: Job,
    finetuning: FineTuning,
    made: Mapping[str, Quantized],
    full: Mapping[str, tuple[Tensor, Tensor | None, Stats]],
    run: Run,
    examples: Examples,
    seed: int,
    progress: Callable[[int], object],
) -> dict[str, Quantized]:
    """Return the layers trained at once, all others as the transformer has them; as they were, if that does not help.

    `full` has their weights and biases in full precision, and statistics.
    """
    before = held_out_error(run, examples)
    soft = {name: soft_linear(layer, *full[name], finetuning) for name, layer in made.items()}
    with replaced(job.model, soft), torch.enable_grad():
        report = train(list(soft.values()), run, examples, finetuning, seed, progress)
    found = {name: layer.decided(made[name], *full[name]) for name, layer in soft.items()}
    with replaced(job.model, _hard(found)):
        after = held_out_error(run, examples)
    size = sum(bytes_of(layer, finetuning) for layer in made.values())
    report |= {"held_out_before": before, "held_out": after, "helped": after < before, "layers": len(made), "bytes": size}
    kept = found if after < before else made
    return {name: replace(layer, report=layer.report | {"assignments": report}) for name, layer in kept.items()}


def _hard(made: Mapping[str, Quantized]) -> dict[str, QuantLinear]:
    return {name: QuantLinear.from_tensors(layer.spec, layer.tensors, layer.bias) for name, layer in made.items()}


def parts(made: Mapping[str, Quantized], finetuning: FineTuning) -> list[tuple[str, ...]]:
    """Return the names of the layers that can be trained, in order, cut into parts that training has memory for."""
    found: list[tuple[str, ...]] = []
    room = 0
    for name in (name for name, layer in made.items() if is_trainable(layer)):
        needed = bytes_of(made[name], finetuning)
        if not found or needed > room:
            found, room = [*found, ()], finetuning.memory
        found[-1] += (name,)
        room -= needed
    return found


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
    finetuning: FineTuning,
    seed: int,
    progress: Callable[[int], object] = lambda steps: None,
) -> dict:
    """Train layers in place until every sub-vector has one codeword; returns what the report says of it.

    Of the codebooks' steps those are kept that had the least error on held-out samples.

    Args:
        layers: of the part that is run.
        run: makes a call of that part and returns its tensors.
        examples: what to train on.
        finetuning: steps and rates.
        seed: of the choice of samples.
        progress: told how many steps were made.
    """
    choosing = [layer for layer in layers if layer.is_open]
    until = round(finetuning.steps * ASSIGNMENT_PART) if choosing else 0
    batches = examples.batches(finetuning.rows, torch.Generator().manual_seed(seed))
    tables, rates = _tables(layers, finetuning)
    optimizer, together = _optimizer(tables, rates, finetuning), finetuning.optimizer == "rmsprop"

    def step_on(optimizers: Sequence[torch.optim.Optimizer], spread: Tensor | float = 0.0) -> None:
        loss = _error(run, *next(batches))
        loss = loss + float(loss.detach()) * spread
        for each in optimizers:
            each.zero_grad()
        loss.backward()
        for each in optimizers:
            each.step()
        progress(1)

    def step_on_tables(part: float) -> None:
        if not together:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * part
        step_on([optimizer])

    report = {}
    if choosing:
        soft = [layer.logits for layer in choosing if layer.logits is not None]
        logits = torch.optim.RMSprop(soft, lr=finetuning.logit_rate, alpha=0.9)
        moved = [logits, optimizer] if together else [logits]
        report["frozen"] = _choose(choosing, soft, finetuning, until, lambda spread: step_on(moved, spread))
        if not together:  # else tables have followed the ratios, and other codes would not fit them
            report |= _keep_if_better(choosing, run, examples)
    report["held_out_assigned"] = held_out_error(run, examples)
    left = finetuning.steps - until
    best, made = _fit(tables, left, report["held_out_assigned"], step_on_tables, lambda: held_out_error(run, examples))
    progress(left - made)
    return report | {"held_out": best, "codebook_steps": made - made % max(1, left // CHECKS)}


def _choose(
    layers: Sequence[SoftLinear],
    soft: Sequence[Tensor],
    finetuning: FineTuning,
    steps: int,
    step_on: Callable[[Tensor], None],
) -> float:
    """Train the logits `soft` of layers until each sub-vector has one codeword; returns the part that froze on the way."""
    least, frozen = math.inf, [0.0]
    for step in range(steps):
        ratios = [z.softmax(dim=0) for z in soft]
        spreads = [(r * (1 - r)).mean() * len(r) for r in ratios]
        spread = sum(spreads[1:], spreads[0]) / len(soft)
        if finetuning.gated:
            pull = finetuning.regulariser if float(spread.detach()) > least else 0.0
            least = min(least, float(spread.detach()))
        else:
            pull = finetuning.regulariser * (step / steps) ** 2
        step_on(pull * spread)
        frozen = [layer.freeze() for layer in layers]
    for layer, logits in zip(layers, soft, strict=True):
        layer.freeze(0.0)
        logits.requires_grad_(False)
    return round(sum(frozen) / len(frozen), 4)


def _fit(
    tables: Sequence[Tensor], steps: int, error: float, step_on: Callable[[float], None], held_out: Callable[[], float]
) -> tuple[float, int]:
    """Train tables in place, at rates that fall from 1 to 0, and keep what had the least held-out error.

    Args:
        tables: codebooks, scales and mean outputs.
        steps: at most; PATIENCE checks without a gain end it.
        error: held out, of the tables as they are.
        step_on: makes a step at a part of the rates.
        held_out: returns the error on samples that training never has.

    Returns:
        The least error, and how many steps were made.
    """
    best, kept, checks = error, [p.detach().clone() for p in tables], 0
    made = 0
    for step in range(steps):
        step_on(1 - step / steps)
        made = step + 1
        if made % max(1, steps // CHECKS) == 0:
            now, checks = held_out(), checks + 1
            if now < best:
                best, kept, checks = now, [p.detach().clone() for p in tables], 0
            if checks == PATIENCE:
                break
    with torch.no_grad():
        for p, value in zip(tables, kept, strict=True):
            p.copy_(value)
    return best, made


def _tables(layers: Sequence[SoftLinear], finetuning: FineTuning) -> tuple[list[Tensor], list[float]]:
    """Return what is trained besides logits, and the learning rate of each.

    `rmsprop` has one rate in units of weights; codebooks are in units of their channels' scales, which then stay as they are.
    """
    if finetuning.optimizer == "rmsprop":
        parts = [
            (layer.codebook, 1 / float(layer.scale.detach().mean().clamp_min(1e-30)))
            for layer in layers
            if layer.codebook is not None
        ]
        parts += [(layer.level, 1.0) for layer in layers if layer.level is not None]
    else:
        tables = [p for layer in layers for p in (layer.codebook, layer.gain, layer.level) if p is not None]
        parts = [(p, float(p.detach().square().mean().sqrt().clamp_min(1e-3))) for p in tables]
    return [p for p, _ in parts], [finetuning.codebook_rate * size for _, size in parts]


def _optimizer(tables: Sequence[Tensor], rates: Sequence[float], finetuning: FineTuning) -> torch.optim.Optimizer:
    groups = [{"params": [p], "lr": rate} for p, rate in zip(tables, rates, strict=True)]
    if finetuning.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, alpha=0.9)
    return torch.optim.Adam(groups, betas=(0.9, 0.99))


@torch.no_grad()
def _keep_if_better(layers: Sequence[SoftLinear], run: Run, examples: Examples) -> dict:
    """Go back to the codes that the layers had where those that were found are no better on held-out samples."""
    soft = [layer.logits for layer in layers if layer.logits is not None]
    found = [logits.clone() for logits in soft]
    after = held_out_error(run, examples)
    for logits in soft:
        logits.fill_(-CERTAIN)
        logits[0] = CERTAIN
    before = held_out_error(run, examples)
    if after < before:
        for logits, better in zip(soft, found, strict=True):
            logits.copy_(better)
    return {"held_out_found": after, "held_out_had": before, "assignments_kept": after < before}


def held_out_error(run: Run, examples: Examples) -> float:
    """Return the root of the mean relative squared error on samples that training never has."""
    with torch.no_grad():
        found = [float(_error(run, *pair)) for pair in examples.held_out()]
    return (sum(found) / len(found)) ** 0.5


def _error(run: Run, call: Call, expected: Sequence[Tensor]) -> Tensor:
    found = [relative(got, wanted) for got, wanted in zip(run(call), expected, strict=True)]
    return sum(found[1:], found[0]) / len(found)


def relative(got: Tensor, wanted: Tensor) -> Tensor:
    """Return the squared error relative to what was wanted."""
    return (got.float() - wanted.float()).square().sum() / wanted.float().square().sum().clamp_min(1e-30)
