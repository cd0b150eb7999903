"""What the command line prints: to readers that may leave early, and advice as lines of ours."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Forgiving(io.TextIOBase):
    """A stream whose reader may leave."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            discard(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            discard(self._stream)

    def isatty(self) -> bool:
        return self._stream.isatty()


def discard(stream: TextIO) -> None:
    """Let what is still to be written to a stream go nowhere, so that Python does not complain when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def advice_as_lines() -> Iterator[None]:
    """Print each advice once, as a line of ours that leaves progress bars whole."""
    given: set[str] = set()
    show = warnings.showwarning

    def print_once(message: Warning | str, category: type[Warning], *where: Any) -> None:
        from tqdm import tqdm

        from quantdit.system.files import Advice

        if not issubclass(category, Advice):
            show(message, category, *where)
        elif str(message) not in given:
            given.add(str(message))
            tqdm.write(f"quantdit: note: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = print_once
        yield
