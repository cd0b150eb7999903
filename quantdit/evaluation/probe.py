"""Errors of a quantized transformer on the very inputs of the original: of its output, and of each of its linears alone.

The trajectories of two models diverge: a small early error changes everything after it, and its size and place are lost. A probe
samples from the reference alone and gives the candidate the same inputs at a few steps. Errors then do not accumulate and depend
little on the noise, so that a probe needs fewer samples than any other measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quantdit.models.call_view import view
from quantdit.models.prediction import prediction_of

STEPS = 4  # of a trajectory that are looked at, evenly spread


@dataclass(frozen=True)
class Probe:
    """Squared errors of a candidate on a reference's inputs, and the squared outputs they are relative to.

    Attributes:
        timesteps: of the steps that were looked at, from the noisiest.
        output: `[samples, timesteps, 2]` float64: |y - y0|^2 and |y0|^2 of the transformer's output.
        layers: of each linear that both models have, but for equal ones, `[samples, 2]` float64: |y - y0|^2 and
            |y0 - bias|^2, all steps added.
    """

    timesteps: tuple[float, ...]
    output: Tensor
    layers: dict[str, Tensor]


@dataclass
class _Sums:
    """What is added up for one batch of samples."""

    batch: int
    output: dict[float, Tensor] = field(default_factory=dict)
    layers: dict[str, Tensor] = field(default_factory=dict)
    looking: float | None = None  # the timestep that is compared now; None between such steps
    seen: dict[float, None] = field(default_factory=dict)
    asking: bool = False  # the candidate runs; it may be the reference itself, whose hooks must then do nothing

    def ask(self, module: nn.Module, *args: object, **kwargs: object) -> object:
        """Run a part of the candidate."""
        self.asking = True
        try:
            return module(*args, **kwargs)
        finally:
            self.asking = False

    def pair(self, reference: Tensor, candidate: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `[batch, 2]`. Rows of a call are one or more of each sample, as guidance has it: cond and uncond, in turns."""
        error = (candidate.double() - reference.double()).square()
        power = (reference.double() if bias is None else reference.double() - bias.double()).square()
        return torch.stack([self.by_sample(error), self.by_sample(power)], -1).cpu()

    def by_sample(self, squares: Tensor) -> Tensor:
        """Return `[batch]`; where rows belong to no sample (a timestep that all share), each gets an equal part."""
        if len(squares) % self.batch:
            return (squares.sum() / self.batch).expand(self.batch)
        return squares.reshape(len(squares) // self.batch, self.batch, -1).sum((0, 2))


def probe(
    reference: Mapping[str, nn.Module],
    candidate: Mapping[str, nn.Module],
    batches: Iterable[tuple[int, dict]],
    sample: Callable[[dict], object],
    steps: int,
    looked_at: int = STEPS,
) -> Probe:
    """Sample from the reference, and compare the candidate's transformers with its own on what they are called with.

    Args:
        reference: its transformers by the names of `components.TRANSFORMER_NAMES`; `sample` is to call them.
        candidate: those to compare, by the same names.
        batches: number of samples, and what `sample` takes, of each batch.
        sample: runs the reference's pipeline.
        steps: sampling steps.
        looked_at: how many of them are compared.
    """
    chosen = evenly(range(steps), looked_at)
    outputs: list[Tensor] = []
    layers: list[dict[str, Tensor]] = []
    times: tuple[float, ...] = ()
    for count, arguments in batches:
        sums = _Sums(count)
        with torch.no_grad(), _watched(reference, candidate, sums, chosen):
            sample(arguments)
        times = tuple(sums.output)
        outputs.append(torch.stack(list(sums.output.values()), 1))
        layers.append(sums.layers)
    names = [name for name in layers[0] if all(name in part for part in layers)]
    return Probe(times, torch.cat(outputs), {name: torch.cat([part[name] for part in layers]) for name in names})


def evenly(values: Sequence, count: int) -> list:
    """Return `count` of the values, evenly spread, the first and the last among them; all if there are no more."""
    if count >= len(values):
        return list(values)
    return [values[round(i * (len(values) - 1) / max(1, count - 1))] for i in range(count)]


def _same(a: nn.Module, b: nn.Module) -> bool:
    """Return whether both are plain linears of equal numbers; their outputs may still differ, by where these lie in memory."""
    if not (type(a) is nn.Linear and type(b) is nn.Linear):
        return False
    pairs = [(a.weight, b.weight), (a.bias, b.bias)]
    return all(x is y or (x is not None and y is not None and x.dtype == y.dtype and torch.equal(x, y)) for x, y in pairs)


def _tensor_of(output: object) -> Tensor:
    found = prediction_of(output)
    assert found is not None, "a transformer and a linear return tensors"
    return found


@contextmanager
def _watched(reference: Mapping[str, nn.Module], candidate: Mapping[str, nn.Module], sums: _Sums, chosen: list) -> Iterator[None]:
    handles: list[RemovableHandle] = []
    for part, transformer in reference.items():
        handles += _watch_output(transformer, candidate[part], sums, chosen)
        handles += _watch_layers(transformer, candidate[part], sums, "" if part == "transformer" else f"{part}.")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch_output(transformer: nn.Module, candidate: nn.Module, sums: _Sums, chosen: list) -> list[RemovableHandle]:
    """Add up the errors of the candidate's output at the chosen steps."""
    answers: list[Tensor] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if sums.asking:
            return
        time = view(module, args, kwargs).time
        timestep = float(len(sums.seen)) if time is None else time
        sums.seen.setdefault(timestep)
        sums.looking = timestep if list(sums.seen).index(timestep) in chosen else None
        if sums.looking is not None:  # first the candidate: its layers with static scales then know the timestep
            answers.append(_tensor_of(sums.ask(candidate, *args, **kwargs)))

    def after(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if sums.looking is not None and not sums.asking:
            pair = sums.pair(_tensor_of(output), answers.pop())
            sums.output[sums.looking] = sums.output.get(sums.looking, 0) + pair
            sums.looking = None

    return [
        transformer.register_forward_pre_hook(before, with_kwargs=True),
        transformer.register_forward_hook(after, with_kwargs=True),
    ]


def _watch_layers(transformer: nn.Module, candidate: nn.Module, sums: _Sums, prefix: str) -> list[RemovableHandle]:
    """Add up the errors of each linear that differs in the candidate, and of its modules of 8-bit attention, linears included.

    All are asked on the reference's own inputs.
    """
    theirs = dict(candidate.named_modules())
    attention = getattr(candidate, "attention_specs", {})

    def hook(name: str) -> Callable[[nn.Module, tuple, dict, object], None]:
        def compare(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            if sums.looking is not None and not sums.asking:
                bias = module.bias if isinstance(module, nn.Linear) else None
                pair = sums.pair(_tensor_of(output), _tensor_of(sums.ask(theirs[name], *args, **kwargs)), bias)
                sums.layers[prefix + name] = sums.layers.get(prefix + name, 0) + pair

        return compare

    differ = (
        (name, module)
        for name, module in transformer.named_modules()
        if name in attention or (isinstance(module, nn.Linear) and name in theirs and not _same(module, theirs[name]))
    )
    return [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in differ]
