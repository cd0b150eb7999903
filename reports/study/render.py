"""Make `study.md` and its plot from the rows of FILES in `reports/study`: `python reports/study/render.py`."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

HERE = Path(__file__).parent
FILES = ("floor.jsonl", "peers.jsonl", "quantdit.jsonl")
# Facts of the model rather than methods; they stand above the tables.
BASELINES = ("full precision", "noise floor")
OURS = "quantdit"

COLUMNS = (
    "package, method",
    "bits per weight",
    "PSNR, dB",
    "worst image",
    "SSIM",
    "FD",
    "KID x 1000",
    "class accuracy",
    "mean rel_rmse",
    "seconds",
)

# A colour and a marker a package, in this order; quantdit is the first and the only filled one.
STYLES = (
    ("#c0392b", "o"),
    ("#1f77b4", "s"),
    ("#2a8a4a", "^"),
    ("#8e44ad", "D"),
    ("#d17c00", "v"),
    ("#16808a", "P"),
    ("#7f5539", "X"),
    ("#5a5a5a", "<"),
)


def read_rows(folder: Path) -> list[dict]:
    """Return the rows of those of FILES that the folder has."""
    found = [folder / name for name in FILES if (folder / name).exists()]
    return [json.loads(line) for path in found for line in path.read_text().splitlines() if line]


def widths(bits: str) -> tuple[int, int]:
    """Return weight and activation bits of `w4a8`."""
    found = re.fullmatch(r"w(\d+)a(\d+)", bits)
    if found is None:
        raise ValueError(f"bits {bits!r} are not of the form w4a8")
    return int(found[1]), int(found[2])


def markdown(rows: list[dict], pictures: list[str]) -> str:
    """Return the report: baselines, a table for each width, failed rows, notes."""
    measured = [row for row in rows if "psnr" in row]
    failed = [row for row in rows if "psnr" not in row]
    methods = [row for row in measured if row["method"] not in BASELINES]
    lines = [
        "# quantdit and other packages on fashion-dit",
        "",
        "64 images of each of four seeds, 20 Euler steps, guidance 2, float32 on a CPU, compared image by image with full",
        "precision. [a, b] is the 95 % t-interval over the seeds; all rows share the seeds, so differences are finer than these.",
        "FD and KID are on EfficientNet-Lite0 features, between the 64 images of one seed. Class accuracy: images that the",
        "embedded classifier puts into the class asked for. Bits per weight: stored bytes of codes, scales, zero points, tables",
        "and low-rank factors over the quantized weights, all linears inside the blocks. Mean rel_rmse: error of the layers'",
        "outputs on inputs of full precision, quantized activations included. Seconds of quantizing are from a shared CPU: an",
        "order of magnitude. Made by `make study` and `make study-peers`.",
        "",
    ]
    lines += [f"![PSNR against stored bits per weight]({name})" for name in pictures]
    baselines = [row for row in measured if row["method"] in BASELINES]
    if baselines:
        lines += ["", "## Full precision", "", *_table(baselines)]
    for bits in sorted({row["bits"] for row in methods}, key=lambda b: (widths(b)[1], -widths(b)[0]), reverse=True):
        chosen = sorted((r for r in methods if r["bits"] == bits), key=lambda r: -r["psnr"]["mean"])
        lines += ["", f"## {bits}", "", *_table(chosen)]
    if failed:
        lines += ["", "## What could not run", "", "| package, method | bits | why |", "|---|---|---|"]
        lines += [f"| {_name(r)} | {r['bits']} | {_plain(r.get('error', 'no metrics'))} |" for r in failed]
    lines += ["", "## Notes", ""]
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.get("note"):
            notes.setdefault(row["note"], []).append(f"{row['package']} {row['method']} ({row['bits']})")
    lines += [f"- {note}: {'; '.join(names)}" for note, names in notes.items()]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict]) -> list[str]:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        psnr, fd = row["psnr"], row["fd"]
        low, high = psnr["interval"] or (psnr["mean"], psnr["mean"])
        error = row.get("mean_rel_rmse")
        cells = (
            _name(row),
            f"{row['bits_per_weight']:.2f}",
            f"{psnr['mean']:.2f} [{low:.2f}, {high:.2f}]",
            f"{psnr['worst']:.1f}",
            f"{row['ssim']['mean']:.4f}",
            f"{fd['mean']:.2f}",
            f"{1000 * row['kid']['mean']:.2f}",
            f"{100 * row['class_accuracy']['pooled']:.1f} %",
            "" if error is None else f"{error:.4f}",
            "" if row["seconds"] is None else f"{row['seconds']:.1f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _name(row: dict) -> str:
    name = f"{row['package']} {row['version']}, {row['method']}"
    return f"**{name}**" if row["package"] == OURS and row["method"] not in BASELINES else name


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def plot(rows: list[dict], path: Path) -> None:
    """Draw PSNR against stored bits per weight, one panel for each activation width, every point with its method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = [row for row in rows if "psnr" in row and row["method"] not in BASELINES]
    panels = sorted({widths(row["bits"])[1] for row in points}, reverse=True)
    packages = sorted({row["package"] for row in points}, key=lambda p: (p != OURS, p))
    styles = dict(zip(packages, STYLES, strict=False))
    counts = [sum(widths(row["bits"])[1] == activation for row in points) for activation in panels]
    heights = [min(9, 3.5 + 0.3 * count) for count in counts]
    size = {"figsize": (13, sum(heights)), "height_ratios": heights, "layout": "constrained"}
    figure, axes = plt.subplots(len(panels), 1, squeeze=False, **size)
    for axis, activation in zip(axes[:, 0], panels, strict=True):
        chosen = [row for row in points if widths(row["bits"])[1] == activation]
        for package in packages:
            own = [row for row in chosen if row["package"] == package]
            if not own:
                continue
            colour, marker = styles[package]
            x, y = [row["bits_per_weight"] for row in own], [row["psnr"]["mean"] for row in own]
            error = [[row["psnr"]["mean"] - (row["psnr"]["interval"] or [row["psnr"]["mean"]] * 2)[0] for row in own]]
            axis.errorbar(x, y, error * 2, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.5)
            face = colour if package == OURS else "white"
            axis.scatter(x, y, s=70 if package == OURS else 45, c=face, edgecolors=colour, marker=marker, label=package, zorder=3)
        axis.set_xscale("log", base=2)
        ticks = [2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9, 12]
        values = [row["bits_per_weight"] for row in chosen]
        low, high = min(values) * 0.77, max(*values, 1.1 * min(values)) * 1.12
        axis.set_xlim(low, high)
        axis.set_xticks([t for t in ticks if low <= t <= high])
        axis.margins(y=0.12)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.set_xlabel("stored bits per weight")
        axis.set_ylabel("PSNR to full precision, dB")
        axis.set_title(f"activations {'left alone' if activation == 16 else f'in {activation} bits'}")
        axis.legend(loc="upper left", fontsize=9)
        figure.canvas.draw()
        _label(axis, chosen, styles)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _label(axis, rows: list[dict], styles: dict[str, tuple[str, str]]) -> None:
    """Write each point's method beside it, in the nearest of some places where no other text or point is."""
    figure = axis.figure
    renderer = figure.canvas.get_renderer()
    frame = axis.get_window_extent(renderer)
    taken = [axis.get_legend().get_window_extent(renderer)]
    marks = [axis.transData.transform((row["bits_per_weight"], row["psnr"]["mean"])) for row in rows]
    shifts = [0] + [sign * step for step in range(7, 280, 7) for sign in (1, -1)]
    places = [(side, shift) for shift in shifts for side in ("right", "left")]
    for row in sorted(rows, key=lambda r: (r["method"] != "preset", r["package"] != OURS, -r["psnr"]["mean"])):
        colour, _ = styles[row["package"]]
        weight = "bold" if row["package"] == OURS else "normal"
        for side, shift in places:
            text = axis.annotate(
                f"{row['bits'].split('a')[0]} {row['method']}",
                (row["bits_per_weight"], row["psnr"]["mean"]),
                (9 if side == "right" else -9, shift),
                textcoords="offset points",
                ha="left" if side == "right" else "right",
                va="center",
                fontsize=7.5,
                color=colour,
                weight=weight,
                arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.4, "alpha": 0.6} if abs(shift) > 7 else None,
            )
            box = text.get_window_extent(renderer)
            free = all(not box.overlaps(other) for other in taken)
            free = free and not any(box.x0 - 3 < a < box.x1 + 3 and box.y0 - 2 < b < box.y1 + 2 for a, b in marks)
            if free and frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1:
                taken.append(box)
                break
            text.remove()


def main() -> None:
    """Write the report and the plot beside the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=HERE, help="where the .jsonl files are and the report goes")
    args = parser.parse_args()
    rows = read_rows(args.folder)
    plot(rows, args.folder / "psnr.png")
    (args.folder / "study.md").write_text(markdown(rows, ["psnr.png"]))


if __name__ == "__main__":
    main()
