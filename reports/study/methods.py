"""quantdit's own rows of the study: every method alone and combined, on the embedded model.

    python reports/study/methods.py --output reports/study/quantdit.jsonl [--only w4a8]

A row that the output file already has is not made again; delete its line to repeat it.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

# PYTHONSAFEPATH, which the Makefile sets, keeps the folder of a script off the path.
sys.path.append(str(Path(__file__).parent))
import measure
import quantdit
from quantdit.compiling.compile import compile
from quantdit.compiling.plan import Plan, Target
from quantdit.compiling.report import CompileResult
from quantdit.evaluation.report.picture import side_by_side
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.finetuning import FineTuning
from quantdit.recipes.presets import BEST, finetuning_of, from_bits
from quantdit.recipes.rules import AUTO, DENSE, Recipe
from quantdit.recipes.sampling_plan import SamplingPlan

SEED = 0
PICTURED = 40

# Round to nearest without data; what OrbitQuant's idea is in our nouns; GPTQ as published.
NEAREST = {"method": "rtn", "bias_correction": False}
FIXED = NEAREST | {"table": "gaussian"}
PLAIN = {"act_order": False, "cd_passes": 0, "bias_correction": False}
FP8 = {"activation_format": "fp8"}
# How assignments are calibrated (quantdit/compiling/finetune.py); other keys change rules. w2's preset
# trains trellis codes' scales.
STEPS, MODE, CANDIDATES = (f"training.{field}" for field in ("steps", "mode", "candidates"))
UNTRAINED = {STEPS: 0}
TABLE2, TABLE3 = {"weight": "table2"} | UNTRAINED, {"weight": "table3"}
VECTORS = {"weight": "vq256x4"}
# Widths chosen layer by layer, in as many bytes as the preset takes; w2 has nothing narrower to choose.
MIXED = {"weight": AUTO, "fallback": ""}

# bits, method, changes to every quantizing rule of the preset and to its training. No change: the preset itself.
METHODS: tuple[tuple[str, str, dict], ...] = (
    ("w4a8", "preset", {}),
    ("w3a8", "preset", {}),
    ("w2a16", "preset", {}),
    ("w4a16", "preset", {}),
    ("w4a4", "preset", {}),
    ("w4a8", "mixed precision", MIXED),
    ("w3a8", "mixed precision", MIXED),
    ("w4a8", "round to nearest", NEAREST),
    ("w4a8", "fixed Gaussian table, no data", FIXED),
    ("w4a8", "int4 g64", {"weight": "int4", "group_size": 64}),
    ("w4a8", "int4 per channel", {"weight": "int4", "group_size": "channel"}),
    ("w4a8", "twin-log", {"table": "twin-log"}),
    ("w4a8", "no rotation", {"rotation": "none"}),
    ("w4a8", "rotation auto", {"rotation": "auto"}),
    ("w4a8", "smoothing rms", {"smooth": "rms"}),
    ("w2a16", "round to nearest", TABLE2 | NEAREST),
    ("w2a16", "fixed Gaussian table, no data", TABLE2 | FIXED),
    ("w2a16", "int2 g32", UNTRAINED | {"weight": "int2", "group_size": 32}),
    ("w2a16", "twin-log", TABLE2 | {"table": "twin-log"}),
    ("w2a16", "rotation auto", TABLE2 | {"rotation": "auto"}),
    ("w2a16", "rank 16", TABLE2 | {"low_rank": 16}),
    ("w2a16", "table, error feedback", TABLE2),
    ("w2a16", "int2 per channel, round to nearest", {"weight": "int2", "group_size": "channel"} | NEAREST),
    ("w2a16", "int2 per channel", {"weight": "int2", "group_size": "channel"}),
    ("w2a16", "k-means", VECTORS | NEAREST | UNTRAINED),
    ("w2a16", "k-means + GPTVQ", VECTORS | UNTRAINED),
    ("w2a16", "VQ4DiT, block, n = 1", VECTORS),
    ("w2a16", "VQ4DiT, block, n = 2", VECTORS | {CANDIDATES: 2}),
    ("w2a16", "VQ4DiT, end to end, n = 1", VECTORS | {MODE: "end-to-end"}),
    ("w2a16", "VQ4DiT, end to end, n = 2", VECTORS | {MODE: "end-to-end", CANDIDATES: 2}),
    ("w2a16", "VQ4DiT from k-means, end to end, n = 1", VECTORS | NEAREST | {MODE: "end-to-end"}),
    ("w2a16", "VQ4DiT from k-means, end to end, n = 2", VECTORS | NEAREST | {MODE: "end-to-end", CANDIDATES: 2}),
    ("w2a16", "VQ4DiT, signs split off", {"weight": "ssvq256x8"}),
    ("w2a16", "VQ4DiT, block, n = 3", VECTORS | {CANDIDATES: 3}),
    ("w2a16", "VQ4DiT, end to end, n = 3", VECTORS | {MODE: "end-to-end", CANDIDATES: 3}),
    ("w4a8", "trellis, round to nearest", NEAREST | {"weight": "trellis4_l12"}),
    ("w4a8", "trellis", {"weight": "trellis4_l12"}),
    ("w4a8", "trellis, rank 32", {"weight": "trellis4_l12", "low_rank": 32}),
    ("w3a8", "trellis, round to nearest", NEAREST | {"weight": "trellis3_l12"}),
    ("w3a8", "trellis, L = 16", {"weight": "trellis3_l16"}),
    ("w3a8", "trellis, rank 32", {"weight": "trellis3_l12", "low_rank": 32}),
    ("w2a16", "trellis, round to nearest", UNTRAINED | NEAREST),
    ("w2a16", "trellis, not trained", UNTRAINED),
    ("w2a16", "trellis, not trained, rank 16", UNTRAINED | {"low_rank": 16}),
    ("w3a8", "table, error feedback", TABLE3),
    ("w3a8", "round to nearest", TABLE3 | NEAREST),
    ("w3a8", "fixed Gaussian table, no data", TABLE3 | FIXED),
    ("w3a8", "int3 g64", {"weight": "int3", "group_size": 64}),
    ("w3a8", "twin-log", TABLE3 | {"table": "twin-log"}),
    ("w3a8", "rotation auto", TABLE3 | {"rotation": "auto"}),
    ("w4a4", "int, whole token", {"activation_format": "int", "activation_group_size": "token"}),
    ("w4a4", "int g32", {"activation_format": "int"}),
    ("w4a4", "affine g64", {"activation_group_size": 64}),
    ("w4a4", "no rotation", {"rotation": "none"}),
    ("w4a4", "outlier rotation", {"rotation": "outlier"}),
    ("w4a4", "rotation auto", {"rotation": "auto"}),
    ("w4a4", "smoothing rms", {"smooth": "rms"}),
    ("w4a4", "rotation auto, rank 32", {"rotation": "auto", "low_rank": 32}),
    ("w4a8", "GPTQ as published", PLAIN),
    ("w4a8", "without act-order", {"act_order": False}),
    ("w4a8", "without descent", {"cd_passes": 0}),
    ("w4a8", "without bias correction", {"bias_correction": False}),
    ("w4a8", "twin-log, paper", {"table": "twin-log-paper"}),
    ("w4a8", "twin-log per channel", {"table": "twin-log", "table_rows": "channel"}),
    ("w4a8", "Lloyd-Max per channel", {"table_rows": "channel"}),
    ("w4a8", "e4m3 table, fp8 activations", {"weight": "table4_e4m3", **FP8}),
    ("w4a8", "outlier rotation", {"rotation": "outlier"}),
    ("w4a8", "HQQ int4 g64", {"weight": "int4", "group_size": 64, "method": "hqq", "bias_correction": False}),
    ("w4a8", "rank 32", {"low_rank": 32}),
    ("w4a8", "static scales", {"activation_scale": "static"}),
    ("w4a8", "smoothing salience", {"smooth": "salience"}),
    ("w4a16", "round to nearest", NEAREST),
    ("w4a16", "fixed Gaussian table, no data", FIXED),
    ("w3a16", "preset", {}),
    ("w6a8", "preset", {}),
    ("w8a8", "preset", {}),
    ("w8a8", "fp8", {"weight": "fp8_e4m3", **FP8}),
)


def changed(bits: str, changes: dict, method: str = BEST) -> Recipe:
    """Return a method's recipe with `changes` in every rule that quantizes; activations only where it quantizes them."""
    preset = from_bits(bits, method)
    changes = {key: value for key, value in changes.items() if not key.startswith("training.")}
    rules = []
    for rule in preset.rules:
        fitting = {k: v for k, v in changes.items() if not k.startswith("activation_") or rule.activation_bits < 16}
        if rule.weight != DENSE:
            # Changes may need one another, and a weight its own group size.
            rule = replace(rule, **fitting)
        rules.append(rule)
    return Recipe(preset.name, tuple(rules))


def trained(bits: str, changes: dict, method: str = BEST) -> FineTuning | None:
    """Return a method's training with `changes`; None for no steps."""
    given = {key.removeprefix("training."): value for key, value in changes.items() if key.startswith("training.")}
    training = finetuning_of(bits, method)
    return None if training is None or given.get("steps") == 0 else replace(training, **given)


def make_row(bits: str, method: str, changes: dict, preset_bits: float, work: Path, output: Path) -> dict:
    """Calibrate, sample with every seed, measure; mixed precision gets `preset_bits` a weight."""
    folder = work / "candidate"
    shutil.rmtree(folder, ignore_errors=True)
    pipeline, source = load_pipeline(measure.MODEL)
    settings = SamplingPlan(guidance=measure.GUIDANCE, seed=SEED)
    target = Target(size_budget=preset_bits / 16) if changes.get("weight") == AUTO else None
    plan, training = changed(bits, changes), trained(bits, changes)
    report = compile(pipeline, source, Plan(plan, settings, training, target), folder, overwrite=True)
    pipeline, _ = load_pipeline(str(folder))
    reference, features = measure.load_reference(work)
    images = measure.sample(pipeline)
    metrics = measure.measure(reference, images, features)
    if method == "preset":
        _draw(reference, images, bits, report, metrics)
    errors = [layer["rel_rmse"] for layer in report.layers.values()]
    return measure.row(
        "quantdit",
        quantdit.__version__,
        method,
        bits,
        bits_per_weight=report.size["bits_per_weight"],
        group_size=changes.get("group_size", "channel"),
        seconds=report.seconds["quantize"],
        mean_rel_rmse=sum(errors) / len(errors),
        command=f"python reports/study/methods.py --output reports/study/{output.name}",
        note=", ".join(f"{k} = {v}" for k, v in changes.items()),
        metrics=metrics,
    )


def _draw(reference: torch.Tensor, images: torch.Tensor, bits: str, report: CompileResult, metrics: dict) -> None:
    """Draw the first images of full precision and of a preset side by side: reports/pictures/fashion-dit-BITS.png."""
    size = f"{report.size['file_bytes'] / 1e6:.2f} MB, {report.size['bits_per_weight']:.2f} bits per weight"
    quality = f"paired PSNR {metrics['psnr']['mean']:.1f} dB over {len(images)} images, SSIM {metrics['ssim']['mean']:.4f}"
    panels = [("full precision", reference[:PICTURED]), (bits, images[:PICTURED])]
    path = Path(__file__).parent.parent / "pictures" / f"{measure.MODEL}-{bits}.png"
    side_by_side(panels, 8, path, [f"{bits}: {size}", f"{quality}; seeds {measure.SEEDS}, {measure.STEPS} steps"])


def main() -> None:
    """Make the rows that are missing, one after the other, each written when it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=measure.WORK)
    parser.add_argument("--only", help="rows of these bits alone, such as w4a8")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = measure.read_rows(args.output)
    done = {(r["bits"], r["method"]) for r in rows}
    for bits, method, changes in METHODS:
        if (bits, method) in done or (args.only and bits != args.only):
            continue
        preset_bits = next((r["bits_per_weight"] for r in rows if (r["bits"], r["method"]) == (bits, "preset")), math.nan)
        with torch.no_grad():
            rows.append(make_row(bits, method, changes, preset_bits, args.work, args.output))
        measure.write_rows(rows, args.output)
        print(f"{bits} {method}: {rows[-1]['psnr']['mean']:.2f} dB at {rows[-1]['bits_per_weight']:.3f} bits", flush=True)


if __name__ == "__main__":
    main()
