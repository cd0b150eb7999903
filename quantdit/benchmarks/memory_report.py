"""The page and the picture of `quantdit bench memory`, made of its rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantdit.system.optional_import import require

GIB = 2**30
CARDS = (6, 8, 12, 16, 24)  # GiB
ENCODERS = "text encoders"


def markdown(rows: Sequence[dict], picture: str) -> str:
    """Return the rows as a page: what fits, the bytes of components, live bytes of stages, checks.

    Args:
        rows: of a run.
        picture: its name beside the page.
    """
    first = rows[0]
    pipelines, parts = _of(rows, "pipeline"), _of(rows, "component")
    return "\n".join(
        [
            "# Memory of whole pipelines",
            "",
            "What a pipeline takes at 480 x 832 pixels (Wan: 81 frames), in GiB, and which cards it fits. Weights are",
            "arithmetic: what the recipes of calibration store, of the published configs. Activations are modelled: each class's",
            "own forward runs on the meta device, and what lives at once is counted. Nothing here was run on a GPU; the last",
            "table holds both against files and peaks measured on a CPU.",
            f"torch {first['torch']}, {first['commit']}. Made by `{first['command']}`.",
            "",
            f"![Weights and largest activations of each pipeline]({picture})",
            "",
            "## What fits",
            "",
            "* **all**: every component stays on the card. **offload**: one at a time (`pipeline.enable_model_cpu_offload()`).",
            "* **tiled**: with `pipeline.vae.enable_tiling()`, which such a card needs: decoding the whole sample is the peak.",
            "* In brackets: the component that runs at the peak.",
            f"* {_gib(pipelines[0]['reserve_bytes'])} GiB of a card are left to CUDA and its allocator: assumed, not measured.",
            "",
            f"| pipeline | bits | weights | all | offload | offload, tiled | {' | '.join(f'{card} GB' for card in CARDS)} |",
            "|---|---|---" + "|---" * (3 + len(CARDS)) + "|",
            *(_pipeline_line(row, parts) for row in pipelines),
            "",
            "## Weights by component",
            "",
            "Bytes of the tensors in its files, GiB. The widths stand for these presets:",
            "",
            *_presets(parts),
            "",
            "Text encoders have no preset of 2 bits, so theirs stay at 4 there. Their table of words is in 8 bits at w8 and in",
            "6 below. The vision tower and the head of Qwen2.5-VL (2.3 GiB) stay in 16 bits, and so does the VAE.",
            "",
            *_by_bits(parts, "file_bytes"),
            "",
            "## Activations by component",
            "",
            "Inputs and what lives at once in one call, weights aside, GiB. Quantized layers run as on an Ada card, where no",
            "kernel rotates smoothed tokens: 4 million numbers at a time, which take two copies in float32 and one in 16 bits.",
            "",
            *_by_bits(parts, "live_bytes"),
            "",
            "## Predicted and measured",
            "",
            "On a CPU. Files: random weights, no data. Steps, encoder and decodes: what torch's allocator gave out at most, in",
            "bfloat16.",
            "",
            "| what | predicted, MB | measured, MB | predicted / measured |",
            "|---|---|---|---|",
            *(
                f"| {r['of']} | {r['predicted_bytes'] / 1e6:.2f} | {r['measured_bytes'] / 1e6:.2f} | {r['ratio']:.3f} |"
                for r in _of(rows, "check")
            ),
            "",
        ]
    )


def _of(rows: Sequence[dict], what: str) -> list[dict]:
    return [row for row in rows if row["what"] == what]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size < GIB else f"{size / GIB:.1f}"


def _pipeline_line(row: dict, parts: Sequence[dict]) -> str:
    weights = sum(part["memory_bytes"] for part in parts if (part["model"], part["bits"]) == (row["model"], row["bits"]))
    stage = {way: name.replace("text_encoder", "encoder").replace("_", " ") for way, name in row["peak_stage"].items()}
    peaks = [f"{_gib(row['peak_bytes'][way])} ({stage[way]})" for way in ("all", "offload", "offload, tiled")]
    return f"| {row['model']} | {row['bits']} | {_gib(weights)} | {' | '.join(peaks)} | {' | '.join(row['cards'].values())} |"


def _presets(parts: Sequence[dict]) -> list[str]:
    kinds = ("transformer", "text encoders")
    found = {(row["bits"], kinds[row["component"] != "transformer"]): row["preset"] for row in parts if row["preset"]}
    widths = list(dict.fromkeys(bits for bits, _ in found))
    lines = [f"| | {' | '.join(widths)} |", "|---" + "|---" * len(widths) + "|"]
    return lines + [f"| {kind} | {' | '.join(found.get((bits, kind), '') for bits in widths)} |" for kind in kinds]


def _by_bits(parts: Sequence[dict], key: str) -> list[str]:
    """Return a table of a number of each component at each width; a VAE's tiled decode has a line of its own."""
    widths = list(dict.fromkeys(row["bits"] for row in parts))
    lines = [f"| pipeline | component | {' | '.join(widths)} |", "|---|---" + "|---" * len(widths) + "|"]
    for model, component, part in dict.fromkeys((row["model"], row["component"], row["part"]) for row in parts):
        of = {row["bits"]: row for row in parts if (row["model"], row["component"]) == (model, component)}
        name = component if component == "transformer" else f"{component} ({part})"
        lines.append(f"| {model} | {name} | {' | '.join(_gib(of[bits][key]) for bits in widths)} |")
        if key == "live_bytes" and component == "vae":
            tiled = [of[bits]["live_bytes_tiled"] for bits in widths]
            figures = " | ".join("one tile" if size is None else _gib(size) for size in tiled)
            lines.append(f"| {model} | the same, tiled | {figures} |")
    return lines


def draw(path: Path, rows: Sequence[dict]) -> None:
    """Draw a bar for each pipeline and width: weights by component, the largest activations on top; the cards as lines.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    require("matplotlib", "plot").use("Agg")
    pyplot = require("matplotlib.pyplot", "plot")
    pipelines, parts = _of(rows, "pipeline"), _of(rows, "component")
    models = list(dict.fromkeys(row["model"] for row in pipelines))
    colours = {ENCODERS: "#7a9fc4", "transformer": "#22577a", "vae": "#c8553d", "largest activations": "#f0c987"}
    figure, axes = pyplot.subplots(figsize=(13, 6.5), layout="constrained")
    places, names, top = [], [], 0.0
    for number, row in enumerate(pipelines):
        place = number + models.index(row["model"])
        own = [part for part in parts if (part["model"], part["bits"]) == (row["model"], row["bits"])]
        heights = dict.fromkeys(colours, 0.0)
        for part in own:
            heights[part["component"] if part["component"] in heights else ENCODERS] += part["memory_bytes"] / GIB
        heights["largest activations"] = row["peak_bytes"]["all"] / GIB - sum(heights.values())
        foot = 0.0
        for kind, height in heights.items():
            axes.bar(place, height, bottom=foot, color=colours[kind], width=0.82, label=kind if number == 0 else None)
            foot += height
        axes.text(place, foot + 0.45, f"{foot:.1f}", ha="center", fontsize=8, bbox={"fc": "white", "ec": "none", "pad": 0.4})
        one = row["peak_bytes"]["offload, tiled"] / GIB
        label = "peak of one component at a time, VAE tiled" if number == 0 else None
        axes.plot([place - 0.41, place + 0.41], [one, one], color="black", lw=2, label=label)
        places.append(place)
        names.append(row["bits"])
        top = max(top, foot)
    for card in CARDS:
        axes.axhline(card, color="grey", lw=0.8, ls="--", zorder=0)
        axes.annotate(f"{card} GB", (1.005, card), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    for model in models:
        own = [place for place, row in zip(places, pipelines, strict=True) if row["model"] == model]
        axes.text(sum(own) / len(own), -0.09, model, transform=axes.get_xaxis_transform(), ha="center", fontsize=11)
    axes.set(xticks=places, xticklabels=names, ylabel="GiB at 480 x 832", ylim=(0, top * 1.08), xlim=(-0.8, places[-1] + 0.8))
    axes.legend(loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
