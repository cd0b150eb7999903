"""Tables of aligned columns for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

LEAST = 16  # characters that are left of a name


class Column(NamedTuple):
    """A column of a table: its title, and whether its cells are numbers, which end below each other."""

    title: str
    is_number: bool = True


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Return aligned lines, whose first cells are names.

    Where they would be too wide, names lose their beginnings. Where that leaves too little of them, or two of them alike, each
    name has a line of its own. Nothing else is cut, but wrapped.
    """
    titles = [column.title for column in columns]
    widths = [max(map(len, cells)) for cells in zip(titles, *rows, strict=True)]
    names = [titles[0], *(row[0] for row in rows)]
    room = width - sum(widths[1:]) - 2 * (len(widths) - 1)
    short = [_end(name, room) for name in names]
    lines = []
    for name, cells in zip(short, (titles, *rows), strict=True):
        pairs = zip(cells[1:], widths[1:], columns[1:], strict=True)
        rest = "  ".join(c.rjust(w) if column.is_number else c.ljust(w) for c, w, column in pairs).rstrip()
        lines.append((name.ljust(min(room, widths[0])), rest))
    if room >= min(widths[0], LEAST) and len(set(short)) == len(set(names)):
        return [f"{name}  {rest}".rstrip() for name, rest in lines]
    return [line for name, (_, rest) in zip(names, lines, strict=True) for line in (_end(name, width), *_under(rest, width))]


def wrapped(lines: Iterable[str], width: int) -> list[str]:
    return [part for line in lines for part in (textwrap.wrap(line, width, subsequent_indent="  ") or [""])]


def _end(name: str, room: int) -> str:
    """Return a name, or as much of its end as there is room for: the ends tell layers apart."""
    return name if len(name) <= room else f"…{name[len(name) - max(room - 1, 0) :]}"


def _under(rest: str, width: int) -> list[str]:
    return textwrap.wrap(f"    {rest}", width, subsequent_indent=" " * 8)
