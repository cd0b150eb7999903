"""How weight formats were chosen for a size or an error: what came of it, and the choice of each layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from quantdit.formats import FORMATS
from quantdit.inspection.text_table import Column, table, wrapped


def summary(allocation: dict) -> str:
    """Return in a few lines what a calibration report's `allocation` chose, for which target, and what it gave."""
    counts = Counter(layer["chosen"] for layer in allocation["layers"].values())
    used, whole = allocation["bytes"], allocation["bytes_in_16_bits"]
    asked = (
        f"at most {allocation['size_budget']:g}"
        if allocation["size_budget"] is not None
        else f"the least for an output error of at most {allocation['max_output_error']:g}"
    )
    tried = ", ".join(f"{a['bytes'] / whole:.3f} gave {a['measured']:.4f}" for a in allocation["attempts"])
    return "\n".join(
        [
            "weights: " + ", ".join(f"{counts[w]} layers in {w}" for w in formats_of(allocation) if counts[w]),
            f"size: {used:,} bytes, {used / whole:.4f} of 16 bits ({asked})",
            f"model_rel_rmse: {allocation['model_rel_rmse']:.4f}, predicted {allocation['predicted_model_rel_rmse']:.4f}"
            + (f" (tried: {tried})" if len(allocation["attempts"]) > 1 else ""),
        ]
    )


def format_table(allocation: dict, shown: Collection[str], width: int) -> list[str]:
    """Return the table of layers and weight formats: the error of the model's output that each layer alone would cause."""
    names = formats_of(allocation)
    rows = []
    for layer in shown:
        entry, cells = allocation["layers"][layer], []
        for name in names:
            known = entry["weights"].get(name)
            guess, star = ("~" if known and not known["measured"] else ""), ("*" if name == entry["chosen"] else " ")
            cells.append(f"{guess}{known['error']:.5f}{star}" if known else "")
        rows.append((layer, *cells))
    title = "error of the model's output from each layer alone, per weight format; * chosen, ~ interpolated"
    lines = ["", *wrapped([title], width)]
    lines += table([Column("layer", False), *map(Column, names)], rows, width)
    return [*lines, *wrapped(summary(allocation).splitlines(), width)]


def formats_of(allocation: dict) -> list[str]:
    """Return the weight formats any layer had to choose from, by bits."""
    names = {w for layer in allocation["layers"].values() for w in layer["weights"]}
    return sorted(names, key=lambda w: (bits_of(w), w))


def bits_of(format: str) -> int:
    """Return the bits that a weight format stores for each weight, scales aside; 0 for one that is unknown, as `dense`."""
    return round(FORMATS[format].code_bits / FORMATS[format].dim) if format in FORMATS else 0
