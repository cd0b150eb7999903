"""Tables of aligned columns for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

LEAST = 16  # characters of a last column that may be cut


class Column(NamedTuple):
    """A column of a table: its title, and whether its cells are numbers, which end below each other."""

    title: str
    is_number: bool = True


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Return aligned lines; where they would be too wide, the first cell of each has a line of its own, and the last is cut."""
    widths = [max(len(column.title), *(len(row[i]) for row in rows), 0) for i, column in enumerate(columns)]

    def aligned(cells: Sequence[str], first: int) -> str:
        pairs = zip(cells[first:], widths[first:], columns[first:], strict=True)
        return "  ".join(c.rjust(w) if column.is_number else c.ljust(w) for c, w, column in pairs).rstrip()

    titles = [column.title for column in columns]
    if sum(widths[:-1]) + 2 * (len(widths) - 1) + min(widths[-1], LEAST) <= width:
        return [_cut(aligned(cells, 0), width) for cells in (titles, *rows)]
    return [line for cells in (titles, *rows) for line in (cells[0], _cut("    " + aligned(cells, 1), width))]


def wrapped(lines: Iterable[str], width: int) -> list[str]:
    return [part for line in lines for part in (textwrap.wrap(line, width, subsequent_indent="  ") or [""])]


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else f"{line[: width - 1]}…"
