"""Weights, attention and steps, alone and together: quality against computed steps, other caches beside. pipeline.{jsonl,md}.

    python reports/pipeline.py [--work DIR] [--only emoji-wan "fewer steps"]

emoji-wan: every prompt that it ships with two seeds, 20 steps; fashion-dit: 64 images of four seeds. w4a8 is calibrated by
`quantdit.calibrate` (seed 0), with `steps_plan` of a half and of a third, and with `attention="int8"`. A row has the PSNR to full
precision that computes every step, and to the same model computing every step. Rows that the file has are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quantdit
from quantdit.evaluation.metrics.intervals import bootstrap
from quantdit.evaluation.metrics.paired import capped, psnr
from quantdit.evaluation.metrics.video import temporal_flickering
from quantdit.evaluation.samples import as_images
from quantdit.pipelines.generate import generate
from quantdit.step_plans.following import hook_of
from quantdit.step_plans.forecasts import polynomial

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE / "training"), str(HERE / "study")]
import measure  # noqa: E402
from emoji_wan import row_of as motion_row  # noqa: E402

ROWS, PAGE, PICTURE = HERE / "pipeline.jsonl", HERE / "pipeline.md", HERE / "pictures" / "pipeline.png"
STEPS, HALF, THIRD = 20, 0.5, 0.35
FULL, W4A8 = "full precision", "w4a8"
WHOLE = f"{FULL}, every step"
ATTENTION = "w4a8, 8-bit attention"


@dataclass(frozen=True)
class Family:
    """A model, and what it is sampled with."""

    name: str
    guidance: float
    seeds: tuple[int, ...]
    samples: int  # a seed; 0: every prompt that it has
    batch: int


FAMILIES = (Family("emoji-wan", 3.0, (1, 2), 0, 8), Family("fashion-dit", 2.0, (1, 2, 3, 4), 64, 64))


@dataclass(frozen=True)
class Variant:
    """A row: which model, in how many steps, and what is switched on while it samples."""

    name: str
    model: str  # of MODELS
    steps: int = STEPS
    on: Callable[[Any], Any] = lambda pipeline: nullcontext()


@contextmanager
def planned(pipeline: Any) -> Iterator[None]:
    """Follow the step plan that the model carries."""
    transformer = pipeline.transformer
    transformer.enable_cache(quantdit.step_plan(transformer))
    yield
    transformer.disable_cache()


@contextmanager
def reused(pipeline: Any) -> Iterator[None]:
    """Compute the steps that the plan computes, and take the latest output for the others."""
    from quantdit.pipelines.step_plans import following

    plan = pipeline.transformer.step_plan
    with following(pipeline, {"transformer": polynomial("reuse", plan.times, plan.computed)}):
        yield


def cached(kind: str, **fields: Any) -> Callable[[Any], Any]:
    """Return what switches on a cache of diffusers."""

    @contextmanager
    def on(pipeline: Any) -> Iterator[None]:
        import diffusers

        pipeline.transformer.enable_cache(getattr(diffusers, f"{kind}Config")(**fields))
        yield
        pipeline.transformer.disable_cache()

    return on


LITE = {"use_lite_mode": True, "cache_interval": 2, "max_order": 1}
# Calibrated models by name: options of `quantdit.calibrate` beside the bits.
MODELS: dict[str, dict] = {
    f"{W4A8} half": {"steps_plan": HALF},
    f"{W4A8} third": {"steps_plan": THIRD},
    f"{ATTENTION} half": {"steps_plan": HALF, "attention": "int8"},
    f"{ATTENTION} third": {"steps_plan": THIRD, "attention": "int8"},
}
VARIANTS = (
    Variant(WHOLE, FULL),
    Variant(f"{FULL}, 10 steps", FULL, 10),
    Variant(f"{FULL}, 7 steps", FULL, 7),
    Variant(f"{W4A8}, every step", f"{W4A8} half"),
    Variant(f"{W4A8}, 10 steps", f"{W4A8} half", 10),
    Variant(f"{W4A8}, 7 steps", f"{W4A8} half", 7),
    Variant(f"{W4A8}, outputs reused, half", f"{W4A8} half", on=reused),
    Variant(f"{W4A8}, step plan, half", f"{W4A8} half", on=planned),
    Variant(f"{W4A8}, step plan, third", f"{W4A8} third", on=planned),
    Variant(f"{ATTENTION}, every step", f"{ATTENTION} half"),
    Variant(f"{ATTENTION}, step plan, half", f"{ATTENTION} half", on=planned),
    Variant(f"{ATTENTION}, step plan, third", f"{ATTENTION} third", on=planned),
    Variant(f"{W4A8}, FirstBlockCache 0.2", f"{W4A8} half", on=cached("FirstBlockCache", threshold=0.2)),
    Variant(f"{W4A8}, TaylorSeer lite", f"{W4A8} half", on=cached("TaylorSeerCache", **LITE)),
    Variant(
        f"{W4A8}, TaylorSeer lite, last step computed",
        f"{W4A8} half",
        on=cached("TaylorSeerCache", disable_cache_after_step=STEPS - 1, **LITE),
    ),
)
# What diffusers' DiT has not: attention through the dispatcher, cache contexts.
ONLY_WAN = (ATTENTION, "FirstBlockCache", "TaylorSeer")


def model_of(family: Family, name: str, work: Path) -> str | Path:
    """Return a model's folder, calibrated once."""
    if name == FULL:
        return family.name
    output = work / f"{family.name}-{name.replace(', ', '-').replace(' ', '-')}"
    if not (output / "model_index.json").exists():
        quantdit.calibrate(family.name, W4A8, output, steps=STEPS, seed=0, resume=True, **MODELS[name])
    return output


def sampled(pipeline: Any, family: Family, steps: int, prompts: list[str] | None) -> Tensor:
    """Return samples in [-1, 1], seed by seed."""
    count = len(prompts) if prompts else family.samples
    made = [
        generate(pipeline, count, s, steps, family.guidance, family.batch, prompts, description=f"seed {s}") for s in family.seeds
    ]
    return torch.cat(made)


def computed_share(pipeline: Any, run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Return what a run makes, and the calls of blocks' linears that were computed in it per call of the transformer."""
    counted, calls = [0], [0]
    transformer = pipeline.transformer
    linear = next(m for n, m in transformer.named_modules() if n.endswith("ffn.net.2") or n.endswith("ff.net.2"))
    last = [m for n, m in transformer.named_modules() if n.endswith("ffn.net.2") or n.endswith("ff.net.2")][-1]

    def count(into: list[int]) -> Callable[..., None]:
        def hook(*_: object) -> None:
            into[0] += 1

        return hook

    handles = [m.register_forward_pre_hook(count(counted)) for m in (linear, last)]
    handles.append(transformer.register_forward_pre_hook(count(calls)))
    made = run()
    for handle in handles:
        handle.remove()
    return made, counted[0] / 2 / calls[0]


def decibels(reference: Tensor, made: Tensor) -> dict:
    """Return the mean PSNR and its interval."""
    found = bootstrap(capped(psnr(as_images(reference), as_images(made))).double().numpy())
    return {"mean": round(found.estimate, 2), "interval_95": [round(found.low, 2), round(found.high, 2)]}


def make_rows(family: Family, rows: list[dict], work: Path, only: list[str]) -> None:
    """Make a family's rows that are missing."""
    have = {(row["family"], row["variant"]) for row in rows}
    wanted = [
        v
        for v in VARIANTS
        if (family.name, v.name) not in have
        and (family.name == "emoji-wan" or not any(word in v.name for word in ONLY_WAN))
        and all(word in (family.name, v.name) or word in v.name for word in only)
    ]
    if not wanted:
        return
    full = quantdit.load(family.name)
    prompts = None if family.samples else list(full.prompts)
    reference = sampled(full, family, STEPS, prompts)
    own: dict[str, Tensor] = {FULL: reference}
    for variant in wanted:
        pipeline = full if variant.model == FULL else quantdit.load(model_of(family, variant.model, work))
        base = variant.model.rsplit(" ", 1)[0] if variant.model != FULL else FULL
        if base not in own:
            own[base] = sampled(pipeline, family, STEPS, prompts)
        with variant.on(pipeline):
            made, share = computed_share(pipeline, lambda v=variant, p=pipeline: sampled(p, family, v.steps, prompts))
            hook = hook_of(pipeline.transformer)
            assert hook is None or hook.counted["forecast"]
        row = {"family": family.name, "variant": variant.name, "computed": round(share * variant.steps / STEPS, 3)}
        row |= {"samples": len(made), "seeds": list(family.seeds), "steps": variant.steps}
        if variant.name != WHOLE:
            row |= {"psnr": decibels(reference, made), "psnr_to_own": decibels(own[base], made)}
        if prompts:
            row["motion"] = motion_row(made, made, prompts)["motion"]
            flicker = bootstrap(torch.tensor([temporal_flickering(clip) for clip in made]).double().numpy())
            row["flickering"] = {
                "mean": round(flicker.estimate, 5),
                "interval_95": [round(flicker.low, 5), round(flicker.high, 5)],
            }
        rows.append(row)
        measure.write_rows(rows, ROWS)
        print(json.dumps(row), flush=True)


def interval(found: dict, places: int = 2) -> str:
    """Return a mean and its interval."""
    low, high = found["interval_95"]
    return f"{found['mean']:.{places}f} [{low:.{places}f}, {high:.{places}f}]"


def write_page(rows: list[dict]) -> None:
    """Write the tables."""
    lines = [
        "# Weights, attention and steps together",
        "",
        "PSNR in dB, mean and 95 % bootstrap interval: to full precision that computes every step of 20, and to the same model"
        " computing every step. Computed: the share of block computations; `bench/pipeline.md` has times."
        " Motion: share of clips whose thing moves the way its prompt says (interval of Wilson)."
        " Flickering: mean similarity of neighbouring frames, 1 is still. The plans are what"
        " `--steps-plan 0.5` and `--steps-plan 0.35` chose. Made by `python reports/pipeline.py`.",
        "",
        "![Quality against computed steps](pictures/pipeline.png)",
        "",
    ]
    for family in FAMILIES:
        found = [row for row in rows if row["family"] == family.name]
        if not found:
            continue
        clips = "motion" in found[0]
        lines += [f"## {family.name}, {found[0]['samples']} samples", ""]
        more = " motion | flickering |" if clips else ""
        lines += [f"| variant | computed | PSNR to full precision | PSNR to itself |{more}"]
        lines += [f"|---|---|---|---|{'---|---|' if clips else ''}"]
        for row in found:
            pairs = [interval(row[key]) if key in row else "" for key in ("psnr", "psnr_to_own")]
            cells = [row["variant"], f"{row['computed']:.2f}", *pairs]
            if clips:
                least, most = row["motion"]["interval_95"]
                cells += [f"{100 * row['motion']['matched']:.1f} % [{100 * least:.1f}, {100 * most:.1f}]"]
                cells += [interval(row["flickering"], 4)]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    PAGE.write_text("\n".join(lines))


def draw(rows: list[dict]) -> None:
    """Draw PSNR to full precision against the share of computations, a panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    families = [f.name for f in FAMILIES if any(row["family"] == f.name for row in rows)]
    figure, axes = plt.subplots(1, len(families), figsize=(6.4 * len(families), 4.6), squeeze=False)
    groups = {
        "full precision, fewer steps": (lambda v: v.startswith(FULL), "#777777", "o"),
        "w4a8, fewer steps": (lambda v: v.startswith(W4A8) and ("every step" in v or v.endswith(" steps")), "#1f77b4", "o"),
        "w4a8, step plan": (lambda v: v.startswith(f"{W4A8}, step plan"), "#d62728", "s"),
        "w4a8 + 8-bit attention, step plan": (lambda v: v.startswith(ATTENTION), "#2ca02c", "D"),
        "w4a8, other caches": (lambda v: any(w in v for w in ("FirstBlock", "TaylorSeer", "reused")), "#9467bd", "^"),
    }
    for axis, family in zip(axes[0], families, strict=True):
        for label, (is_in, colour, marker) in groups.items():
            found = [r for r in rows if r["family"] == family and "psnr" in r]
            claimed = [
                r for r in found if is_in(r["variant"]) and not (label.startswith("w4a8, fewer") and ATTENTION in r["variant"])
            ]
            if not claimed:
                continue
            claimed.sort(key=lambda r: r["computed"])
            x, y = [r["computed"] for r in claimed], [r["psnr"]["mean"] for r in claimed]
            error = [
                [r["psnr"]["mean"] - r["psnr"]["interval_95"][0] for r in claimed],
                [r["psnr"]["interval_95"][1] - r["psnr"]["mean"] for r in claimed],
            ]
            line = "" if "caches" in label else "-"
            axis.errorbar(x, y, yerr=error, color=colour, marker=marker, linestyle=line, capsize=3, label=label)
        axis.set(title=family, xlabel="share of computations", ylabel="PSNR to full precision, dB", xlim=(0.3, 1.05))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)


def main() -> None:
    """Make the rows that are missing, the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "quantdit-pipeline", help="(%(default)s)")
    parser.add_argument("--only", nargs="+", default=[], help="rows with these words in model or variant")
    args = parser.parse_args()
    rows = measure.read_rows(ROWS)
    for family in FAMILIES:
        make_rows(family, rows, args.work, args.only)
    order = [v.name for v in VARIANTS]
    rows.sort(key=lambda row: ([f.name for f in FAMILIES].index(row["family"]), order.index(row["variant"])))
    measure.write_rows(rows, ROWS)
    write_page(rows)
    draw(rows)


if __name__ == "__main__":
    main()
