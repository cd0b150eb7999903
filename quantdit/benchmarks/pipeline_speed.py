"""Seconds a clip with quantized weights, 8-bit attention and a step plan: `quantdit bench pipeline --output FILE.jsonl`.

Measured on this machine: the embedded video model, and two blocks of Wan 1.3B with made-up weights along a trajectory. Beside it,
and alone with `--predict`, arithmetic for Wan on an H100 (pipeline_prediction.py).
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from quantdit.benchmarks import cpu_linear, pipeline_prediction
from quantdit.benchmarks.pipeline_prediction import Speeds
from quantdit.checkpoints.random_weights import write_random_transformer
from quantdit.compiling.compile import calibrate
from quantdit.compiling.in_memory import load, quantize
from quantdit.layers.quant_attention import modules_of, put, take_away
from quantdit.models.adapter import adapter_for
from quantdit.models.call_view import view
from quantdit.models.known_models import transformer_config
from quantdit.models.synthetic import TRAIN_STEPS, latent_of, moved_inputs, synthetic_inputs
from quantdit.pipelines.generate import generate
from quantdit.recipes.attention import AttentionSpec
from quantdit.recipes.sampling_plan import Size
from quantdit.step_plans.following import disable, enable
from quantdit.step_plans.forecasts import placed, polynomial
from quantdit.step_plans.step_plan import StepPlan

STEPS, SHARE, ROUNDS = 20, 0.5, 3
EMBEDDED, CLIPS = "emoji-wan", 4
WAN, BLOCKS, SIZE = "wan-1.3b", 2, Size(1, 5, 32, 32, 64)  # 1,280 tokens
BITS, FULL = "w4a8", "float32"
# Of a quantized model: whether attention is in 8 bits, whether the step plan is followed.
VARIANTS = {
    BITS: (False, False),
    f"{BITS}, 8-bit attention": (True, False),
    f"{BITS}, step plan": (False, True),
    f"{BITS}, 8-bit attention, step plan": (True, True),
}


@dataclass(frozen=True)
class Case:
    """A model in full precision and quantized, and what makes its clips.

    Attributes:
        name: of the model.
        clips: made at once.
        full: samples from full precision.
        quantized: samples from the quantized model.
        transformer: of the quantized model.
        plan: half of its steps.
    """

    name: str
    clips: int
    full: Callable[[], object]
    quantized: Callable[[], object]
    transformer: nn.Module
    plan: StepPlan


def embedded(folder: Path) -> Case:
    """Return the embedded video model, its step plan chosen as `quantdit calibrate` does."""
    calibrate(EMBEDDED, BITS, folder / "quantized", samples=4, steps=STEPS, steps_plan=SHARE)
    full, quantized = load(EMBEDDED), load(folder / "quantized")

    def sampled(pipeline: object) -> Callable[[], object]:
        return lambda: generate(pipeline, CLIPS, 0, STEPS, batch=CLIPS)

    return Case(EMBEDDED, CLIPS, sampled(full), sampled(quantized), quantized.transformer, quantized.transformer.step_plan)


def wan_blocks(folder: Path) -> Case:
    """Return blocks of Wan with made-up weights, called along a trajectory between two latents."""
    from diffusers import WanTransformer3DModel  # pyright: ignore[reportPrivateImportUsage] - exported lazily

    write_random_transformer(transformer_config(WAN) | {"num_layers": BLOCKS}, folder / "wan", 0)
    model = WanTransformer3DModel.from_pretrained(folder / "wan").eval()
    quantized = quantize(copy.deepcopy(model), BITS)
    adapter, generator = adapter_for(model), torch.Generator().manual_seed(0)
    inputs = synthetic_inputs(model, adapter, SIZE, generator)
    noise, data = (latent_of(adapter, of) for of in (inputs, synthetic_inputs(model, adapter, SIZE, generator)))
    times = [TRAIN_STEPS * (STEPS - i) / STEPS for i in range(STEPS)]
    calls = [moved_inputs(model, adapter, inputs, torch.lerp(data, noise, t / TRAIN_STEPS), t) for t in times]

    def sampled(transformer: nn.Module) -> Callable[[], object]:
        return lambda: [transformer(**call) for call in calls]

    seen = [float(view(model, (), call).time or 0) for call in calls]
    plan = polynomial("taylor1", seen, placed(STEPS, round(SHARE * STEPS)))
    return Case(f"{BLOCKS} blocks of {WAN}", 1, sampled(model), sampled(quantized), quantized, plan)


@torch.no_grad()
def rows_of(case: Case) -> Iterator[dict]:
    """Yield a row for full precision and for each of VARIANTS: median seconds a clip over interleaved rounds."""
    attention = dict.fromkeys(modules_of(case.transformer), AttentionSpec())
    times: dict[str, list[float]] = {name: [] for name in (FULL, *VARIANTS)}
    computed = dict.fromkeys(times, STEPS)
    case.full()
    for _ in range(ROUNDS):
        times[FULL].append(_seconds(case.full))
        for name, (in_8_bits, planned) in VARIANTS.items():
            take_away(case.transformer)
            put(case.transformer, attention if in_8_bits else {})
            if planned:
                enable(case.transformer, case.plan)
                computed[name] = len(case.plan.computed)
            times[name].append(_seconds(case.quantized))
            if planned:
                disable(case.transformer)
    take_away(case.transformer)
    base = statistics.median(times[BITS])
    for name, found in times.items():
        median = statistics.median(found)
        row = {"what": "measured", "model": case.name, "variant": name, "seconds_a_clip": round(median / case.clips, 4)}
        yield row | {"steps_computed": computed[name], "steps": STEPS, f"times_{BITS}": round(base / median, 2)}


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def markdown(rows: list[dict]) -> str:
    """Return the rows as tables."""
    measured, predicted = ([row for row in rows if row["what"] == what] for what in ("measured", "predicted"))
    first = rows[0]
    lines = ["# Weights, attention and steps: seconds", ""]
    if measured:
        lines += [
            f"Measured on {first['cpu']}, {first['threads']} threads, {' '.join(first['isa'])}, torch {first['torch']},"
            f" {first['commit']}; median of {ROUNDS} interleaved rounds. On a CPU 8-bit attention is its definition, slower than"
            " attention in float32: it shows what a GPU's kernel computes, not its speed. Made by `quantdit bench pipeline`.",
            "",
            f"| model | variant | seconds a clip | steps computed | times {BITS} |",
            "|---|---|---|---|---|",
            *(
                f"| {r['model']} | {r['variant']} | {r['seconds_a_clip']:.3f} | {r['steps_computed']} of {r['steps']}"
                f" | {r[f'times_{BITS}']:.2f} |"
                for r in measured
            ),
            "",
        ]
    speeds = predicted[0]["assumed"]
    names = ("w4a8", "w4a8, 8-bit attention", "w4a8, step plan", "all three")
    lines += [
        "## By arithmetic, on an H100",
        "",
        f"Not measured. Products are counted from the models' configs, {pipeline_prediction.FRAMES} frames. Assumed: TFLOP/s of"
        f" {speeds['bf16']:g} (linears in bfloat16), {speeds['w4a8']:g} (W4A8), {speeds['attention']:g} (attention),"
        f" {speeds['attention8']:g} (8-bit attention); {speeds['untouched']:.0%} of a step that nothing makes faster; a plan that"
        f" computes {speeds['share']:.0%} of the steps. How many times faster than bfloat16 a clip is:",
        "",
        f"| model | size | tokens | attention's share | seconds a bf16 step | {' | '.join(names)} |",
        f"|---|---|---|---|---|{'---|' * len(names)}",
    ]
    for row in predicted:
        cells = [
            row["model"],
            row["size"],
            f"{row['tokens']:,}",
            f"{row['attention_share']:.0%}",
            f"{row['step_seconds_bf16']:.2f}",
        ]
        lines.append(f"| {' | '.join([*cells, *(f'{row[name]:.2f}' for name in names)])} |")
    return "\n".join([*lines, ""])


def run(output: Path, predict: bool = False, speeds: Speeds | None = None, share: float = SHARE) -> None:
    """Write one JSON object a line, and a page of tables beside it.

    Args:
        output: `.jsonl` to write.
        predict: only the arithmetic.
        speeds: assumed by it; None for the usual.
        share: of the steps that a plan computes in it.
    """
    assumed = speeds or Speeds()
    command = f"quantdit bench pipeline{' --predict' if predict else ''}"
    origin = cpu_linear.provenance() | {"command": command}
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for make in () if predict else (embedded, wan_blocks):
            for row in rows_of(make(Path(folder))):
                rows.append(row | origin)
                print(f"{row['model']}, {row['variant']}: {row['seconds_a_clip']:.3f} s a clip", flush=True)
    rows += [row | {"assumed": asdict(assumed) | {"share": share}} | origin for row in pipeline_prediction.rows(assumed, share)]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = markdown(rows)
    output.with_suffix(".md").write_text(page)
    if predict:
        print(page)
