"""Functions that treat each row alike, run on some rows at a time: what they need besides their result is bounded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 2**22  # numbers at once; float32 copies of them take 16 MiB each


def largest_chunk(rows: int, width: int) -> int:
    """Return how many of `[rows, width]` numbers a function runs on at once: CHUNK at most, and one row at least."""
    return -(-rows // _calls(rows, width)) * width


def in_row_chunks(
    function: Callable[..., tuple[Tensor, ...]], x: Tensor, *beside: Tensor | None, width: int = 0
) -> tuple[Tensor, ...]:
    """Return `function(x, *beside)` for x `[m, ..., k]`, its results `[m, ...]`, of calls with about equally many rows.

    Equally many, for a matrix product of a few rows takes another routine, with other last bits. Under a compiler, and where
    gradients are wanted, it is one call.

    Args:
        function: of rows of x, and of the same rows of the others.
        x: what is split.
        beside: `[m, ...]`, split alike; None stays None.
        width: numbers that a row counts as; 0: those of x.
    """
    # Asked first: a graph must not depend on how many rows there are.
    if torch.compiler.is_compiling() or x.dim() < 2 or (torch.is_grad_enabled() and x.requires_grad):
        return function(x, *beside)
    if (count := _calls(len(x), width or x[:1].numel())) == 1:
        return function(x, *beside)
    made, start = (), 0
    for rows in x.tensor_split(count):
        these = slice(start, start + len(rows))
        made = _written(made, len(x), these, function(rows, *(None if t is None else t[these] for t in beside)))
        start += len(rows)
    return made


def _written(made: tuple[Tensor, ...], count: int, rows: slice, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the results with those of some rows, which nothing refers to any more when the next are computed."""
    made = made or tuple(t.new_empty(count, *t.shape[1:]) for t in found)
    for whole, part in zip(made, found, strict=True):
        whole[rows] = part
    return made


def _calls(rows: int, width: int) -> int:
    return max(1, min(rows, -(-rows * width // CHUNK)))
