"""One thread for arithmetic whose bytes must not depend on the machine.

A Cholesky factor differs between one thread and two, and so does, on some processors, a linear of four rows. A layer's matrices
are small enough that several threads gain little, and on a busy machine they lose much.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import _GeneratorContextManager, contextmanager
from contextvars import ContextVar

import torch

_ALLOWED: ContextVar[int] = ContextVar("allowed")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Have torch compute with so many threads while the body runs, or the function that this decorates."""
    before = torch.get_num_threads()
    token = _ALLOWED.set(allowed())
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _ALLOWED.reset(token)


def one_thread() -> _GeneratorContextManager[None]:
    """Have torch compute with one thread while the body runs, or the function that this decorates."""
    return threads(1)


def allowed() -> int:
    """Return the number of threads for work whose result does not depend on it; in `threads`, the number set before it."""
    return _ALLOWED.get(torch.get_num_threads())
