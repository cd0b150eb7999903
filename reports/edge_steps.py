"""Wider activations on the first and the last sampling steps: what they give back, and what they cost.

    python reports/edge_steps.py [--work DIR] [--model FOLDER] [--bits w4a4 ...] [--edge-steps 0 3 ...] [--quick]

Calibrates a model to each of BITS with EDGE_STEPS steps of 16-bit activations at either end, samples the same prompts with the
same seeds, and keeps a row for each in `edge-steps.jsonl`: PSNR against full precision, VBench's temporal flickering of the clips
(quantdit/evaluation/metrics/video.py computes it by its definition, on frames as generated) and its paired difference to full
precision, the share of calls with wide activations, and the seconds of a call of either kind. Rows that are there are kept;
`edge-steps.md` is written from all of them. With --work an interrupted run goes on where it was. --quick writes nothing: two
clips of one model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quantdit.checkpoints.checkpoint import quant_layers
from quantdit.compiling.compile import compile
from quantdit.compiling.plan import Plan
from quantdit.evaluation.metrics.intervals import bootstrap
from quantdit.evaluation.metrics.paired import psnr
from quantdit.evaluation.metrics.video import temporal_flickering
from quantdit.pipelines.generate import generate
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.presets import from_bits
from quantdit.recipes.rules import Recipe
from quantdit.recipes.sampling_plan import SamplingPlan

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "edge-steps.jsonl", HERE / "edge-steps.md"
MODEL = "emoji-wan"
BITS = ("w8a8", "w4a8", "w4a4")
EDGE_STEPS = (0, 1, 2, 3)
EDGE_BITS = 16
GUIDANCE, BATCH = 3.0, 8
KINDS = ("model", "clips", "seeds", "steps", "calibration_samples", "calibration_timesteps")  # rows of one table share them


@dataclass(frozen=True)
class Sizes:
    """How much is sampled and calibrated on: of the calibration's `samples` so many `timesteps` are kept."""

    clips: int = 8
    seeds: tuple[int, ...] = (1, 2)
    steps: int = 20
    samples: int = 4
    timesteps: int = 8


QUICK = Sizes(clips=2, seeds=(1,), steps=8, samples=1, timesteps=4)


def with_edges(bits: str, edge_steps: int) -> Recipe:
    """Return a preset whose quantized activations are wider on so many steps at either end."""
    recipe = from_bits(bits)
    if not edge_steps:
        return recipe
    wide = {"edge_activation_bits": EDGE_BITS, "edge_steps": edge_steps}
    rules = tuple(replace(rule, **wide) if rule.activation_bits < EDGE_BITS else rule for rule in recipe.rules)
    return Recipe(f"{bits}-edges-{edge_steps}", rules)


class Watch:
    """Counts the calls of a transformer by whether activations were wide, and their seconds."""

    def __init__(self, transformer: nn.Module) -> None:
        self.seconds: dict[bool, list[float]] = {False: [], True: []}
        layers = quant_layers(transformer).values()
        self.layer = next((layer for layer in layers if layer.layer_spec.activation.edge_bits), None)
        self.began = 0.0
        transformer.register_forward_pre_hook(self._before)
        transformer.register_forward_hook(self._after)

    def _before(self, module: nn.Module, args: tuple) -> None:
        self.began = time.perf_counter()

    def _after(self, module: nn.Module, args: tuple, output: object) -> None:
        wide = self.layer is not None and self.layer.activation.bits == EDGE_BITS
        self.seconds[wide].append(time.perf_counter() - self.began)

    def described(self) -> dict:
        """Return the share of wide calls, and the median seconds of a call of either kind."""
        wide, narrow = len(self.seconds[True]), len(self.seconds[False])
        found = {"wide_share": round(wide / (wide + narrow), 4)}
        for name, of in (("seconds_narrow", self.seconds[False]), ("seconds_wide", self.seconds[True])):
            found |= {name: round(median(of), 4)} if of else {}
        return found


def sampled(model: str, sizes: Sizes) -> tuple[torch.Tensor, dict]:
    """Return clips `[seeds * clips, f, c, h, w]` (of an image model `[..., c, h, w]`) in [-1, 1], and what Watch saw."""
    pipeline, source = load_pipeline(model)
    prompts = list(getattr(pipeline, "prompts", ()))
    prompts = prompts[:: max(1, len(prompts) // sizes.clips)][: sizes.clips] or None
    watch = Watch(getattr(pipeline, source.components[0]))
    made = [
        generate(pipeline, sizes.clips, s, sizes.steps, GUIDANCE, BATCH, prompts, description=f"{Path(model).name} {s}")
        for s in sizes.seeds
    ]
    return torch.cat(made), watch.described()


def kept_sample(model: str, sizes: Sizes, kept: Path) -> tuple[torch.Tensor, dict]:
    """Return `sampled`, from a file if it is there."""
    if not kept.exists():
        clips, seen = sampled(model, sizes)
        kept.with_suffix(".json").write_text(json.dumps(seen))
        save_file({"clips": clips}, kept)
    return load_file(kept)["clips"], json.loads(kept.with_suffix(".json").read_text())


def row_of(clips: torch.Tensor, reference: torch.Tensor, seen: dict) -> dict:
    """Return the figures of one model's clips."""
    pictures = [of.flatten(1, 2) if of.ndim == 5 else of for of in (reference, clips)]
    decibels = psnr(*pictures)
    row = {"psnr": _with_interval(decibels, 2), **seen}
    if clips.ndim == 5:
        ours, theirs = (torch.tensor([temporal_flickering(c) for c in of], dtype=torch.float64) for of in (clips, reference))
        row |= {
            "temporal_flickering": round(float(ours.mean()), 5),
            "temporal_flickering_full_precision": round(float(theirs.mean()), 5),
            "temporal_flickering_difference": _with_interval(ours - theirs, 5),
        }
    return row


def _with_interval(values: torch.Tensor, digits: int) -> dict:
    found = bootstrap(values.numpy())
    return {"mean": round(found.estimate, digits), "interval_95": [round(found.low, digits), round(found.high, digits)]}


def key_of(model: str, bits: str, edge_steps: int, sizes: Sizes) -> dict:
    """Return what tells a row from another."""
    asked = {"clips": sizes.clips, "seeds": list(sizes.seeds), "steps": sizes.steps}
    asked |= {"calibration_samples": sizes.samples, "calibration_timesteps": sizes.timesteps}
    return {"model": Path(model).name, "bits": bits, "edge_steps": edge_steps, **asked}


def measured(model: str, bits: str, edge_steps: int, sizes: Sizes, work: Path) -> dict:
    """Return the row of a model calibrated to these bits with so many wide steps at either end."""
    name = f"{Path(model).name}-{bits}-{edge_steps}"
    output = work / name
    pipeline, source = load_pipeline(model)
    settings = SamplingPlan(samples=sizes.samples, steps=sizes.steps, guidance=GUIDANCE, timesteps=sizes.timesteps)
    report = compile(pipeline, source, Plan(with_edges(bits, edge_steps), settings), output, resume=True)
    reference, _ = kept_sample(model, sizes, work / f"{Path(model).name}.safetensors")
    clips, seen = kept_sample(str(output), sizes, work / f"{name}.safetensors")
    drift = {"model_rel_rmse": round(report.model_rel_rmse, 5)}
    return key_of(model, bits, edge_steps, sizes) | drift | row_of(clips, reference, seen)


def page(rows: list[dict]) -> str:
    """Return the figures as a Markdown page."""
    lines = [
        "# Wider activations on the first and the last steps",
        "",
        f"Made by `make edge-steps`. Activations are {EDGE_BITS} bits on so many steps at either end of the trajectory, quantized"
        " between. The same prompts and seeds in full precision; 95 % bootstrap intervals over clips. Flickering: VBench's"
        " `temporal_flickering` on frames as generated (1 for a still), here its difference to full precision: below 0 the clips"
        " flicker more, above 0 they move less. One thread of a CPU; a call is one of the transformer's, of the whole batch.",
    ]
    titles = (
        "bits",
        "wide steps at either end",
        "PSNR, dB",
        "flickering, difference to full precision",
        "calls with wide activations",
        "seconds of a call: narrow, wide",
        "model_rel_rmse",
    )
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[k]) for k in KINDS), []).append(row)
    for (model, clips, seeds, steps, samples, timesteps), members in groups.items():
        sizes = f"`{model}`: {clips} prompts x seeds {seeds}, {steps} steps, guidance {GUIDANCE:g}"
        sizes += f"; calibrated on {samples} samples, {timesteps} of the steps"
        lines += ["", f"{sizes}.", "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for row in sorted(members, key=lambda r: (BITS.index(r["bits"]) if r["bits"] in BITS else 99, r["edge_steps"])):
            difference = row.get("temporal_flickering_difference")
            seconds = ", ".join(f"{row[k]:.2f}" for k in ("seconds_narrow", "seconds_wide") if k in row)
            cells = (
                row["bits"],
                str(row["edge_steps"]),
                _shown(row["psnr"], ".2f"),
                _shown(difference, "+.4f") if difference else "",
                f"{100 * row['wide_share']:.0f} %",
                seconds,
                f"{row['model_rel_rmse']:.4f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _shown(value: dict, form: str) -> str:
    low, high = value["interval_95"]
    return f"{value['mean']:{form}} [{low:{form}}, {high:{form}}]"


def main() -> None:
    """Measure what is not there yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="keep calibrated folders and clips here, and take what is here already")
    parser.add_argument("--model", default=MODEL, help="a model, by name or the folder of its pipeline")
    parser.add_argument("--bits", nargs="+", default=BITS, help=f"presets; {' '.join(BITS)}")
    parser.add_argument("--edge-steps", nargs="+", type=int, default=EDGE_STEPS, help="numbers of wide steps at either end")
    parser.add_argument("--clips", type=int, default=Sizes.clips, help="prompts, each with all seeds")
    parser.add_argument("--quick", action="store_true", help="two clips of one seed, eight steps; prints the page, keeps nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = QUICK if args.quick else Sizes(clips=args.clips)
    known = [] if args.quick or not ROWS.exists() else [json.loads(line) for line in ROWS.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        for bits in args.bits:
            for edge_steps in args.edge_steps:
                key = key_of(args.model, bits, edge_steps, sizes)
                if any(key.items() <= row.items() for row in known):
                    continue
                known.append(measured(args.model, bits, edge_steps, sizes, work))
                if not args.quick:
                    ROWS.write_text("".join(json.dumps(row) + "\n" for row in known))
                    PAGE.write_text(page(known))
    print(page(known))


if __name__ == "__main__":
    main()
