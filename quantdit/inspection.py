"""What is inside a quantized folder, as a table and as pictures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from quantdit import checkpoint, files
from quantdit.compiler import REPORT, added, size_of
from quantdit.formats import FORMATS
from quantdit.linear import QuantLinear, weight_bits
from quantdit.pipeline import PARTS

# What the report says of a layer.
WITH_DATA = {"rel_rmse", "weight_only_rel_rmse", "rms", "activation_absmax", "weight_histogram", "spec"}
WITHOUT_DATA = {"weight_rel_rmse", "weight_histogram", "spec"}


def describe(folder: Path) -> str:
    """Return a table with one line per layer: shape, format, bits per weight, transform, activations, output error, J.

    Where the calibration compared rotations or strengths of smoothing, a second table has the error of every candidate; where it
    chose the weight formats, a last one has the error of each and what came of the choice.

    Raises:
        files.CheckpointError: the folder is no quantdit checkpoint or is damaged.
    """
    layers, report, size = _read(folder)
    width = max((len(name) for name in layers), default=5)
    row = "{:<{width}}  {:>13}  {:<14}{:>7}  {:<22}  {:<14}{:>9}  {:>8}"
    # Without calibration data only the error of the weights themselves is known.
    error = "of weight" if report and not _has_data(report) else "rel_rmse"
    lines = [row.format("layer", "shape", "format", "bits/w", "transform", "act", error, "J (rms)", width=width)]
    for name, layer in layers.items():
        entry, s = report.get(name, {}), layer.spec
        form = s.format if s.group_size == s.in_features else f"{s.format} g{s.group_size}"
        cells = (name, f"{s.out_features}x{s.in_features}", form, f"{weight_bits(layer):.3f}", _transform(layer))
        measured = (_number(_error(entry) if entry else None, ".5f"), _number(entry.get("rms"), ".3f"))
        lines.append(row.format(*cells, str(layer.layer_spec.activation), *measured, width=width))
    lines.append(
        f"{len(layers)} layers, {size['quantized_weights']:,} weights at {size['bits_per_weight']:.3f} bits with scales,"
        f" {size['dense_values']:,} dense values, file {size['file_bytes'] / 1e6:.2f} MB"
    )
    allocation = _allocation(folder, layers.keys())
    return "\n".join([*lines, *_candidates(report, width), *(_widths(allocation, width) if allocation else ())])


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


def _widths(allocation: dict, width: int) -> list[str]:
    """Return the table of layers and weight formats: the error of the model's output that each layer alone would cause."""
    names = _formats(allocation)
    lines = ["", "error of the model's output from each layer alone, per weight format; * chosen, ~ interpolated"]
    lines.append(f"{'layer':<{width}}" + "".join(f"{name:>12}" for name in names))
    for layer, entry in allocation["layers"].items():
        cells = []
        for name in names:
            known = entry["weights"].get(name)
            guess, star = ("~" if known and not known["measured"] else ""), ("*" if name == entry["chosen"] else " ")
            cells.append(f"{guess}{known['error']:.5f}{star}" if known else "")
        lines.append(f"{layer:<{width}}" + "".join(f"{cell:>12}" for cell in cells))
    return [*lines, allocation_summary(allocation)]


def _formats(allocation: dict) -> list[str]:
    """Return the weight formats any layer had to choose from, by bits."""
    names = {w for layer in allocation["layers"].values() for w in layer["weights"]}
    return sorted(names, key=lambda w: (_bits(w), w))


def _candidates(report: dict, width: int) -> list[str]:
    """Return the output errors of all candidates that were compared, the chosen one starred; nothing if none were."""
    lines = []
    for key, title in (("rotation", "rotation"), ("smoothing", "alpha of smoothing")):
        compared = {name: entry[key] for name, entry in report.items() if entry.get(key, {}).get("errors")}
        if not compared:
            continue
        names = list(dict.fromkeys(kind for choice in compared.values() for kind in choice["errors"]))
        lines += ["", f"output error per {title}, * chosen"]
        lines.append(f"{'layer':<{width}}" + "".join(f"{name:>12}" for name in names))
        for layer, choice in compared.items():
            chosen = str(choice.get("chosen", choice.get("alpha")))
            cells = [f"{choice['errors'][n]:.5f}{'*' if n == chosen else ' '}" if n in choice["errors"] else "" for n in names]
            lines.append(f"{layer:<{width}}" + "".join(f"{cell:>12}" for cell in cells))
    return lines


def plot(folder: Path, path: Path) -> None:
    """Draw weight histograms with the levels given, the output error of each layer, and activation absmax per timestep.

    Raises:
        files.CheckpointError: as `describe`, or the folder has no calibration report to draw.
        ValueError: matplotlib is not installed.
    """
    layers, report, _ = _read(folder)
    if not report:
        raise files.CheckpointError(f"{folder / REPORT} is missing, so there is nothing to draw; calibrate again to get one")
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'quantdit[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_error = sorted(layers, key=lambda name: _error(report[name]))
    shown = [by_error[0], by_error[len(by_error) // 2], by_error[-1]]
    allocation = _allocation(folder, layers.keys())
    heights = (1, 1.2, *((1.1,) if _has_data(report) else ()), *((1.2,) if allocation else ()))
    figure = plt.figure(figsize=(15, 4 * len(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 3, height_ratios=heights)
    for column, (name, title) in enumerate(zip(shown, ("smallest", "median", "largest"), strict=True)):
        _plot_weights(figure.add_subplot(grid[0, column]), layers[name], report[name], f"{title} error: {_short(name)}")
    _plot_errors(figure.add_subplot(grid[1, :]), report)
    if _has_data(report):
        _plot_activations(figure.add_subplot(grid[2, :]), report)
    if allocation:
        _plot_allocation(figure.add_subplot(grid[len(heights) - 1, :]), allocation)
    figure.suptitle(f"{folder.name}: what each layer was given and what it cost")
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
    places = range(len(names))
    has_data = _has_data(report)
    label = "with quantized activations" if has_data else "of the weights themselves: there was no calibration data"
    axis.bar(places, [_error(report[n]) for n in names], color="#4c78a8", label=label)
    if has_data:
        axis.plot(places, [report[n]["weight_only_rel_rmse"] for n in names], ".", color="#e45756", label="weights alone")
    axis.set(
        ylabel="rel_rmse of the layer's output" if has_data else "rel_rmse of the layer's weight", xlim=(-0.7, len(names) - 0.3)
    )
    axis.set_xticks(places, [_short(n) for n in names], rotation=90, fontsize=6)
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
    return round(math.log2(FORMATS[format].levels) / FORMATS[format].dim) if format in FORMATS else 0


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


def _short(name: str) -> str:
    return name.replace("transformer_blocks.", "").replace("timestep_embedder.", "t_")


def _read(folder: Path) -> tuple[dict[str, QuantLinear], dict[str, dict], dict]:
    """Return the quantized layers of all transformers, their reports (none without a report), and the size of it all."""
    if not (folder / "transformer").is_dir():
        raise files.CheckpointError(f"{folder} has no transformer folder; give the folder that quantdit calibrate wrote")
    layers: dict[str, QuantLinear] = {}
    sizes = []
    for part in PARTS:
        if (folder / part).is_dir():
            transformer = checkpoint.read_transformer(folder / part)
            sizes.append(size_of(transformer, folder / part))
            prefix = "" if part == PARTS[0] else f"{part}."
            layers |= {f"{prefix}{name}": layer for name, layer in checkpoint.quant_layers(transformer).items()}
    report = files.read_json(folder / REPORT).get("layers") if (folder / REPORT).exists() else {}
    whole = isinstance(report, dict) and all(
        isinstance(entry, dict) and any(entry.keys() >= known for known in (WITH_DATA, WITHOUT_DATA)) for entry in report.values()
    )
    if not whole or (report and report.keys() != layers.keys()):
        raise files.CheckpointError(
            f"{folder / REPORT} does not fit the checkpoint; remove it (inspect works without) or calibrate again"
        )
    return layers, report, added(sizes)


def _has_data(report: dict[str, dict]) -> bool:
    return all(entry.keys() >= WITH_DATA for entry in report.values())


def _error(entry: dict) -> float:
    return entry.get("rel_rmse", entry.get("weight_rel_rmse"))


def _allocation(folder: Path, names: Collection[str]) -> dict | None:
    """Return the report's allocation, None if the weights were not chosen by one.

    Raises:
        files.CheckpointError: it is damaged.
    """
    content = files.read_json(folder / REPORT).get("allocation") if (folder / REPORT).exists() else None
    if content is None:
        return None
    known = {"size_budget", "max_drift", "bytes", "bytes_in_16_bits", "predicted_model_rel_rmse", "model_rel_rmse", "attempts"}
    whole = isinstance(content, dict) and content.keys() >= known and isinstance(content.get("layers"), dict)
    whole = whole and content["layers"].keys() == set(names)
    if not whole or not all(
        isinstance(e, dict) and isinstance(e.get("weights"), dict) and e.get("chosen") in e["weights"]
        for e in content["layers"].values()
    ):
        raise files.CheckpointError(
            f"{folder / REPORT}: its allocation does not fit the checkpoint; remove the file (inspect works without) or calibrate"
            " again"
        )
    return content


def _transform(layer: QuantLinear) -> str:
    s = layer.layer_spec
    words = [f"{s.rotation}-{s.block}" if s.block > 1 else "", "smooth" if s.smoothed else "", f"rank {s.rank}" if s.rank else ""]
    return " ".join(w for w in words if w) or "none"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
