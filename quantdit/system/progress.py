"""Progress on stderr: bars on a terminal, elsewhere (`2> log`) a line now and then."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from tqdm import tqdm

SECONDS = 10  # between two lines of a bar where stderr is no terminal
LINE = "{desc}: {n_fmt}/{total_fmt} {unit}s, {elapsed} so far, {remaining} left"


def bar(total: int, description: str, unit: str, leave: bool = True) -> tqdm:
    """Return a tqdm bar to use in a `with`; `update(1)` moves it.

    Where stderr is no terminal it is lines: one when it begins, one at most every SECONDS, one at the end if there were such.

    Args:
        total: what it counts up to.
        description: what is being done.
        unit: of what is counted, in the singular.
        leave: it stays on the screen when it is done; of one that does not, the first and the last line are left out.
    """
    made = partial(tqdm, total=total, desc=description, unit=unit, leave=leave)
    if sys.stderr is None or sys.stderr.isatty():
        return made(disable=sys.stderr is None, dynamic_ncols=True)
    if leave:
        say(f"{description}: {total} {unit}{'s' if total != 1 else ''}")
    # The delay has tqdm draw nothing before the first SECONDS are over, and nothing at the end if it ends before.
    return made(file=_Lines(), mininterval=SECONDS, miniters=1, delay=SECONDS, ascii=True, bar_format=LINE)


class _Lines(io.TextIOBase):
    """A stream for a bar to draw on: each drawing that shows more done is a line of ours."""

    _done = ""

    def write(self, text: str) -> int:
        done = text.strip().rsplit(",", 2)[0]
        if done and done != self._done:
            self._done = done
            say(text.strip())
        return len(text)


def say(text: str) -> None:
    """Print a line of ours on stderr that leaves bars whole."""
    tqdm.write(f"quantdit: {text}", file=sys.stderr)


@contextmanager
def alone() -> Iterator[None]:
    """Leave the terminal to our own bars: diffusers shows none meanwhile, and then as before."""
    from diffusers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


@contextmanager
def denoising(pipeline: Any, batches: int, steps: int, description: str) -> Iterator[Callable[[], None]]:
    """Show a bar that ticks with each denoising step of a pipeline; yields a function to call after each batch.

    The pipeline's own bar, replaced meanwhile, moves ours. The function moves the bar to the end of the batch, because a
    scheduler may take more or fewer steps than it was asked for.

    Args:
        pipeline: is called once for each batch while the body runs.
        batches: how many.
        steps: denoising steps of each.
        description: what is being done.
    """
    with bar(batches * steps, description, "step") as shown:
        done = 0

        def tick(count: float = 1) -> None:
            shown.update(min(count, (done + 1) * steps - shown.n))

        def batch_done() -> None:
            nonlocal done
            done += 1
            shown.update(done * steps - shown.n)

        attributes = vars(pipeline)
        before = attributes.get("progress_bar")  # of whoever called us, or of an outer `denoising`
        pipeline.progress_bar = lambda iterable=None, total=None: _Relay(iterable, total, tick)
        try:
            yield batch_done
        finally:
            if before is None:
                del attributes["progress_bar"]
            else:
                attributes["progress_bar"] = before


class _Relay(tqdm):
    """Stands for a pipeline's own bar: shows nothing, and passes each step on."""

    def __init__(self, iterable: Iterable | None, total: int | None, tick: Callable[[float], object]) -> None:
        super().__init__(iterable, total=total, disable=True)
        self._tick = tick

    def __iter__(self) -> Iterator:
        for item in self.iterable:
            yield item
            self._tick(1)

    def update(self, n: float | None = 1) -> None:
        self._tick(1 if n is None else n)
