"""The presets on models with planted activation outliers, each against its own full precision.

    python reports/robust.py [--work DIR] [--only "channels" "w4a8"] [--quick]

MODELS are the embedded models and tiny ones of other classes, as they are ("tame") and planted
(quantdit/models/planted_outliers.py). Each is calibrated to each preset with seed 0, as `quantdit calibrate` does it, and
sampled with the seeds and the noise of its full precision. A row is a model and a preset; rows that the file has are kept,
so an interrupted run goes on; delete a line to repeat it. `--plant` only writes the planted models' folders (WORK/models);
`--peers` collects what reports/study/peers.py made of them (WORK/peers/MODEL/PEER) into robust-peers.jsonl. Writes robust.md
and pictures/robust.png.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quantdit.cli import main as quantdit
from quantdit.compiling.report import REPORT
from quantdit.evaluation.metrics.intervals import bootstrap
from quantdit.evaluation.metrics.paired import capped, psnr
from quantdit.models.adapter import adapter_for
from quantdit.models.planted_outliers import plant
from quantdit.models.synthetic import synthetic_inputs
from quantdit.pipelines.generate import generate
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.system import files

HERE = Path(__file__).parent
# PYTHONSAFEPATH, which the Makefile sets, keeps these folders off the path.
sys.path += [str(HERE / "study"), str(HERE.parent / "tests" / "models")]
import measure  # noqa: E402
import tiny_models  # noqa: E402

ROWS, PEER_ROWS = HERE / "robust.jsonl", HERE / "robust-peers.jsonl"
WORK = Path(tempfile.gettempdir()) / "quantdit-robust"
TAME = "tame"
SEED, COUNT = 0, 2
DATA_SEED = 100  # of the samples that show `plant` the activations, and on which the change of the function is measured
TARGET = 1.2  # a preset is robust if planting makes its error at most this many times as large

PRESETS = {
    "w4a8": ("--bits", "w4a8"),
    "w3a8": ("--bits", "w3a8"),
    "w2a16": ("--bits", "w2a16"),
    "w4a4": ("--bits", "w4a4"),
    "w4a8, no data": ("--bits", "w4a8", "--samples", "0"),
}


@dataclass(frozen=True)
class Family:
    """How copies of one model are calibrated and sampled; a family without `seeds` has no pipeline and is not sampled."""

    calibration: tuple[str, ...]
    samples: int = 0
    seeds: tuple[int, ...] = ()
    guidance: float = 1.0
    presets: tuple[str, ...] = tuple(PRESETS)


FASHION, EMOJI, STEPS = "fashion-dit", "emoji-wan", 20
TINY = Family(("--samples", "8", "--steps", "8"), presets=("w4a8", "w4a4"))
FAMILIES = {
    FASHION: Family(("--samples", "32", "--steps", "20", "--guidance", "2"), measure.SAMPLES, measure.SEEDS, measure.GUIDANCE),
    EMOJI: Family(("--samples", "16", "--steps", "20", "--guidance", "3"), 16, (1,), 3.0),
    "WanTransformer3DModel": TINY,
    "FluxTransformer2DModel": TINY,
    "SD3Transformer2DModel": TINY,
    "PixArtTransformer2DModel": TINY,
}
QUICK = {
    FASHION: Family(("--samples", "8", "--steps", "6", "--guidance", "2"), 16, (1,), measure.GUIDANCE),
    EMOJI: Family(("--samples", "4", "--steps", "4", "--guidance", "3"), 4, (1,), 3.0),
}


@dataclass(frozen=True)
class Copy:
    """A model of a family with outliers of one shape, or none."""

    family: str
    shape: str = TAME
    size: float = 0.0

    @property
    def name(self) -> str:
        """Return what names it in its family."""
        return TAME if self.shape == TAME else f"{self.shape} x {self.size:g}"

    @property
    def slug(self) -> str:
        """Return the name of its folder."""
        return f"{self.family}-{self.name}".replace(" ", "-")


SHAPES = (
    (TAME, 0.0),
    ("channels", 30.0),
    ("channels", 245.0),
    ("channels", 1000.0),
    ("massive_tokens", 1000.0),
    ("timesteps", 245.0),
    ("changing", 245.0),
    ("one_block", 245.0),
    ("feed_forward", 245.0),
)
FEW = ((TAME, 0.0), ("channels", 245.0))
MODELS = tuple(Copy(name, *shape) for name in FAMILIES for shape in (SHAPES if name == FASHION else FEW))


def plant_copy(model: Copy, work: Path) -> Path | str:
    """Return what `load_pipeline` takes: the alias of a tame embedded model, else the copy's folder, made if it is missing."""
    family = FAMILIES[model.family]
    if family.seeds and model.shape == TAME:
        return model.family
    folder = work / "models" / model.slug
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        pipeline = load_pipeline(model.family)[0] if family.seeds else None
        transformer = pipeline.transformer if family.seeds else tiny_models.tiny(model.family)[0]
        moved = plant_in(transformer, model, _runner(pipeline, family))
        (pipeline or transformer).save_pretrained(partial)
        (partial / "moved.json").write_text(json.dumps(moved))
        partial.rename(folder)
    return folder


def _runner(pipeline: object | None, family: Family) -> Callable[[], object] | None:
    """Return what samples the pipeline as the study does; None without one."""
    if pipeline is None:
        return None
    count = min(family.samples, 32)
    return lambda: generate(pipeline, count, DATA_SEED, STEPS, family.guidance, batch=count, description="activations")


def plant_in(transformer: nn.Module, model: Copy, run: Callable[[], object] | None) -> float:
    """Plant the outliers; returns the relative change of the transformer's output over a sampling of the tame model."""
    if model.shape == TAME:
        return 0.0
    calls: list[tuple[tuple, dict]] = []
    if run is None:
        generator, adapter = torch.Generator().manual_seed(DATA_SEED), adapter_for(transformer)
        size = tiny_models.TINY[model.family][1]
        calls = [((), synthetic_inputs(transformer, adapter, size, generator, time)) for time in (950, 650, 350, 50)]
    else:
        handle = transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        run()
        handle.remove()
    tame = copy.deepcopy(transformer)
    plant(transformer, model.shape, model.size, COUNT, run=run)
    with torch.no_grad():
        pairs = [(_output(tame, call), _output(transformer, call)) for call in calls]
    lost = sum(float((b - a).square().sum()) for a, b in pairs)
    return measure.six((lost / sum(float(a.square().sum()) for a, _ in pairs)) ** 0.5)


def _output(transformer: nn.Module, call: tuple[tuple, dict]) -> Tensor:
    return transformer(*call[0], **(call[1] | {"return_dict": False}))[0]


def reference_of(model: Copy, folder: Path | str, family: Family, work: Path) -> Tensor:
    """Return the samples of full precision, made once and kept in `work`."""
    path = work / "references" / f"{model.slug}-{family.samples}x{len(family.seeds)}.safetensors"
    if not path.exists():
        measure.save({"samples": sampled(str(folder), family)}, path)
    return load_file(path)["samples"]


def sampled(folder: str, family: Family) -> Tensor:
    """Return samples `[seeds * n, ...]` in [-1, 1], seed by seed."""
    pipeline, _ = load_pipeline(folder)
    prompts = list(pipeline.prompts)[: family.samples] if hasattr(pipeline, "prompts") else None
    batch = family.samples if prompts is None else 8
    with torch.no_grad():
        made = [generate(pipeline, family.samples, seed, STEPS, family.guidance, batch, prompts) for seed in family.seeds]
    return torch.cat(made)


def make_row(model: Copy, preset: str, family: Family, work: Path) -> dict:
    """Calibrate, sample, measure."""
    folder, output = plant_copy(model, work), work / "candidate"
    shutil.rmtree(output, ignore_errors=True)
    arguments = ["calibrate", "--model", str(folder), *family.calibration, "--seed", str(SEED), *PRESETS[preset]]
    if quantdit([*arguments, "--output", str(output)]):
        raise SystemExit(f"{model.slug}, {preset}: calibration failed")
    report = files.read_json(output / REPORT)
    layers = {name: layer["rel_rmse"] for name, layer in report["layers"].items() if "rel_rmse" in layer}
    worst = max(layers, key=lambda name: layers[name], default=None)
    moved = Path(folder) / "moved.json"
    row = {
        "family": model.family,
        "model": model.name,
        "preset": preset,
        "bits_per_weight": measure.six(report["size"]["bits_per_weight"]),
        "moved": json.loads(moved.read_text()) if moved.exists() else 0.0,
        "model_rel_rmse": report["model_rel_rmse"],
        "mean_rel_rmse": measure.six(statistics.fmean(layers.values())) if layers else None,
        "worst_rel_rmse": measure.six(layers[worst]) if layers else None,
        "worst_layer": worst,
        "seconds": measure.six(sum(report["seconds"].values())),
        "machine": measure.machine(),
    }
    if family.seeds:
        row["samples"], row["seeds"] = family.samples, list(family.seeds)
        row["psnr"] = paired(reference_of(model, folder, family, work), sampled(str(output), family))
    return row


def paired(reference: Tensor, candidate: Tensor) -> dict:
    """Return mean, bootstrap interval and worst of the PSNR of samples `[n, ...]`, frames of a clip taken together, dB."""
    flat = [x.flatten(1, 2) if x.ndim == 5 else x for x in (reference, candidate)]
    decibels = capped(psnr(*flat))
    found, six = bootstrap(decibels.numpy()), measure.six
    return {
        "mean": six(found.estimate),
        "interval_95": [six(found.low), six(found.high)],
        "worst": six(float(decibels.min())),
    }


def markdown(rows: list[dict], peers: list[dict], picture: str) -> str:
    """Return the page."""
    lines = [
        "# The presets on models with outliers",
        "",
        "Copies of a model get activation outliers as large models have them (`quantdit/models/planted_outliers.py`), and keep",
        "its function. Each copy is quantized by each preset and compared with its own full precision, sample by sample from the",
        "same noise. `x 245`: 245 times as large as the channel was, or as the median hidden channel.",
        "",
        "- `tame`: the model as it is",
        "- `channels`: two channels of each input of attention, of each feed-forward and of the values, in every block",
        "- `one_block`: the same in one middle block",
        "- `feed_forward`: two hidden channels of every feed-forward",
        "- `timesteps`: two channels in the noisy half of the steps alone; `changing`: two other ones in the clean half",
        "- `massive_tokens`: two hidden channels of every feed-forward that about one token in a hundred sets",
        "",
        "Moved: what planting changed of the function, relative. Bits a weight are counted from the file. Model error: relative",
        "error of the transformer's output on calibration inputs; layer errors the same of each linear. Without data there are",
        f"none. Calibration seed {SEED}. Made by `make robust`. Rows of w3a8 and w2a16 so far are of presets with two passes of",
        "coordinate descent, which these have left out since; no difference could be measured.",
        "",
        f"![PSNR by preset and model]({picture})",
    ]
    for family in FAMILIES:
        own = [r for r in rows if r["family"] == family]
        if own and "psnr" in own[0]:
            lines += ["", f"## {family}", "", *_summary(own), "", *_sampled_table(own)]
    bare = [r for r in rows if "psnr" not in r]
    if bare:
        lines += ["", "## Tiny models of other classes, random weights", "", *_bare_table(bare)]
    if peers:
        lines += ["", "## Other packages on the same models", "", *_peer_table(peers)]
    return "\n".join(lines) + "\n"


def _summary(rows: list[dict]) -> list[str]:
    """Return a line for each preset: tame, the mean over all copies, the worst one."""
    lines = ["| preset | tame, dB | mean of all, dB | worst, dB | worst model |", "|---|---|---|---|---|"]
    for preset in PRESETS:
        found = {r["model"]: r["psnr"]["mean"] for r in rows if r["preset"] == preset}
        if found:
            worst = min(found, key=lambda name: found[name])
            tame = f"{found[TAME]:.2f}" if TAME in found else ""
            lines.append(f"| {preset} | {tame} | {statistics.fmean(found.values()):.2f} | {found[worst]:.2f} | {worst} |")
    return lines


def _sampled_table(rows: list[dict]) -> list[str]:
    first = rows[0]
    lines = [
        f"{first['samples']} samples x {len(first['seeds'])} seeds, {STEPS} steps; [a, b]: 95 % bootstrap interval over them.",
        "",
        "| preset | model | bits a weight | PSNR, dB | worst sample | to tame | model error | layer error, mean | worst"
        " | worst layer | moved | calibration |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for preset in PRESETS:
        own = [r for r in rows if r["preset"] == preset]
        tame = next((r["psnr"]["mean"] for r in own if r["model"] == TAME), None)
        for r in sorted(own, key=_place):
            low, high = r["psnr"]["interval_95"]
            cells = (
                preset,
                r["model"],
                f"{r['bits_per_weight']:.2f}",
                f"{r['psnr']['mean']:.2f} [{low:.2f}, {high:.2f}]",
                f"{r['psnr']['worst']:.1f}",
                "" if tame is None else f"{r['psnr']['mean'] - tame:+.2f}",
                *(_error(r[key]) for key in ("model_rel_rmse", "mean_rel_rmse", "worst_rel_rmse")),
                f"`{r['worst_layer']}`" if r["worst_layer"] else "",
                f"{r['moved']:.1e}",
                f"{r['seconds']:.0f} s",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _bare_table(rows: list[dict]) -> list[str]:
    lines = [
        f"Made-up inputs; the target is a ratio of at most {TARGET}.",
        "",
        "| class | model | preset | bits a weight | model error | of tame | ratio | target |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in (r for r in rows if r["model"] != TAME):
        same = [t for t in rows if (t["family"], t["preset"], t["model"]) == (r["family"], r["preset"], TAME)]
        for tame in same:
            ratio = r["model_rel_rmse"] / tame["model_rel_rmse"]
            errors = f"{_error(r['model_rel_rmse'])} | {_error(tame['model_rel_rmse'])} | {ratio:.2f}"
            met = "met" if ratio <= TARGET else "missed"
            lines.append(f"| {r['family']} | {r['model']} | {r['preset']} | {r['bits_per_weight']:.2f} | {errors} | {met} |")
    return lines


def _peer_table(rows: list[dict]) -> list[str]:
    lines = ["| model | package, method | bits | bits a weight | PSNR, dB | worst sample |", "|---|---|---|---|---|---|"]
    for r in rows:
        name = f"{r['model']} | {r['package']} {r['version']}, {r['method']} | {r['bits']}"
        if "psnr" in r:
            lines.append(f"| {name} | {r['bits_per_weight']:.2f} | {r['psnr']['mean']:.2f} | {r['psnr']['worst']:.1f} |")
        else:
            lines.append(f"| {name} | | {r['error'].replace('|', '/')} | |")
    return lines


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _place(row: dict) -> int:
    names = [m.name for m in MODELS if m.family == row["family"]]
    return names.index(row["model"]) if row["model"] in names else len(names)


def plot(rows: list[dict], path: Path) -> None:
    """Draw PSNR by preset, a dot a planted model and a line for the tame one; a panel a family."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    families = [f for f in FAMILIES if any(r["family"] == f and "psnr" in r for r in rows)]
    if not families:
        return
    size = {"figsize": (11, 4.2 * len(families)), "layout": "constrained"}
    figure, axes = plt.subplots(len(families), 1, squeeze=False, **size)
    for axis, family in zip(axes[:, 0], families, strict=True):
        own = [r for r in rows if r["family"] == family]
        presets = [p for p in PRESETS if any(r["preset"] == p for r in own)]
        names = sorted({r["model"] for r in own} - {TAME}, key=lambda name: _place({"family": family, "model": name}))
        for place, preset in enumerate(presets):
            tame = [r["psnr"]["mean"] for r in own if (r["preset"], r["model"]) == (preset, TAME)]
            label = TAME if place == 0 else None
            axis.hlines(tame, place - 0.42, place + 0.42, colors="#5a5a5a", linestyles="dashed", label=label, zorder=1)
        for i, name in enumerate(names):
            found = [r for r in own if r["model"] == name]
            x = [presets.index(r["preset"]) + 0.7 * ((i + 0.5) / len(names) - 0.5) for r in found]
            y = [r["psnr"]["mean"] for r in found]
            spread = [[abs(r["psnr"]["interval_95"][end] - r["psnr"]["mean"]) for r in found] for end in (0, 1)]
            axis.errorbar(x, y, spread, fmt="o", color=f"C{i}", markersize=6, elinewidth=1, label=name, zorder=2)
        axis.set_xticks(range(len(presets)), presets)
        axis.set_ylabel("PSNR to full precision, dB")
        axis.set_title(family)
        axis.grid(axis="y", alpha=0.25)
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def render(rows: Path, peers: Path) -> None:
    """Write the page and the picture beside the rows."""
    found = measure.read_rows(rows)
    plot(found, rows.parent / "pictures" / "robust.png")
    rows.with_suffix(".md").write_text(markdown(found, measure.read_rows(peers), "pictures/robust.png"))


def collect_peers(work: Path) -> list[dict]:
    """Return the rows of what peers made of planted models."""
    rows = []
    for model in (m for m in MODELS if m.family == FASHION):
        folders = sorted(path for path in (work / "peers" / model.slug).glob("*") if path.is_dir())
        if folders:
            found = measure.collect(folders, work / "peers" / model.slug, str(plant_copy(model, work)))
            rows += [{"family": model.family, "model": model.name} | row for row in found]
    return rows


def wanted(model: Copy, preset: str, only: list[str]) -> bool:
    """Return whether each pattern matches the family, the model or the preset."""
    return all(any(fnmatch(value, pattern) for value in (model.family, model.name, preset)) for pattern in only)


def main() -> None:
    """Make the rows that are missing, each written when it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=WORK, help="where planted models and their samples are kept")
    parser.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="rows of which each matches model or preset")
    parser.add_argument("--quick", action="store_true", help="few samples, for development; rows and page go to WORK/quick")
    parser.add_argument("--plant", action="store_true", help="write the planted models' folders alone")
    parser.add_argument("--peers", action="store_true", help="collect the other packages' rows alone")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.plant:
        for model in MODELS:
            if wanted(model, "", args.only):
                print(plant_copy(model, args.work), flush=True)
        return
    rows_path = args.work / "quick" / ROWS.name if args.quick else ROWS
    if args.peers:
        measure.write_rows(collect_peers(args.work), PEER_ROWS)
    else:
        rows = measure.read_rows(rows_path)
        done = {(r["family"], r["model"], r["preset"]) for r in rows}
        for model in MODELS:
            family = (QUICK if args.quick else {}).get(model.family, FAMILIES[model.family])
            for preset in family.presets:
                if (model.family, model.name, preset) in done or not wanted(model, preset, args.only):
                    continue
                rows.append(make_row(model, preset, family, args.work))
                measure.write_rows(rows, rows_path)
                print(json.dumps(rows[-1]), flush=True)
    render(rows_path, PEER_ROWS)


if __name__ == "__main__":
    main()
