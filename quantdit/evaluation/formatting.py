"""Numbers and tables as text: what report.md, the gate's summary and the page share."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence


def number(value: float, unit: str = "") -> str:
    """Return a number as people read it: four digits of small ones, two places of others; just below 1, what it lacks of it."""
    value = 0.0 if abs(value) < 1e-9 else value  # rounding; nor "-0"
    lack = 1 - value
    if 0 < lack < 0.001:
        text = f"{value:.{min(9, 1 - math.floor(math.log10(lack)))}f}"
    else:
        text = f"{value:.4g}" if abs(value) < 1 else f"{value:.2f}"
    return f"{text} {unit}".rstrip()


def escaped(text: str) -> str:
    """Return text that is not ours as a line of Markdown: no table cell, code, link, emphasis or HTML begins or ends in it."""
    line = " ".join(text.split())
    line = line.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([|`*]|(?<=\])\()", r"\\\1", line)


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, cells escaped and columns padded; the first row is its head."""
    rows = [[escaped(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return lines
