"""What is inside a quantized folder, as a table and as pictures."""

from __future__ import annotations

from pathlib import Path

from quantdit import checkpoint
from quantdit.checkpoint import CheckpointError
from quantdit.compiler import REPORT, size_of
from quantdit.linear import QuantLinear, weight_bits


def describe(folder: Path) -> str:
    """Return a table with one line per layer: shape, format, bits per weight, rotation, output error, J.

    Raises:
        CheckpointError: the folder is no quantdit checkpoint or is damaged.
    """
    transformer, report = _read(folder)
    layers = checkpoint.quant_layers(transformer)
    width = max((len(name) for name in layers), default=5)
    row = "{:<{width}}  {:>13}  {:<14}{:>7}  {:<13}{:>4}  {:>9}  {:>8}"
    lines = [row.format("layer", "shape", "format", "bits/w", "rotation", "act", "rel_rmse", "J (rms)", width=width)]
    for name, layer in layers.items():
        entry, s = report.get(name, {}), layer.spec
        form = s.format if s.group_size == s.in_features else f"{s.format} g{s.group_size}"
        cells = (name, f"{s.out_features}x{s.in_features}", form, f"{weight_bits(layer):.3f}", _rotation(layer))
        measured = (_number(entry.get("rel_rmse"), ".5f"), _number(entry.get("rms"), ".3f"))
        lines.append(row.format(*cells, f"a{layer.activation_bits}", *measured, width=width))
    size = size_of(transformer, folder / "transformer" / checkpoint.WEIGHTS)
    lines.append(
        f"{len(layers)} layers, {size['quantized_weights']:,} weights at {size['bits_per_weight']:.3f} bits with scales,"
        f" {size['dense_values']:,} dense values, file {size['file_bytes'] / 1e6:.2f} MB"
    )
    return "\n".join(lines)


def plot(folder: Path, path: Path) -> None:
    """Draw weight histograms with the levels given, the output error of each layer, and activation absmax per timestep.

    Raises:
        CheckpointError: as `describe`, or the folder has no calibration report to draw.
        ValueError: matplotlib is not installed.
    """
    transformer, report = _read(folder)
    if not report:
        raise CheckpointError(f"{folder / REPORT} is missing, so there is nothing to draw; calibrate again to get one")
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'quantdit[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = checkpoint.quant_layers(transformer)
    by_error = sorted(layers, key=lambda name: report[name]["rel_rmse"])
    shown = [by_error[0], by_error[len(by_error) // 2], by_error[-1]]
    figure = plt.figure(figsize=(15, 12), layout="constrained")
    grid = figure.add_gridspec(3, 3, height_ratios=(1, 1.2, 1.1))
    for column, (name, title) in enumerate(zip(shown, ("smallest", "median", "largest"), strict=True)):
        _plot_weights(figure.add_subplot(grid[0, column]), layers[name], report[name], f"{title} error: {_short(name)}")
    _plot_errors(figure.add_subplot(grid[1, :]), report)
    _plot_activations(figure.add_subplot(grid[2, :]), report)
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
    axis.set(title=title, xlabel=f"I  ({entry['spec']['format']})", yticks=[])
    axis.title.set_fontsize(9)
    axis.legend(fontsize=8)


def _plot_errors(axis, report: dict) -> None:
    names = list(report)
    places = range(len(names))
    axis.bar(places, [report[n]["rel_rmse"] for n in names], color="#4c78a8", label="with quantized activations")
    axis.plot(places, [report[n]["weight_only_rel_rmse"] for n in names], ".", color="#e45756", label="weights alone")
    axis.set(ylabel="rel_rmse of the layer's output", xlim=(-0.7, len(names) - 0.3))
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


def _short(name: str) -> str:
    return name.replace("transformer_blocks.", "").replace("timestep_embedder.", "t_")


def _read(folder: Path):
    if not (folder / "transformer").is_dir():
        raise CheckpointError(f"{folder} has no transformer folder; give the folder that quantdit calibrate wrote")
    transformer = checkpoint.read_transformer(folder / "transformer")
    report = checkpoint.read_json(folder / REPORT).get("layers") if (folder / REPORT).exists() else {}
    known = {"rel_rmse", "weight_only_rel_rmse", "rms", "activation_absmax", "weight_histogram", "spec"}
    names = checkpoint.quant_layers(transformer).keys()
    whole = isinstance(report, dict) and all(isinstance(entry, dict) and entry.keys() >= known for entry in report.values())
    if not whole or (report and report.keys() != names):
        raise CheckpointError(
            f"{folder / REPORT} does not fit the checkpoint; remove it (inspect works without) or calibrate again"
        )
    return transformer, report


def _rotation(layer: QuantLinear) -> str:
    return f"hadamard-{layer.hadamard_block}" if layer.hadamard_block > 1 else "none"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
