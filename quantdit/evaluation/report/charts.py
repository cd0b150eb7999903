"""Small charts as inline SVG, coloured by the classes of page.html's style sheet so that they follow light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

WIDTH, HEIGHT = 720, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 34
TICKS = 5


def line_chart(title: str, x: Sequence[float], series: Mapping[str, Sequence[float]], x_label: str, y_label: str) -> str:
    """Return lines over x, which is drawn from left to right in the order given, at even distances."""
    values = [v for line in series.values() for v in line if math.isfinite(v)]
    if not values:
        return ""
    ticks = ticks_of(min(values), max(values))
    across, up = _places(len(x)), _scale(ticks)
    parts = [_frame(ticks, up, y_label)]
    shown = sorted({round(i * (len(x) - 1) / min(8, max(1, len(x) - 1))) for i in range(min(8, max(1, len(x) - 1)) + 1)})
    parts += [_text(across[i], HEIGHT - BOTTOM + 14, f"{x[i]:.4g}", "middle") for i in shown]
    parts.append(_text((WIDTH + LEFT) / 2, HEIGHT - 4, x_label, "middle"))
    for number, (name, line) in enumerate(series.items()):
        points = " ".join(f"{a:.1f},{up(v):.1f}" for a, v in zip(across, line, strict=True))
        parts.append(f'<polyline class="line s{number}" points="{points}"/>')
        parts += [
            f'<circle class="dot s{number}" cx="{a:.1f}" cy="{up(v):.1f}" r="3">'
            f"<title>{html.escape(name)}, {t:.4g}: {v:.4g}</title></circle>"
            for a, v, t in zip(across, line, x, strict=True)
        ]
    return _svg(title, parts, HEIGHT) + _legend(list(series))


def bar_chart(
    title: str, names: Sequence[str], values: Sequence[float], groups: Sequence[str], y_label: str, base: float | None = None
) -> str:
    """Return a bar for each name, coloured by its group; bars stand on `base`, the smallest tick if None."""
    if not values:
        return ""
    ticks = ticks_of(min((*values, base) if base is not None else values), max(values))
    up, foot = _scale(ticks), ticks[0] if base is None else base
    order = list(dict.fromkeys(groups))
    step = (WIDTH - LEFT - RIGHT) / len(names)
    parts = [_frame(ticks, up, y_label)]
    for i, (name, value, group) in enumerate(zip(names, values, groups, strict=True)):
        top, bottom = sorted((up(value), up(foot)))
        text = f"{html.escape(name)}: {value:.4g} ({html.escape(group)})"
        parts.append(
            f'<rect class="bar s{order.index(group)}" x="{LEFT + i * step + step * 0.1:.1f}" y="{top:.1f}"'
            f' width="{step * 0.8:.1f}" height="{max(bottom - top, 1):.1f}"><title>{text}</title></rect>'
        )
    parts.append(_text((WIDTH + LEFT) / 2, HEIGHT - BOTTOM + 16, f"{len(names)} layers, in the order of the model", "middle"))
    return _svg(title, parts, HEIGHT) + _legend(order)


def interval_chart(estimate: float, low: float, high: float, limit: float, lowest: float | None = None) -> str:
    """Return a strip that shows an interval of a difference beside zero and its limit; `lowest`: the limit on the other side."""
    wide, tall = 220, 26
    limits = [limit] if lowest is None else [lowest, limit]
    reach = 1.15 * max(abs(v) for v in (estimate, low, high, *limits)) or 1.0

    def across(value: float) -> float:
        return wide / 2 + value / reach * wide / 2

    marks = "".join(f'<line class="limit" x1="{across(v):.1f}" x2="{across(v):.1f}" y1="2" y2="24"/>' for v in limits)
    label = f"difference {estimate:.3g}, from {low:.3g} to {high:.3g}; limit {limit:.3g}"
    return (
        f'<svg class="strip" viewBox="0 0 {wide} {tall}" role="img" aria-label="{label}"><title>{label}</title>'
        f'<line class="axis" x1="{wide / 2}" x2="{wide / 2}" y1="4" y2="22"/>{marks}'
        f'<rect class="range" x="{across(low):.1f}" y="10" width="{max(across(high) - across(low), 1):.1f}" height="6" rx="3"/>'
        f'<circle class="point" cx="{across(estimate):.1f}" cy="13" r="5"/></svg>'
    )


def ticks_of(low: float, high: float) -> list[float]:
    """Return about TICKS round numbers that enclose the range."""
    if high - low < 1e-12 * max(1.0, abs(low), abs(high)):
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / TICKS
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * (1 - 1e-9))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, last + 1)]


def _scale(ticks: Sequence[float]) -> Callable[[float], float]:
    """Return what maps a value to its height in the chart."""
    low, high = ticks[0], ticks[-1]
    return lambda value: HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _places(count: int) -> list[float]:
    inner = WIDTH - LEFT - RIGHT - 20
    return [LEFT + 10 + (i / (count - 1) * inner if count > 1 else inner / 2) for i in range(count)]


def _frame(ticks: Sequence[float], up: Callable[[float], float], y_label: str) -> str:
    parts = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>')
        parts.append(_text(LEFT - 6, up(tick) + 4, f"{tick:.4g}", "end"))
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts.append(
        f'<text class="label" transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>'
    )
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="label" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(title: str, parts: Sequence[str], height: int) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
    )


def _legend(names: Sequence[str]) -> str:
    items = "".join(f'<span><i class="key s{i}"></i>{html.escape(name)}</span>' for i, name in enumerate(names))
    return f'<p class="legend">{items}</p>'
