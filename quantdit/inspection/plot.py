"""A picture of a quantized folder: weights and levels, errors, activations per timestep, the choice of weight formats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quantdit.inspection.allocation import bits_of, formats_of
from quantdit.inspection.inspected_layer import WITH_DATA, error_of
from quantdit.layers.quant_linear import QuantLinear
from quantdit.system.optional_import import require
from quantdit.system.output_places import PICTURES, require_file, require_suffix

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def check_output(path: Path) -> None:
    """Refuse what `draw` could not write, before anything is read.

    Raises:
        ValueError: the file cannot be written, or its name does not say that it is a picture.
        ImportError: matplotlib is not installed.
    """
    require_file(path)
    require_suffix(path, PICTURES, "plots")
    require("matplotlib", "plot")


def draw(path: Path, title: str, modules: dict[str, QuantLinear], report: dict[str, dict], allocation: dict | None) -> None:
    """Draw weight histograms with the levels given, the error of each layer, activation absmax per timestep, and the allocation.

    Args:
        path: the PNG file to write.
        title: names the model.
        modules: the quantized layers.
        report: what the calibration report says of each.
        allocation: how weight formats were chosen, None if they were not.
    """
    require("matplotlib", "plot").use("Agg")
    pyplot = require("matplotlib.pyplot", "plot")
    by_error = sorted(modules, key=lambda name: error_of(report[name]))
    shown = [by_error[0], by_error[len(by_error) // 2], by_error[-1]]
    seen = {name: entry for name, entry in report.items() if WITH_DATA in entry}
    heights = (1, 1.2, *((1.1,) if seen else ()), *((1.2,) if allocation else ()))
    figure = pyplot.figure(figsize=(15, 4 * len(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 3, height_ratios=heights)
    for column, (name, size) in enumerate(zip(shown, ("smallest", "median", "largest"), strict=True)):
        _plot_weights(figure.add_subplot(grid[0, column]), modules[name], report[name], f"{size} error: {_short(name)}")
    _plot_errors(figure.add_subplot(grid[1, :]), report)
    if seen:
        _plot_activations(figure.add_subplot(grid[2, :]), seen)
    if allocation:
        _plot_allocation(figure.add_subplot(grid[len(heights) - 1, :]), allocation)
    figure.suptitle(f"{title}: what each layer was given and what it cost")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=110)
    pyplot.close(figure)
    part.replace(path)


def _plot_weights(axis: Axes, layer: QuantLinear, entry: dict, title: str) -> None:
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


def _plot_errors(axis: Axes, report: dict) -> None:
    names = list(report)
    seen = [i for i, name in enumerate(names) if WITH_DATA in report[name]]
    unseen = [i for i, name in enumerate(names) if WITH_DATA not in report[name]]
    labels = ("of the output, with quantized activations", "of the weight itself: the layer saw no calibration data")
    for places, color, label in ((seen, "#4c78a8", labels[0]), (unseen, "#9d9da1", labels[1])):
        if places:
            axis.bar(places, [error_of(report[names[i]]) for i in places], color=color, label=label)
    if seen:
        axis.plot(seen, [report[names[i]]["weight_only_rel_rmse"] for i in seen], ".", color="#e45756", label="weights alone")
    axis.set(ylabel="rel_rmse of each layer", xlim=(-0.7, len(names) - 0.3))
    axis.set_xticks(range(len(names)), [_short(n) for n in names], rotation=90, fontsize=6)
    axis.legend(fontsize=8)
    axis.grid(axis="y", alpha=0.3)


def _plot_activations(axis: Axes, report: dict) -> None:
    peaks = np.array([entry["activation_absmax"] for entry in report.values()]).T
    seen = peaks.max(axis=1, keepdims=True) > 0  # with few sampling steps some buckets stay empty, and are left blank
    image = np.where(seen, np.log10(np.maximum(peaks, 1e-3)), np.nan)
    shown = axis.imshow(image, aspect="auto", cmap="viridis", interpolation="nearest")
    axis.set(ylabel="timestep bucket (0 = noisiest)", title="largest |activation| per timestep bucket, log10")
    axis.set_xticks(range(len(report)), [_short(n) for n in report], rotation=90, fontsize=6)
    axis.figure.colorbar(shown, ax=axis, pad=0.01)


def _plot_allocation(axis: Axes, allocation: dict) -> None:
    layers, formats = allocation["layers"], formats_of(allocation)
    shade = require("matplotlib").colormaps["viridis_r"]
    colors = {name: shade(i / max(1, len(formats) - 1)) for i, name in enumerate(formats)}
    for name in formats:
        places = [i for i, layer in enumerate(layers.values()) if layer["chosen"] == name]
        if places:
            axis.bar(places, bits_of(name), color=colors[name], label=f"{name}: {len(places)} layers")
    axis.set(ylabel="weight bits", xlim=(-0.7, len(layers) - 0.3))
    axis.set_title("weight format chosen for each layer, and what it costs", pad=26)
    axis.set_yticks(sorted({bits_of(name) for name in formats}))
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
