"""Two papers, claim by claim and part by part, on our models: `papers.jsonl`, `papers.md`, a picture of each paper.

    python reports/papers.py [--quick] [--only vq4dit w2a16 "n = 2"] [--render]

LRQ-DiT (arXiv 2508.03485) and VQ4DiT (arXiv 2408.17131) as `quantdit calibrate --method` does them, then with parts taken away or
changed, beside the presets. Rows that the file has are not made again; delete a line to repeat it. `--quick` makes rows of few
samples and one seed, which are kept beside the others and shown where there are no others.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import t as student
from torch import Tensor

from quantdit.compiling.compile import compile
from quantdit.evaluation.metrics.paired import capped, psnr
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.sampling_plan import SamplingPlan

sys.path.append(str(Path(__file__).parent / "study"))
import measure
import methods
from quantdit.compiling.plan import Plan
from quantdit.recipes.presets import BEST, METHODS

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "papers.jsonl", HERE / "papers.md"
WORK = Path(tempfile.gettempdir()) / "quantdit-papers"
LEVEL = 0.95
SALIENT = 245  # times as large as the other channels: the largest activation of PixArt that LRQ-DiT reports (section 4.2)
TAME, PLANTED = "fashion-dit", "fashion-dit, planted"
LRQ, VQ = "lrq-dit", "vq4dit"


@dataclass(frozen=True)
class Scale:
    """How much a row is made of: images a sampling seed, sampling seeds, calibration."""

    samples: int
    seeds: tuple[int, ...]
    calibration: dict[str, int]
    calibration_seeds: tuple[int, ...]


FULL = Scale(measure.SAMPLES, measure.SEEDS, {"samples": 32, "steps": 20}, (0, 1, 2))
QUICK = Scale(16, measure.SEEDS[:1], {"samples": 8, "steps": 10}, (0,))


@dataclass(frozen=True)
class Part:
    """A row: a method of presets.METHODS with changes to its rules and `training.` fields, as in reports/study/methods.py."""

    name: str
    changes: dict
    method: str
    over: str = ""  # the part that its gain is on; the one before if not given


def lrq_parts(bits: str) -> tuple[Part, ...]:
    """Return LRQ-DiT part by part, its variants, and the preset."""
    uniform = {"weight": f"int{bits[1]}", "group_size": "channel", "table": "lloyd-max", "table_rows": "layer"}
    bare = {"smooth": "none"}
    return (
        Part("uniform", uniform | bare | {"rotation": "none"}, LRQ),
        Part("TLQ", bare | {"rotation": "none"}, LRQ),
        Part("TLQ + Hadamard", bare | {"rotation": "hadamard"}, LRQ),
        Part("TLQ + ARS", bare, LRQ),
        Part("smoothing + TLQ + ARS: LRQ-DiT", {}, LRQ),
        Part("Eq. 7 as printed + ARS", bare | {"table": "twin-log-paper"}, LRQ, "TLQ + ARS"),
        Part("one TLQ table a layer + ARS", bare | {"table_rows": "layer"}, LRQ, "TLQ + ARS"),
        Part("preset", {}, BEST, "smoothing + TLQ + ARS: LRQ-DiT"),
    )


def vq_parts(bits: str) -> tuple[Part, ...]:
    """Return VQ4DiT part by part, more candidates, our way of training them, and the preset."""
    ours = {"training.optimizer": "adam", "training.codebook_rate": 1e-3, "training.distance": "output"}
    whole = "assignments too, n = 2: VQ4DiT"
    return (
        Part("k-means", {"training.steps": 0}, VQ),
        Part("codebooks alone, n = 1", {"training.candidates": 1}, VQ),
        Part(whole, {}, VQ),
        Part("n = 3", {"training.candidates": 3}, VQ),
        Part("n = 4", {"training.candidates": 4}, VQ),
        Part("n = 2, ratios from 1 / n", {"training.initial": "uniform"}, VQ, whole),
        Part("n = 1, trained our way", ours | {"training.candidates": 1}, VQ),
        Part("n = 2, trained our way", ours, VQ),
        Part("preset", {}, BEST, whole),
    )


# Paper: the models and bits of its rows, their parts, whether several calibration seeds are told apart.
PAPERS: dict[str, tuple[tuple[tuple[str, str], ...], Callable[[str], tuple[Part, ...]], bool]] = {
    LRQ: (tuple((model, bits) for bits in ("w4a8", "w3a8", "w4a4") for model in (TAME, PLANTED)), lrq_parts, False),
    VQ: (((TAME, "w2a16"), (TAME, "w3a16")), vq_parts, True),
}

# What the papers say, where, and what a row here can say about it. Their FID is of ImageNet and COCO, ours is PSNR to full
# precision on the same noise: directions compare, numbers do not.
CLAIMS = {
    LRQ: (
        ("log levels lose less than uniform ones, most at 3 bits", "section 4.1"),
        ("a rotation is needed beside them; where J >= 1, some 5 % of the layers, one that looks for outliers", "section 4.2"),
        ("activations reach 245 in single channels of PixArt", "section 4.2"),
        (
            "tables of W3A4, W3A6, W3A8, W4A4, W4A6",
            "names of its published results; we had no access to the figures",
        ),
        ("an integer form runs 2.15 to 2.45 times as fast as FP16", "section 4.1; kernels are another page's matter"),
    ),
    VQ: (
        ("2 bits, DiT-XL/2 256 x 256: FID 12.42, where GPTQ, Q-DiT and RepQ-ViT are above 300; 512 x 512: 35.08", "main results"),
        ("3 bits: 5 to 6 FID above full precision", "main results"),
        ("candidates n = 1: FID 60.16; n = 2: 12.42; n = 3: 12.22; n = 4 is worse again", "Table 5"),
        ("DiT-XL/2 shrinks from 2553.35 to 162.08 MiB", "reproduced from shapes in bench/vq-size.md"),
    ),
}
# Papers that make fewer steps, or less attention, of a trajectory: what they do, what we know of it on emoji-wan (32 x 32 pixels,
# 128 tokens, 2 to 8 clips a figure, measured once with scripts that are not kept unless a page is named), how to combine.
NO_MODEL = "emoji-wan is no model for it: 95 % of attention needs half of its tokens, spread over 79 to 99 % of blocks"
TRAJECTORY = (
    (
        "TaylorSeer (arXiv 2503.06923)",
        "forecasts what modules return from a Taylor series over the computed steps",
        "forecasting the transformer's output works: `pipeline.md`, and `caches.md` for diffusers' own",
        "step plans are its idea, chosen by measurement; `TaylorSeerCacheConfig` works, in lite mode or with modules named",
    ),
    (
        "Delta-DiT (arXiv 2406.01125)",
        "caches what ranges of blocks add, the back ones early and the front ones late",
        "a measured plan over steps and blocks lost to evenly spaced steps: 31.2 against 41.3 dB at half the computations",
        "not built; step plans take its place",
    ),
    (
        "Sparse VideoGen2 (arXiv 2505.18875)",
        "sorts tokens by k-means, then computes the blocks that matter",
        "at a quarter of the blocks 21 dB by position, 31 with centroids of those left out; 38.5 where attention's output is"
        " reused at two steps of three",
        "its attention processors take the place of the class's; linears stay quantdit's",
    ),
    (
        "AdaSpa (arXiv 2502.21079)",
        "searches each head's blocks once, and keeps them over steps",
        NO_MODEL,
        "as Sparse VideoGen2",
    ),
    (
        "DraftAttention (arXiv 2505.14708)",
        "finds the blocks in attention of pooled tokens",
        "not measured by itself; which blocks are kept mattered less than how many each head gets",
        "as Sparse VideoGen2",
    ),
    (
        "Sparse-vDiT",
        "gives each head a fixed pattern",
        "fixed blocks at density .75: 30.1 dB; with budgets shared by heads 36.9",
        "as Sparse VideoGen2",
    ),
    (
        "Re-ttention",
        "corrects the softmax of sparse attention by what earlier steps had",
        "not measured; centroids of blocks left out, which do the same for one step, gain 6 to 9 dB",
        "as Sparse VideoGen2",
    ),
    (
        "SpargeAttention",
        "skips blocks by a threshold of each head, in 8 bits",
        "needs a GPU; not measured",
        "no backend of diffusers' dispatcher yet; its function as a processor's",
    ),
    (
        "FlexAttention (torch)",
        "compiles attention with a mask of blocks",
        "diffusers' backend `flex` on a w4a8 Wan of two blocks, compiled: within 2e-7 of SDPA (tests, slow)",
        '`set_attention_backend("flex")` of the self-attention modules, `compile_repeated_blocks()`; not with `--attention`',
    ),
)
DIFFERENCES = {
    LRQ: (
        "TLQ's steps and zero points belong to output channels and signs, as in the paper. The released code searches the offset"
        " eta and the clips for a layer, in absolute units; here they are searched for each channel, in parts of its largest"
        " weight.",
        "Not reproduced of the released code: J is never computed there (layers are listed by name), all blocks share one greedy"
        " rotation, rows and columns are mixed up in it, the negative side has one level more, zeros of the other sign pin the"
        " clip.",
        "The paper's equations (11), (12) rotate alone; the released scripts smooth first, with strength 0.5 (`--smooth_flag"
        " True --smooth_alpha 0.5`), as DuQuant does. `--method lrq-dit` smooths, its strength chosen by output error. Rows"
        " without it show that rotation alone does not do it: columns of weights that read salient channels are tiny, and a"
        " rotation mixes them with others.",
        "Smoothing was put into `--method lrq-dit` after these quick rows without it had been seen; the scripts are the reason.",
        "TLQ's tables of each channel take 0.2 to 0.5 bits a weight at 192 inputs, which `uniform` (clipped for least error) does"
        " not have. With one table a layer, at about equal bits, no gain over `uniform` shows at w4a8. On the model as it"
        " is no J reaches 1, so ARS is Hadamard there and its rows say nothing of the outlier rotation.",
        "Modulation and embedder linears stay as they are, as in the released scripts. A preset quantizes them, too: its file is"
        " smaller and it has more to lose.",
    ),
    VQ: (
        "A channel scale stands beside the codebook (16 bits a row), codebook entries are whole numbers up to 64, k-means weighs"
        " inputs by their power and sees 65,536 vectors.",
        "Zero data means the same: noise and random labels, the trajectory of the model in full precision. Blocks are trained one"
        " after the other, each on what the quantized blocks before it return, to return what it did in full precision.",
        "As in the paper: the n nearest codewords, RMSprop (alpha .9) at 5e-2 for logits and 1e-4 for codebooks and biases,"
        " together, a sub-vector frozen at a ratio of .99, 500 steps.",
        "Ratios begin in inverse proportion to the candidates' squared distances. The paper writes 1 / n (a row here); the"
        " released code begins in inverse proportion to the distances.",
        "The term that pushes ratios to 0 or 1 weighs a multiple of each step's error, which grows until the choice is over,"
        " after three fifths of the steps. The released code adds it with weight 1 where it rises, beside an absolute error."
        " With weight 1 beside our relative error (some .001) block 1 ended at .0385, .0452 (n = 2, ratios from 1 / n, seeds 0"
        " and 1) against .0372, .0374 (n = 1); with weight .001 and nothing else changed at .0313, .0319; with ratios by distance"
        " and a term that grows as well at .0250 (seed 0).",
        "How that was chosen: some fifteen settings of n = 2 on held-out errors of block 1 alone. n = 1 has neither knob, its"
        " learning rate was not searched, and its error still fell at the last of its 500 steps: part of the gain may be that"
        " n = 2 was tuned. The two rows at w2a16 are of one calibration seed.",
    ),
}


def main() -> None:
    """Make the rows that are missing, each written when it is done, then the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="rows of few samples and one seed")
    parser.add_argument(
        "--only", nargs="+", default=[], help="rows alone whose paper, model, bits, part and seed have these words"
    )
    parser.add_argument("--render", action="store_true", help="no rows, the page alone")
    parser.add_argument("--work", type=Path, default=WORK)
    args = parser.parse_args()
    rows = measure.read_rows(ROWS)
    done = {key(row) for row in rows}
    scale = QUICK if args.quick else FULL
    for wanted in [] if args.render else planned(scale):
        words = " ".join(f"{field} {value}" for field, value in wanted.items())
        if key(wanted) not in done and all(word in words for word in args.only):
            rows.append(wanted | made(wanted, scale, args.work))
            measure.write_rows(rows, ROWS)
            print(f"{wanted['model']} {wanted['bits']} {wanted['part']}: {rows[-1]['psnr']:.2f} dB", flush=True)
    for paper in PAPERS:
        draw(paper, shown(rows, paper), HERE / "pictures" / f"paper-{paper}.png")
    PAGE.write_text(page(rows))


def planned(scale: Scale) -> list[dict]:
    """Return what identifies the rows of this scale, in order."""
    return [
        {
            "paper": paper,
            "model": model,
            "bits": bits,
            "part": part.name,
            "seed": seed,
            "samples": scale.samples * len(scale.seeds),
        }
        for paper, (places, parts, seeded) in PAPERS.items()
        for model, bits in places
        for seed in (scale.calibration_seeds if seeded else scale.calibration_seeds[:1])
        for part in parts(bits)
    ]


def key(row: dict) -> tuple:
    """Return what no two rows share."""
    return tuple(row[field] for field in ("paper", "model", "bits", "part", "seed", "samples"))


def made(row: dict, scale: Scale, work: Path) -> dict:
    """Calibrate, sample with every seed, compare; returns what was measured."""
    part = next(part for part in PAPERS[row["paper"]][1](row["bits"]) if part.name == row["part"])
    pipeline, source = load_pipeline(_model(row["model"], work))
    settings = SamplingPlan(guidance=measure.GUIDANCE, seed=row["seed"], **scale.calibration)
    plan = methods.changed(row["bits"], part.changes, part.method)
    training = methods.trained(row["bits"], part.changes, part.method)
    report = compile(pipeline, source, Plan(plan, settings, training), work / "candidate", overwrite=True)
    images = sampled(str(work / "candidate"), scale)
    decibels = capped(psnr(_reference(row["model"], scale, work), images))
    layers = report.layers.values()
    rotations = [layer["rotation"]["chosen"] for layer in layers]
    return {
        "recipe": plan.to_dict()["rule"][-1],
        "training": None if training is None else vars(training),
        "psnr": measure.six(decibels.mean().item()),
        "image_psnr": [round(value, 3) for value in decibels.tolist()],
        "layer_error": measure.six(sum(layer["rel_rmse"] for layer in layers) / len(layers)),
        "model_error": measure.six(report.model_rel_rmse),
        "bits_per_weight": report.size["bits_per_weight"],
        "file_mb": report.size["file_bytes"] / 1e6,
        "outlier_rotations": f"{rotations.count('outlier')} of {len(rotations)}",
        "seconds": report.seconds["quantize"],
    }


def sampled(name: str, scale: Scale) -> Tensor:
    """Return the images of a model."""
    return measure.sample(load_pipeline(name)[0], scale.seeds, scale.samples)


def _model(name: str, work: Path) -> str:
    """Return what `load_pipeline` takes; a planted model is written when it is asked for first."""
    folder = work / "planted"
    if name == PLANTED and not (folder / "model_index.json").exists():
        from quantdit.models.planted_outliers import plant

        pipeline, _ = load_pipeline(TAME)
        plant(pipeline.transformer, "channels", size=SALIENT)
        pipeline.save_pretrained(folder)
    return str(folder) if name == PLANTED else name


def _reference(model: str, scale: Scale, work: Path) -> Tensor:
    path = work / f"reference-{model.replace(', ', '-')}-{scale.samples * len(scale.seeds)}.safetensors"
    if not path.exists():
        measure.save({"images": sampled(_model(model, work), scale)}, path)
    return measure.load_file(path)["images"]


def shown(rows: list[dict], paper: str) -> list[dict]:
    """Return the paper's rows in the order of its parts; quick ones where there are no others, and those of changed parts not."""
    found = []
    for scale in (FULL, QUICK):
        order = [key(row) for row in planned(scale) if row["paper"] == paper]
        known = {key(row): row for row in rows}
        places = {(row["model"], row["bits"], row["part"]) for row in found}
        found += [known[k] for k in order if k in known and (k[1], k[2], k[3]) not in places]
    places, parts, _ = PAPERS[paper]
    rank = {(m, b, part.name): i for i, (m, b, part) in enumerate((m, b, p) for m, b in places for p in parts(b))}
    return sorted(found, key=lambda row: (rank[row["model"], row["bits"], row["part"]], row["seed"]))


def interval(values: list[float]) -> tuple[float, float]:
    """Return mean and half of the t-interval; 0 of one value."""
    x = torch.tensor(values, dtype=torch.float64)
    if len(x) < 2:
        return float(x.mean()), 0.0
    return float(x.mean()), float(student.ppf((1 + LEVEL) / 2, len(x) - 1) * x.std() / len(x) ** 0.5)


def spread(rows: list[dict]) -> tuple[float, float]:
    """Return PSNR and half of its interval: over calibration seeds, of a single one over images."""
    return interval([row["psnr"] for row in rows] if len(rows) > 1 else rows[0]["image_psnr"])


def gain(rows: list[dict], before: list[dict]) -> tuple[float, float]:
    """Return what one part gains on another in dB, on the same noise, and half of the interval."""
    pairs = [(a, b) for a in rows for b in before if a["seed"] == b["seed"] and a["samples"] == b["samples"]]
    if len(pairs) > 1:
        return interval([a["psnr"] - b["psnr"] for a, b in pairs])
    return interval([x - y for a, b in pairs for x, y in zip(a["image_psnr"], b["image_psnr"], strict=True)]) if pairs else (0, 0)


def grouped(rows: list[dict]) -> dict[tuple[str, str], dict[str, list[dict]]]:
    """Return rows by model and bits, and there by part."""
    found: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for row in rows:
        found.setdefault((row["model"], row["bits"]), {}).setdefault(row["part"], []).append(row)
    return found


def page(rows: list[dict]) -> str:
    """Return the page."""
    lines = [
        "# Two papers on our models",
        "",
        "`make papers` wrote this page: the methods of two papers as `quantdit calibrate --method` has them, part by part, beside"
        f" the presets. PSNR is to full precision, on the same noise: {FULL.samples} images of each of {len(FULL.seeds)} seeds"
        f" ({QUICK.samples} of one where a row says quick). Intervals of {LEVEL:.0%}: over calibration seeds where a row has"
        " several, else over images. Gain: on the row above, of variants on what they vary, of presets on"
        " the method, pair by pair. Planted: two channels in front of every attention and"
        f" feed-forward are {SALIENT} times as large, and the function is the same.",
    ]
    for paper in PAPERS:
        method = METHODS[paper]
        lines += ["", f"## {method.about} (arXiv {method.arxiv})", "", f"`--method {paper}`, {', '.join(method.bits)}.", ""]
        lines += ["The paper says:", "", *(f"- {claim} ({source})" for claim, source in CLAIMS[paper]), ""]
        lines += [f"![PSNR of each part](pictures/paper-{paper}.png)"]
        for (model, bits), parts in grouped(shown(rows, paper)).items():
            lines += ["", f"### {model}, {bits}", "", *table(parts, PAPERS[paper][1](bits))]
        lines += ["", "What differs from the paper:", "", *(f"- {text}" for text in DIFFERENCES[paper])]
    lines += ["", "## Steps and sparse attention", ""]
    lines += ["quantdit has no sparse attention of its own: neither a model that is sparse nor a GPU was there to judge one.", ""]
    lines += ["| paper | what it does | what we know | with a quantdit checkpoint |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(cells)} |" for cells in TRAJECTORY]
    return "\n".join(lines) + "\n"


def table(parts: dict[str, list[dict]], known: tuple[Part, ...]) -> list[str]:
    """Return the table of one model and width."""
    lines = [
        "| part | PSNR, dB | gain, dB | layer error | model error | bits a weight | file, MB | outlier rotations | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    over, before = {part.name: part.over for part in known}, None
    for name, rows in parts.items():
        before = parts.get(over[name], before)
        (mean, half), first = spread(rows), rows[0]
        gained = "" if before is None else "{:+.2f} ± {:.2f}".format(*gain(rows, before))
        average = {field: sum(row[field] for row in rows) / len(rows) for field in ("layer_error", "model_error", "seconds")}
        note = f", {len(rows)} seeds" if len(rows) > 1 else ", quick" if first["samples"] < FULL.samples * len(FULL.seeds) else ""
        lines.append(
            f"| {name}{note} | {mean:.2f} ± {half:.2f} | {gained} | {average['layer_error']:.4f} | {average['model_error']:.4f}"
            f" | {first['bits_per_weight']:.2f} | {first['file_mb']:.2f} | {first['outlier_rotations']}"
            f" | {average['seconds']:.0f} |"
        )
        before = rows
    return lines


def draw(paper: str, rows: list[dict], path: Path) -> None:
    """Draw a dot with its interval for each part, a panel for each model and width."""
    if not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = grouped(rows)
    columns = min(2, len(panels))
    deep = -(-len(panels) // columns)
    figure, axes = plt.subplots(deep, columns, figsize=(6.5 * columns, 0.6 + 2.5 * deep), squeeze=False, constrained_layout=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((model, bits), parts) in zip(axes.flat, panels.items(), strict=False):
        found = [spread(of) for of in parts.values()]
        places = range(len(parts) - 1, -1, -1)
        for place, name, (mean, half) in zip(places, parts, found, strict=True):
            colour = "#5a5a5a" if name == "preset" else "#c0392b" if ":" in name else "#1f77b4"
            axis.errorbar(mean, place, xerr=half, fmt="o", color=colour, capsize=3)
            axis.annotate(f"{mean:.1f}", (mean, place), (0, 6), textcoords="offset points", ha="center", fontsize=8, color=colour)
        axis.set_yticks(list(places), list(parts), fontsize=9)
        axis.set_ylim(-0.6, len(parts) - 0.3)
        axis.set_title(f"{model}, {bits}", fontsize=10)
        axis.set_xlabel("PSNR to full precision, dB")
        axis.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
