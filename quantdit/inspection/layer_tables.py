"""What is known of quantized layers as tables: in groups, one by one, and the candidates that calibration compared."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from quantdit.inspection.inspected_layer import WITH_DATA, WITHOUT_DATA, InspectedLayer
from quantdit.inspection.text_table import Column, table, wrapped

WEIGHT_ALONE = "w"  # marks the error of a weight among errors of outputs
EXPLAINED = {
    WITH_DATA: "rel_rmse: error of the layer's output on calibration data, relative to the full-precision output without bias",
    WITHOUT_DATA: "{}: error of the weight itself, relative to it: the layer saw no calibration data",
    "J": 'J: root mean square of the layer\'s inputs (LRQ-DiT, section 4.2); rotation = "ars" chooses by it',
}


def group_table(layers: Sequence[InspectedLayer], by: str, width: int) -> list[str]:
    """Return the table of groups of layers, of one role or block: how many, their formats, bits, mean and largest error."""
    groups: dict[str, list[InspectedLayer]] = {}
    for layer in layers:
        groups.setdefault(getattr(layer, by), []).append(layer)
    columns = [Column(by, False), Column("layers"), Column("bits/w"), Column("mean " + _error_title(layers)), Column("largest")]
    cells = []
    for name, members in groups.items():
        weights = [math.prod(row.shape) for row in members]
        bits = sum(row.bits * count for row, count in zip(members, weights, strict=True)) / max(1, sum(weights))
        errors = [row.error for row in members if row.error is not None]
        mean = sum(errors) / len(errors) if errors else None
        formats = ", ".join(f"{format} x {count}" for format, count in Counter(row.format for row in members).most_common())
        cells.append((name, str(len(members)), f"{bits:.3f}", _number(mean), _number(max(errors, default=None)), formats))
    return table([*columns, Column("formats", False)], cells, width)


def layer_table(rows: Sequence[InspectedLayer], width: int) -> list[str]:
    """Return one line per layer, and what its columns mean."""
    titles = ("layer", "shape", "format", "bits/w", _error_title(rows), "J", "act", "transform")
    columns = [Column(title, title in ("shape", "bits/w", _error_title(rows), "J")) for title in titles]
    kinds = {row.has_data for row in rows if row.error is not None}
    mixed = len(kinds) > 1
    cells = [
        (
            row.name,
            "x".join(map(str, row.shape)),
            row.format,
            f"{row.bits:.3f}",
            _number(row.error) + (WEIGHT_ALONE if mixed and not row.has_data else ""),
            _number(row.rms, ".3f"),
            row.activations,
            row.transform,
        )
        for row in rows
    ]
    lines = [*table(columns, cells, width), ""]
    lines += [EXPLAINED[WITH_DATA]] if True in kinds else []
    lines += [EXPLAINED[WITHOUT_DATA].format(WEIGHT_ALONE if mixed else _error_title(rows))] if False in kinds else []
    lines += [EXPLAINED["J"]] if any(row.rms is not None for row in rows) else []
    return wrapped(lines, width)


def _error_title(rows: Iterable[InspectedLayer]) -> str:
    known = {row.has_data for row in rows if row.error is not None}
    return "of weight" if known == {False} else WITH_DATA


def candidate_tables(report: dict, width: int) -> list[str]:
    """Return the output errors of all candidates that were compared, the chosen one starred; nothing if none were."""
    lines = []
    for key, title in (("rotation", "rotation"), ("smoothing", "alpha of smoothing")):
        compared = {name: entry[key] for name, entry in report.items() if (entry.get(key) or {}).get("errors")}
        if not compared:
            continue
        names = list(dict.fromkeys(kind for choice in compared.values() for kind in choice["errors"]))
        rows = []
        for layer, choice in compared.items():
            chosen = str(choice.get("chosen", choice.get("alpha")))
            marks = {name: "*" if name == chosen else " " for name in names}
            rows.append((layer, *(f"{choice['errors'][n]:.5f}{marks[n]}" if n in choice["errors"] else "" for n in names)))
        lines += ["", f"output error per {title}, * chosen", *table([Column("layer", False), *map(Column, names)], rows, width)]
    return lines


def _number(value: float | None, form: str = ".5f") -> str:
    return "-" if value is None else format(value, form)
