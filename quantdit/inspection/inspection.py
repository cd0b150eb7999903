"""What is inside a quantized folder, as tables, as JSON and as pictures."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from torch import nn

from quantdit.checkpoints import checkpoint
from quantdit.compiling.compiler import REPORT, added, size_of
from quantdit.formats import FORMATS
from quantdit.layers.quant_linear import QuantLinear, weight_bits
from quantdit.models import adapter as adapters
from quantdit.pipelines.pipeline import PARTS, check_quantized
from quantdit.system import files

# The error of a layer that saw calibration data, and of one that did not, by its name in the report.
WITH_DATA = "rel_rmse"
WITHOUT_DATA = "weight_rel_rmse"
WEIGHT_ALONE = "w"  # marks the latter among the former
OUTSIDE = "outside"
LEAST = 16  # characters of a last column that may be cut
WORST = 10
LARGEST = 1e30
GROUPS = ("role", "block")
EXPLAINED = {
    WITH_DATA: "rel_rmse: error of the layer's output on calibration data, relative to the full-precision output without bias",
    WITHOUT_DATA: "{}: error of the weight itself, relative to it: the layer saw no calibration data",
    "J": 'J: root mean square of the layer\'s inputs (LRQ-DiT, section 4.2); rotation = "ars" chooses by it',
}
EDGES = "edges: {} takes the wider activations from the noisiest time to {:g}, and from beyond {:g} to the cleanest"


@dataclass(frozen=True)
class Row:
    """One quantized layer: what it is made of, and what calibration found.

    Attributes:
        name: its path in the transformer, after the name of the transformer if that is not the first.
        role: as rules of a recipe name it.
        block: the transformer block it lies in, "outside" for none.
        shape: outputs, inputs.
        format: of the weight, with its group size.
        bits: stored for each weight.
        transform: of the inputs.
        activations: their format.
        error: `rel_rmse` of the output, or of the weight where there was no calibration data; None if nothing is known.
        has_data: `error` is that of the output.
        rms: J, the root mean square of the layer's inputs; None without calibration data.
    """

    name: str
    role: str
    block: str
    shape: tuple[int, int]
    format: str
    bits: float
    transform: str
    activations: str
    error: float | None
    has_data: bool
    rms: float | None


@dataclass(frozen=True)
class Inspected:
    """A quantized folder that was read and checked.

    Attributes:
        folder: that was read.
        layers: its quantized layers, of all its transformers.
        rows: the same, described.
        report: what calibration_report.json says of each; empty without that file.
        allocation: how weight formats were chosen, None if they were not.
        size: as compiler.size_of.
        edges: by transformer, the times that the wider activations of the first and of the last steps end at; those without such
            activations are left out.
    """

    folder: Path
    layers: dict[str, QuantLinear]
    rows: tuple[Row, ...]
    report: dict[str, dict]
    allocation: dict | None
    size: dict
    edges: dict[str, tuple[float, float]]


class Column(NamedTuple):
    """A column of a table: its title, and whether its cells are numbers, which end below each other."""

    title: str
    is_number: bool = True


def read(folder: Path, accept_config: bool = False) -> Inspected:
    """Read and check a quantized pipeline's folder, or that of a transformer alone.

    `accept_config`: as `checkpoint.read_transformer` takes it.

    Raises:
        files.CheckpointError: no quantdit checkpoint, a damaged one, or one that its report does not fit.
    """
    check_quantized(folder)
    bare = (folder / "config.json").exists()
    places = {"": folder} if bare else {part: folder / part for part in PARTS if (folder / part).is_dir()}
    quantized = {part: place for part, place in places.items() if checkpoint.is_quantized(place)} or places
    layers: dict[str, QuantLinear] = {}
    roles: dict[str, tuple[str, str]] = {}
    found: dict[str, dict] = {}
    sizes, edges = [], {}
    for part, place in quantized.items():
        transformer = checkpoint.read_transformer(place, accept_config=accept_config)
        sizes.append(size_of(transformer, place))
        prefix = "" if part in ("", PARTS[0]) else f"{part}."
        own = checkpoint.quant_layers(transformer)
        if any(layer.layer_spec.activation.edge_bits for layer in own.values()):
            edges[part or PARTS[0]] = (transformer.timestep_edges[0], transformer.timestep_edges[-2])
        layers |= {f"{prefix}{name}": layer for name, layer in own.items()}
        roles |= {f"{prefix}{name}": where for name, where in _roles(transformer).items()}
        found |= {f"{prefix}{name}": entry for name, entry in _stated_errors(place, own).items()}
    content = files.read_json(folder / REPORT) if (folder / REPORT).exists() else {}
    report = _report(content, layers, folder / REPORT) if (folder / REPORT).exists() else {}
    rows = tuple(_row(name, layer, *roles[name], (report or found).get(name, {})) for name, layer in layers.items())
    return Inspected(folder, layers, rows, report, _allocation(content, layers.keys(), folder / REPORT), added(sizes), edges)


def describe(found: Inspected, width: int = 80, every: bool = False, by: str = GROUPS[0]) -> str:
    """Return tables no wider than `width`: groups of layers with their means, then the worst layers, or every one.

    Where the calibration compared rotations or strengths of smoothing, a table has the error of every candidate; where it chose
    the weight formats, a last one has the error of each and what came of the choice.

    Args:
        found: the folder.
        width: of the terminal, in characters.
        every: list all layers in their order, instead of the worst alone.
        by: what to group by, one of GROUPS.
    """
    rows, size = found.rows, found.size
    known = [row for row in rows if row.error is not None]
    worst = sorted(known, key=lambda row: row.error, reverse=True)[:WORST]
    shown = rows if every or not worst else worst
    total = (
        f"{len(rows)} layers, {size['quantized_weights']:,} weights at {size['bits_per_weight']:.3f} bits with scales,"
        f" {size['dense_values']:,} dense values, file {size['file_bytes'] / 1e6:.2f} MB"
    )
    lines = [*_wrapped([total], width), "", *_grouped(rows, by, width)]
    if shown is worst and len(worst) < len(rows):
        lines += ["", f"the {len(worst)} worst of {len(rows)} layers; --all lists every one"]
    lines += ["", *_layer_table(shown, width)]
    for part, levels in found.edges.items():
        lines += _wrapped([EDGES.format(part, *levels)], width)
    names = [row.name for row in shown]
    lines += _candidates({name: found.report[name] for name in names if name in found.report}, width)
    if found.allocation:
        lines += _widths(found.allocation, names, width)
    return "\n".join(lines)


def as_json(found: Inspected) -> dict:
    """Return what `describe` prints, of every layer, as JSON: `layers`, `size`, `allocation`, and `report` of each layer."""
    layers = {row.name: asdict(row) | {"report": found.report.get(row.name)} for row in found.rows}
    known = {"folder": str(found.folder), "size": found.size, "layers": layers, "allocation": found.allocation}
    return known | ({"edges": found.edges} if found.edges else {})


def allocation_summary(allocation: dict) -> str:
    """Return in a few lines what a calibration report's `allocation` chose, for which target, and what it gave."""
    counts = Counter(layer["chosen"] for layer in allocation["layers"].values())
    used, whole = allocation["bytes"], allocation["bytes_in_16_bits"]
    asked = (
        f"at most {allocation['size_budget']:g}"
        if allocation["size_budget"] is not None
        else f"the least for a drift of at most {allocation['max_drift']:g}"
    )
    tried = ", ".join(f"{a['bytes'] / whole:.3f} gave {a['measured']:.4f}" for a in allocation["attempts"])
    return "\n".join(
        [
            "weights: " + ", ".join(f"{counts[w]} layers in {w}" for w in _formats(allocation) if counts[w]),
            f"size: {used:,} bytes, {used / whole:.4f} of 16 bits ({asked})",
            f"model_rel_rmse: {allocation['model_rel_rmse']:.4f}, predicted {allocation['predicted_model_rel_rmse']:.4f}"
            + (f" (tried: {tried})" if len(allocation["attempts"]) > 1 else ""),
        ]
    )


def _formats(allocation: dict) -> list[str]:
    """Return the weight formats any layer had to choose from, by bits."""
    names = {w for layer in allocation["layers"].values() for w in layer["weights"]}
    return sorted(names, key=lambda w: (_bits(w), w))


def _grouped(rows: Sequence[Row], by: str, width: int) -> list[str]:
    """Return the table of groups of layers: how many, their formats, bits, mean and largest error."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(getattr(row, by), []).append(row)
    columns = [Column(by, False), Column("layers"), Column("bits/w"), Column("mean " + _error_title(rows)), Column("largest")]
    cells = []
    for name, members in groups.items():
        weights = [math.prod(row.shape) for row in members]
        bits = sum(row.bits * count for row, count in zip(members, weights, strict=True)) / max(1, sum(weights))
        errors = [row.error for row in members if row.error is not None]
        mean = sum(errors) / len(errors) if errors else None
        formats = ", ".join(f"{format} x {count}" for format, count in Counter(row.format for row in members).most_common())
        cells.append((name, str(len(members)), f"{bits:.3f}", _number(mean), _number(max(errors, default=None)), formats))
    return _table([*columns, Column("formats", False)], cells, width)


def _layer_table(rows: Sequence[Row], width: int) -> list[str]:
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
    lines = [*_table(columns, cells, width), ""]
    lines += [EXPLAINED[WITH_DATA]] if True in kinds else []
    lines += [EXPLAINED[WITHOUT_DATA].format(WEIGHT_ALONE if mixed else _error_title(rows))] if False in kinds else []
    lines += [EXPLAINED["J"]] if any(row.rms is not None for row in rows) else []
    return _wrapped(lines, width)


def _error_title(rows: Iterable[Row]) -> str:
    known = {row.has_data for row in rows if row.error is not None}
    return "of weight" if known == {False} else WITH_DATA


def _table(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Return aligned lines; where they would be too wide, the first cell of each has a line of its own, and the last is cut."""
    widths = [max(len(column.title), *(len(row[i]) for row in rows), 0) for i, column in enumerate(columns)]

    def aligned(cells: Sequence[str], first: int) -> str:
        pairs = zip(cells[first:], widths[first:], columns[first:], strict=True)
        return "  ".join(c.rjust(w) if column.is_number else c.ljust(w) for c, w, column in pairs).rstrip()

    titles = [column.title for column in columns]
    if sum(widths[:-1]) + 2 * (len(widths) - 1) + min(widths[-1], LEAST) <= width:
        return [_cut(aligned(cells, 0), width) for cells in (titles, *rows)]
    return [line for cells in (titles, *rows) for line in (cells[0], _cut("    " + aligned(cells, 1), width))]


def _wrapped(lines: Iterable[str], width: int) -> list[str]:
    return [part for line in lines for part in (textwrap.wrap(line, width, subsequent_indent="  ") or [""])]


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else f"{line[: width - 1]}…"


def _widths(allocation: dict, shown: Collection[str], width: int) -> list[str]:
    """Return the table of layers and weight formats: the error of the model's output that each layer alone would cause."""
    names = _formats(allocation)
    rows = []
    for layer in shown:
        entry, cells = allocation["layers"][layer], []
        for name in names:
            known = entry["weights"].get(name)
            guess, star = ("~" if known and not known["measured"] else ""), ("*" if name == entry["chosen"] else " ")
            cells.append(f"{guess}{known['error']:.5f}{star}" if known else "")
        rows.append((layer, *cells))
    title = "error of the model's output from each layer alone, per weight format; * chosen, ~ interpolated"
    lines = ["", *_wrapped([title], width)]
    lines += _table([Column("layer", False), *map(Column, names)], rows, width)
    return [*lines, *_wrapped(allocation_summary(allocation).splitlines(), width)]


def _candidates(report: dict, width: int) -> list[str]:
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
        lines += ["", f"output error per {title}, * chosen", *_table([Column("layer", False), *map(Column, names)], rows, width)]
    return lines


def check_plot(found: Inspected) -> None:
    """Refuse what `plot` could not draw, before anything else is done.

    Raises:
        files.CheckpointError: the folder has no calibration report.
        ValueError: matplotlib is not installed.
    """
    if not found.report:
        raise files.CheckpointError(
            f"{found.folder / REPORT} is missing, so there is nothing to draw; quantdit calibrate writes one"
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'quantdit[plot]'") from error


def plot(found: Inspected, path: Path) -> None:
    """Draw weight histograms with the levels given, the output error of each layer, and activation absmax per timestep.

    Raises:
        ValueError: as `check_plot`.
    """
    check_plot(found)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers, report, allocation = found.layers, found.report, found.allocation
    by_error = sorted(layers, key=lambda name: _error(report[name]))
    shown = [by_error[0], by_error[len(by_error) // 2], by_error[-1]]
    seen = {name: entry for name, entry in report.items() if WITH_DATA in entry}
    heights = (1, 1.2, *((1.1,) if seen else ()), *((1.2,) if allocation else ()))
    figure = plt.figure(figsize=(15, 4 * len(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 3, height_ratios=heights)
    for column, (name, title) in enumerate(zip(shown, ("smallest", "median", "largest"), strict=True)):
        _plot_weights(figure.add_subplot(grid[0, column]), layers[name], report[name], f"{title} error: {_short(name)}")
    _plot_errors(figure.add_subplot(grid[1, :]), report)
    if seen:
        _plot_activations(figure.add_subplot(grid[2, :]), seen)
    if allocation:
        _plot_allocation(figure.add_subplot(grid[len(heights) - 1, :]), allocation)
    figure.suptitle(f"{found.folder.name}: what each layer was given and what it cost")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=110)
    plt.close(figure)
    part.replace(path)


def _plot_weights(axis, layer: QuantLinear, entry: dict, title: str) -> None:
    import numpy as np

    counts, reach = entry["weight_histogram"]["counts"], entry["weight_histogram"]["reach"] or 1.0
    edges = np.linspace(-reach, reach, len(counts) + 1)
    axis.stairs(
        np.array(counts) / sum(counts) / (edges[1] - edges[0]), edges, fill=True, color="#b8cbe0", label="weights / scale"
    )
    integers = layer.decoded().float().numpy().ravel()
    values, used = np.unique(integers, return_counts=True)
    axis.vlines(
        values, 0, used / used.max() * axis.get_ylim()[1] * 0.5, color="#c0392b", linewidth=0.8, label="levels I, height = use"
    )
    axis.set(title=title, xlabel=f"I  ({layer.spec.format})", yticks=[])
    axis.title.set_fontsize(9)
    axis.legend(fontsize=8)


def _plot_errors(axis, report: dict) -> None:
    names = list(report)
    seen = [i for i, name in enumerate(names) if WITH_DATA in report[name]]
    unseen = [i for i, name in enumerate(names) if WITH_DATA not in report[name]]
    labels = ("of the output, with quantized activations", "of the weight itself: the layer saw no calibration data")
    for places, color, label in ((seen, "#4c78a8", labels[0]), (unseen, "#9d9da1", labels[1])):
        if places:
            axis.bar(places, [_error(report[names[i]]) for i in places], color=color, label=label)
    if seen:
        axis.plot(seen, [report[names[i]]["weight_only_rel_rmse"] for i in seen], ".", color="#e45756", label="weights alone")
    axis.set(ylabel="rel_rmse of each layer", xlim=(-0.7, len(names) - 0.3))
    axis.set_xticks(range(len(names)), [_short(n) for n in names], rotation=90, fontsize=6)
    axis.legend(fontsize=8)
    axis.grid(axis="y", alpha=0.3)


def _plot_activations(axis, report: dict) -> None:
    import numpy as np

    peaks = np.array([entry["activation_absmax"] for entry in report.values()]).T
    seen = peaks.max(axis=1, keepdims=True) > 0  # with few sampling steps some buckets stay empty, and are left blank
    image = np.where(seen, np.log10(np.maximum(peaks, 1e-3)), np.nan)
    shown = axis.imshow(image, aspect="auto", cmap="viridis", interpolation="nearest")
    axis.set(ylabel="timestep bucket (0 = noisiest)", title="largest |activation| per timestep bucket, log10")
    axis.set_xticks(range(len(report)), [_short(n) for n in report], rotation=90, fontsize=6)
    axis.figure.colorbar(shown, ax=axis, pad=0.01)


def _bits(format: str) -> int:
    return round(math.log2(FORMATS[format].code_count) / FORMATS[format].dim) if format in FORMATS else 0


def _plot_allocation(axis, allocation: dict) -> None:
    import matplotlib.pyplot as plt

    layers, formats = allocation["layers"], _formats(allocation)
    colors = dict(
        zip(formats, plt.get_cmap("viridis_r")([i / max(1, len(formats) - 1) for i in range(len(formats))]), strict=True)
    )
    for name in formats:
        places = [i for i, layer in enumerate(layers.values()) if layer["chosen"] == name]
        if places:
            axis.bar(places, _bits(name), color=colors[name], label=f"{name}: {len(places)} layers")
    axis.set(ylabel="weight bits", xlim=(-0.7, len(layers) - 0.3))
    axis.set_title("weight format chosen for each layer, and what it costs", pad=26)
    axis.set_yticks(sorted({_bits(name) for name in formats}))
    axis.set_xticks(range(len(layers)), [_short(n) for n in layers], rotation=90, fontsize=6)
    errors = axis.twinx()
    chosen = [layer["weights"][layer["chosen"]]["error"] for layer in layers.values()]
    errors.plot(range(len(layers)), chosen, "o", color="#c0392b", markeredgecolor="white", label="error it causes alone (right)")
    errors.set(yscale="log", ylabel="error of the model's output")
    legends = [a.get_legend_handles_labels() for a in (axis, errors)]
    axis.legend(
        legends[0][0] + legends[1][0],
        legends[0][1] + legends[1][1],
        fontsize=8,
        ncols=6,
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
    )


def _roles(transformer: nn.Module) -> dict[str, tuple[str, str]]:
    """Return role and block of each quantized layer."""
    adapter = adapters.adapter_for(transformer)
    roles = {layer.name: layer.role for layer in adapters.layers(transformer, adapter)}
    blocks = [path for path, _ in adapters.blocks(transformer, adapter)]

    def block(name: str) -> str:
        return next((path for path in blocks if name.startswith(f"{path}.")), OUTSIDE)

    return {name: (roles.get(name, OUTSIDE), block(name)) for name in checkpoint.quant_layers(transformer)}


def _row(name: str, layer: QuantLinear, role: str, block: str, entry: dict) -> Row:
    s = layer.spec
    form = s.format if s.group_size == s.in_features else f"{s.format} g{s.group_size}"
    return Row(
        name,
        role,
        block,
        (s.out_features, s.in_features),
        form,
        weight_bits(layer),
        _transform(layer),
        str(layer.layer_spec.activation),
        _error(entry) if entry else None,
        WITH_DATA in entry,
        entry.get("rms"),
    )


def _error(entry: dict) -> float:
    return entry[WITH_DATA] if WITH_DATA in entry else entry[WITHOUT_DATA]


# ---- what was read, checked: a report is a file like any other


def _stated_errors(folder: Path, names: Collection[str]) -> dict[str, dict]:
    """Return the errors that quantdit.quantize left in a transformer's config.json; {} if none are there.

    Raises:
        files.CheckpointError: something else is there.
    """
    provenance = files.read_json(folder / "config.json")["quantization_config"].get("provenance")
    stated = provenance.get("layers", {}) if isinstance(provenance, dict) else {}
    whole = isinstance(stated, dict) and stated.keys() in (set(), set(names)) and all(map(_is_measured, stated.values()))
    if not whole:
        raise files.CheckpointError(
            f"{folder / 'config.json'}: quantization_config.provenance.layers does not fit the checkpoint; copy it again"
        )
    return stated


def _report(content: dict, layers: Collection[str], path: Path) -> dict[str, dict]:
    """Return what a calibration report says of each layer.

    Raises:
        files.CheckpointError: it does not fit.
    """
    report = content.get("layers")
    if not isinstance(report, dict) or report.keys() != set(layers) or not all(map(_is_entry, report.values())):
        raise files.CheckpointError(f"{path} does not fit the checkpoint; remove it (inspect works without) or calibrate again")
    if len({len(entry["activation_absmax"]) for entry in report.values() if WITH_DATA in entry}) > 1:
        raise files.CheckpointError(f"{path}: its layers differ in activation_absmax; remove it or calibrate again")
    return report


def _allocation(content: dict, names: Collection[str], path: Path) -> dict | None:
    """Return the report's allocation, None if the weights were not chosen by one.

    Raises:
        files.CheckpointError: it is damaged.
    """
    allocation = content.get("allocation")
    if allocation is None:
        return None
    whole = (
        _has(allocation, ALLOCATION)
        and allocation["layers"].keys() == set(names)
        and all(_has(e, CHOICE) and e["chosen"] in e["weights"] for e in allocation["layers"].values())
        and all(_has(w, WEIGHT) for e in allocation["layers"].values() for w in e["weights"].values())
        and all(_has(a, ATTEMPT) for a in allocation["attempts"])
        and (allocation["size_budget"] is None) != (allocation["max_drift"] is None)
    )
    if not whole:
        raise files.CheckpointError(
            f"{path}: its allocation does not fit the checkpoint; remove the file (inspect works without) or calibrate again"
        )
    return allocation


def _is_entry(entry: object) -> bool:
    """Return whether a report's entry of a layer has all that is shown of it."""
    return (
        _is_measured(entry)
        and (WITH_DATA not in entry or _has(entry, {"rms": _is_number, "activation_absmax": _are_numbers}))
        and _has(entry.get("weight_histogram"), {"counts": _are_numbers, "reach": _is_number})
        and sum(entry["weight_histogram"]["counts"]) > 0
        and all(_is_choice(entry.get(key)) for key in ("rotation", "smoothing"))
    )


def _is_measured(entry: object) -> bool:
    """Return whether an entry has the errors of a layer that saw calibration data, or of one that did not."""
    with_data = {WITH_DATA: _is_number, "weight_only_rel_rmse": _is_number, "rms": _is_number}
    return _has(entry, with_data if isinstance(entry, dict) and WITH_DATA in entry else {WITHOUT_DATA: _is_number})


def _is_choice(choice: object) -> bool:
    """Return whether this is how a rotation or smoothing was chosen, or None: there was nothing to choose."""
    errors = choice.get("errors") if isinstance(choice, dict) else None
    return choice is None or (isinstance(choice, dict) and (not errors or _is_table(errors)))


def _has(content: object, kinds: Mapping[str, Callable[[object], bool]]) -> bool:
    return isinstance(content, dict) and all(key in content and is_one(content[key]) for key, is_one in kinds.items())


def _is_number(value: object) -> bool:
    """Return whether a value is a number that no error exceeds: neither NaN nor infinite."""
    return type(value) in (int, float) and 0 <= value < LARGEST


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and len(values) > 0 and all(map(_is_number, values))


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _is_number_or_none(value: object) -> bool:
    return value is None or _is_number(value)


ALLOCATION = {
    "size_budget": _is_number_or_none,
    "max_drift": _is_number_or_none,
    "bytes": _is_number,
    "bytes_in_16_bits": lambda value: _is_number(value) and value > 0,
    "predicted_model_rel_rmse": _is_number,
    "model_rel_rmse": _is_number,
    "attempts": _is_list,
    "layers": _is_dict,
}
CHOICE = {"chosen": _is_text, "weights": _is_dict}
WEIGHT = {"error": _is_number, "measured": _is_flag}
ATTEMPT = {"bytes": _is_number, "predicted": _is_number, "measured": _is_number}


def _short(name: str) -> str:
    return name.replace("transformer_blocks.", "").replace("timestep_embedder.", "t_")


def _transform(layer: QuantLinear) -> str:
    s = layer.layer_spec
    words = [f"{s.rotation}-{s.block}" if s.block > 1 else "", "smooth" if s.smoothed else "", f"rank {s.rank}" if s.rank else ""]
    return " ".join(w for w in words if w) or "none"


def _number(value: float | None, form: str = ".5f") -> str:
    return "-" if value is None else format(value, form)
