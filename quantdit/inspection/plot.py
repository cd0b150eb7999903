"""A picture of a quantized folder: weights and levels, errors, activations per timestep, the choice of weight formats."""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
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

ROW = 0.19  # inches of a layer
LONGEST = 150.0  # inches of all layers
SMALL = 10  # points
NUMBERED = re.compile(r".*?\.(\d+)\.")  # `blocks.0.` of a layer's name
WEIGHTS = (
    "Blue: the layer's weights, smoothed and rotated as they are stored, divided by the scale of their output channel."
    " Red: the whole numbers that the stored codes decode to, as high as they are used often; weight = scale x number."
)
ERRORS = (
    "rel_rmse: root mean square error of the layer's output on calibration data, relative to that of the full-precision output"
    " without bias. 0.05 is 5 %."
)
ACTIVATIONS = "Sampling goes from left, the noisiest, to right. Color: log10 of the largest magnitude that reached the layer."
ALLOCATION = (
    "Bars: bits of the layer's weight format. Dots: error of the model's output, relative to it, that quantizing this layer"
    " alone causes."
)


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

    Layers lie below each other, a row each in all panels, so the picture is the longer the more there are.

    Args:
        path: the PNG file to write.
        title: names the model.
        modules: the quantized layers.
        report: what the calibration report says of each.
        allocation: how weight formats were chosen, None if they were not.
    """
    require("matplotlib", "plot").use("Agg")
    pyplot = require("matplotlib.pyplot", "plot")
    seen = any(WITH_DATA in entry for entry in report.values())
    panels = 1 + seen + bool(allocation)
    rows = min(ROW * len(report), LONGEST)
    heights = (1.5, 4, max(rows, 3))
    figure = pyplot.figure(figsize=(max(14, 4 + 6 * panels), sum(heights) + 2), layout="constrained")
    head, below = figure.subfigures(2, 1, height_ratios=(heights[1], sum(heights) - heights[1] + 2))
    by_error = sorted(modules, key=lambda name: error_of(report[name]))
    shown = (by_error[0], by_error[len(by_error) // 2], by_error[-1])
    axes = head.subplots(1, 3)
    for axis, name, size in zip(axes, shown, ("smallest", "median", "largest"), strict=True):
        _plot_weights(axis, modules[name], report[name], f"{name}\n{size} error, {modules[name].spec.format}")
    head.supxlabel(WEIGHTS, fontsize=SMALL)
    first, *others = below.subplots(1, panels, sharey=True, squeeze=False)[0]
    _plot_errors(first, report)
    if seen:
        _plot_activations(others[0], report)
    if allocation:
        _plot_allocation(others[-1], allocation, list(report))
    _name_rows(first, list(report), rows)
    figure.suptitle(f"{title}: what each layer was given and what it cost")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=110)
    pyplot.close(figure)
    part.replace(path)


def _plot_weights(axis: Axes, layer: QuantLinear, entry: dict, title: str) -> None:
    counts, reach = entry["weight_histogram"]["counts"], entry["weight_histogram"]["reach"] or 1.0
    edges = np.linspace(-reach, reach, len(counts) + 1)
    axis.stairs(np.array(counts) / sum(counts) / (edges[1] - edges[0]), edges, fill=True, color="#b8cbe0", label="weights")
    integers = layer.decoded().float().numpy().ravel()
    values, used = np.unique(integers, return_counts=True)
    axis.vlines(values, 0, used / used.max() * axis.get_ylim()[1] * 0.5, color="#c0392b", linewidth=0.8, label="levels")
    axis.set(xlabel="weight / scale of its output channel", yticks=[])
    axis.set_title(title, fontsize=SMALL)
    axis.legend(fontsize=SMALL)


def _plot_errors(axis: Axes, report: dict) -> None:
    entries = list(report.values())
    seen = [i for i, entry in enumerate(entries) if WITH_DATA in entry]
    unseen = [i for i, entry in enumerate(entries) if WITH_DATA not in entry]
    labels = ("of the output, with quantized activations", "of the weight itself: the layer saw no calibration data")
    for places, color, label in ((seen, "#4c78a8", labels[0]), (unseen, "#9d9da1", labels[1])):
        if places:
            axis.barh(places, [error_of(entries[i]) for i in places], color=color, label=label)
    if seen:
        alone = [entries[i]["weight_only_rel_rmse"] for i in seen]
        axis.plot(alone, seen, ".", color="#e45756", label="of the output, with quantized weights alone")
    axis.grid(axis="x", alpha=0.3)
    _explain(axis, "Error of each layer (rel_rmse)", ERRORS)


def _plot_activations(axis: Axes, report: dict) -> None:
    count = max(len(entry.get("activation_absmax", ())) for entry in report.values())
    peaks = np.array([entry.get("activation_absmax", [np.nan] * count) for entry in report.values()])
    parts = np.flatnonzero((peaks > 0).any(axis=0))  # with few sampling steps some hold none
    image = np.log10(np.maximum(peaks[:, parts], 1e-3))
    shown = axis.imshow(image, aspect="auto", cmap="viridis", interpolation="nearest")
    axis.set_xticks(range(len(parts)), [str(part) for part in parts])
    if np.isnan(peaks).any():
        axis.set_facecolor("#d9d9d9")
        axis.plot([], [], "s", color="#d9d9d9", label="the layer saw no calibration data")
    left_out = (
        f" Parts that no sampling step fell into are left out: {count - len(parts)} of {count}." if len(parts) < count else ""
    )
    axis.figure.colorbar(shown, ax=axis, pad=0.01, location="right", aspect=60, label="log10")
    _explain(axis, "Largest |input| in each part of sampling", ACTIVATIONS + left_out)


def _plot_allocation(axis: Axes, allocation: dict, names: list[str]) -> None:
    layers, formats = [allocation["layers"][name] for name in names], formats_of(allocation)
    shade = require("matplotlib").colormaps["viridis_r"]
    for number, name in enumerate(formats):
        places = [i for i, layer in enumerate(layers) if layer["chosen"] == name]
        if places:
            color = shade(number / max(1, len(formats) - 1))
            axis.barh(places, bits_of(name), color=color, label=f"{name}: {len(places)} layers")
    axis.set_xticks(sorted({bits_of(name) for name in formats}))
    errors = axis.twiny()
    chosen = [layer["weights"][layer["chosen"]]["error"] for layer in layers]
    errors.plot(chosen, range(len(layers)), "o", color="#c0392b", markeredgecolor="white")
    axis.plot([], [], "o", color="#c0392b", markeredgecolor="white", label="error it causes alone (scale above)")
    errors.set(xscale="log")
    _explain(axis, "Weight format chosen for each layer", ALLOCATION)


def _explain(axis: Axes, title: str, caption: str) -> None:
    """Give a panel its title and legend above, and below what its terms mean."""
    entries = len(axis.get_legend_handles_labels()[0])
    if entries:
        axis.legend(fontsize=SMALL, loc="lower left", bbox_to_anchor=(0, 1.02), frameon=False, borderaxespad=0)
    axis.set_title(title, pad=30 + 14 * entries)
    axis.set_xlabel(textwrap.fill(caption, 62), fontsize=SMALL, loc="left", multialignment="left")


def _name_rows(axis: Axes, names: list[str], inches: float) -> None:
    """Name the rows of panels that share them; every second, third, ... where they are closer than a line of text.

    What most names begin with is left out, and said.
    """
    step = math.ceil(ROW * len(names) / inches)
    begins = Counter(name[: found.start(1)] for name in names if (found := NUMBERED.match(name)))
    common = max(begins, key=lambda begin: begins[begin], default="")
    axis.set_yticks(range(0, len(names), step), [name.removeprefix(common) for name in names[::step]], fontsize=SMALL)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_ylabel(f"layers, {common} left out" if common else "layers", loc="top", fontsize=SMALL)
