"""`Job`: one model that is being compiled, and what with; `Segment`: the part of it that is worked on at once."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from quantdit.calibration.data_free import unit_seed
from quantdit.calibration.observe.recorded_calls import StoredCalls
from quantdit.checkpoints.streaming import Stream
from quantdit.compiling.plan import Plan

OUTSIDE = "outside"


@dataclass(frozen=True)
class Job:
    """What a run works on and with.

    Attributes:
        model: the transformer or text encoder, its finished blocks quantized.
        blocks: paths of its blocks.
        calls: its recorded calls; none if nothing was captured.
        plan: of the whole run.
        folder: of the work on this model.
        stream: reads blocks that are not in memory; None if all are.
        run: names the run; what another one left in the folder is refused.
        seconds: spent so far, by stage.
    """

    model: nn.Module
    blocks: tuple[str, ...]
    calls: StoredCalls
    plan: Plan
    folder: Path
    stream: Stream | None = None
    run: str = ""
    seconds: Counter[str] = field(default_factory=Counter)

    def seed_of(self, segment: Segment) -> int:
        """Return the seed of a segment."""
        return unit_seed(self.plan.sampling.seed, segment.number)

    def loaded(self, path: str) -> AbstractContextManager[object]:
        """Have a part of the model in memory."""
        return self.stream.loaded(path) if self.stream is not None else nullcontext()

    def following(self) -> AbstractContextManager[object]:
        """Have each block in memory while it runs."""
        return self.stream.following(self.blocks) if self.stream is not None else nullcontext()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the seconds of the body."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - began  # pyright: ignore[reportArgumentType] - counters take floats too


@dataclass(frozen=True)
class Segment:
    """What is quantized at once: a block, or everything outside the blocks.

    Attributes:
        path: of the block, or OUTSIDE.
        number: in running order; what is outside comes last.
        names: of the layers in it that are to be quantized.
        run: the module that is called.
        calls: its calls; None if the block is finished and so is the next one's input.
    """

    path: str
    number: int
    names: tuple[str, ...]
    run: nn.Module
    calls: StoredCalls | None

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """Return its linears; their names are paths in the transformer."""
        inside = len(self.path) + 1 if self.path != OUTSIDE else 0
        return {name: linear_of(self.run, name[inside:]) for name in self.names if name not in self.tables}

    @property
    def tables(self) -> dict[str, nn.Embedding]:
        """Return its tables of words."""
        inside = len(self.path) + 1 if self.path != OUTSIDE else 0
        found = ((name, self.run.get_submodule(name[inside:])) for name in self.names)
        return {name: module for name, module in found if isinstance(module, nn.Embedding)}


def linear_of(module: nn.Module, path: str) -> nn.Linear:
    """Return a linear in full precision by its path."""
    linear = module.get_submodule(path)
    assert isinstance(linear, nn.Linear), path
    return linear
