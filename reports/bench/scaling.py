"""How time and memory of a calibration grow with the model: Wan's architecture at three sizes, random weights, streamed.

    python reports/bench/scaling.py [--only 1.3B/rtn]

Each row is a process of its own, so that its peak memory is its own. Where only some of a model's blocks are run, the seconds of
the whole model are extrapolated from the seconds per block, and the row says so. Rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROWS, TABLE, PLOT = HERE / "scaling.jsonl", HERE / "scaling.md", HERE / "scaling.png"
BUDGET = 12 * 2**30


@dataclass(frozen=True)
class Model:
    """A size of Wan: heads of 128, width of the feed-forward, blocks; and how many of the blocks are run."""

    name: str
    heads: int
    ffn: int
    blocks: int
    run: int


MODELS = (Model("0.3B", 6, 4480, 26, 26), Model("1.3B", 12, 8960, 30, 30), Model("14B", 40, 13824, 40, 3))
# Without data; and with error feedback on 2 prompts x 4 timesteps of a small latent, both branches of guidance.
METHODS = {"rtn": {"samples": 0}, "gptq": {"samples": 2, "steps": 4, "guidance": 5.0}}


def config_of(model: Model) -> dict:
    """Return the transformer's config.json."""
    from quantdit.models.known_models import transformer_config

    return transformer_config("wan-1.3b") | {"num_attention_heads": model.heads, "ffn_dim": model.ffn, "num_layers": model.run}


def settings_of(method: str):
    """Return what is sampled."""
    from quantdit.recipes.sampling_plan import SamplingPlan, Size

    return SamplingPlan(seed=0, latent=Size(1, 5, 16, 16, 512), **METHODS[method])


def run(model: Model, method: str) -> dict:
    """Calibrate one model to w4a8 in this process; returns the row."""
    from quantdit.checkpoints.random_weights import write_random_transformer
    from quantdit.compiling.compile import compile
    from quantdit.compiling.plan import Plan
    from quantdit.compiling.report import to_json
    from quantdit.pipelines.pipeline import load_pipeline
    from quantdit.recipes.presets import from_bits

    with tempfile.TemporaryDirectory(dir=os.environ.get("SCALING_WORK")) as work:
        write_random_transformer(config_of(model), Path(work) / "model", 0)
        # Streamed whatever its size, so that all rows are made in one way.
        budget = min(BUDGET, need(model).resident - 1)
        pipeline, source = load_pipeline(str(Path(work) / "model"), memory_budget=budget)
        made = compile(pipeline, source, Plan(from_bits("w4a8"), settings_of(method)), Path(work) / "out")
    return row(model, method, to_json(made), f"python reports/bench/scaling.py --only {model.name}/{method}")


def reported(model: Model, method: str, output: Path) -> dict:
    """Return the row of a calibration that `quantdit calibrate --model wan-1.3b --random-weights` made of the same model.

    Raises:
        ValueError: it was made of another model, or sampled otherwise.
    """
    report = json.loads((output / "calibration_report.json").read_text())
    given, wanted = report["provenance"], json.loads(json.dumps(asdict(settings_of(method))))
    same = all(given["calibration"][key] == wanted[key] for key in ("samples", "seed", *((METHODS[method].keys()) - {"samples"})))
    made = (given["source"], given.get("random_weights"), report["recipe"]["name"], report["memory"]["streamed"], model.name)
    if not same or made != ("wan-1.3b", True, "w4a8", True, "1.3B"):
        raise ValueError(f"{output} is no {model.name}/{method}: {made}, {given['calibration']}")
    return row(model, method, report, "quantdit calibrate --model wan-1.3b --random-weights --bits w4a8 --memory-budget 6GiB")


def need(model: Model):
    """Return the estimate of the memory, from the config alone."""
    import torch

    from quantdit.checkpoints.streaming import need_of

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_of(model)))
        return need_of(Path(folder), torch.float32)


def row(model: Model, method: str, report: dict, command: str) -> dict:
    """Return what is kept of a calibration's report."""
    seconds = report["seconds"]
    per_block = seconds["quantize"] / model.run
    fixed = seconds["write"] / model.run * model.blocks
    whole = per_block * model.blocks + fixed + seconds["sample"] * model.blocks / model.run
    linears = report["size"]["quantized_weights"] / model.run * model.blocks
    return {
        "model": model.name,
        "method": method,
        "blocks_run": model.run,
        "blocks": model.blocks,
        "quantized_weights": round(linears),
        "seconds": report["seconds"],
        "seconds_of_quantize": report["seconds_of_quantize"],
        "seconds_whole_model": round(whole, 1),
        "extrapolated": model.run < model.blocks,
        "peak_bytes": report["memory"]["peak_bytes"],
        "estimated_bytes": need(model).streamed,
        "bits_per_weight": report["size"]["bits_per_weight"],
        "cores": len(os.sched_getaffinity(0)),
        "machine": f"{_cpu()}, {platform.platform()}",
        "command": command,
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def render(rows: list[dict]) -> None:
    """Write the table and the plot."""
    lines = [
        "# Time and memory of a calibration, by size of the model",
        "",
        "Wan's architecture, random heavy-tailed weights, w4a8, blocks streamed from disk. rtn: from the weights alone. gptq:",
        "2 prompts x 4 timesteps of 5 x 16 x 16 latent cells and 512 text tokens, both branches of guidance. Made by",
        "`make bench-scaling`.",
        "",
        "| model | method | weights | blocks run | cores | s a block | whole model, minutes | peak, GiB | bits a weight |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        mark = " (extrapolated)" if r["extrapolated"] else ""
        lines.append(
            f"| {r['model']} | {r['method']} | {r['quantized_weights'] / 1e9:.2f} B | {r['blocks_run']} of {r['blocks']}"
            f" | {r['cores']} | {r['seconds']['quantize'] / r['blocks_run']:.1f} | {r['seconds_whole_model'] / 60:.1f}{mark}"
            f" | {r['peak_bytes'] / 2**30:.2f} | {r['bits_per_weight']:.3f} |"
        )
    lines += ["", "Memory depends on the widest layer and on one block, not on how many blocks there are.", ""]
    lines += [f"- {r['model']} {r['method']}: {r['note']}" for r in rows if r.get("note")]
    lines += ["", f"{rows[0]['machine']}.", "", "![Time and memory](scaling.png)"] if rows else []
    TABLE.write_text("\n".join(lines) + "\n")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for method in METHODS:
        of = [r for r in rows if r["method"] == method]
        x = [r["quantized_weights"] / 1e9 for r in of]
        left.plot(x, [r["seconds_whole_model"] / 60 for r in of], "o-", label=method)
        right.plot(x, [r["peak_bytes"] / 2**30 for r in of], "o-", label=method)
    for axes, label in ((left, "minutes, whole model"), (right, "peak memory, GiB")):
        axes.set(xlabel="quantized weights, billions", ylabel=label, xscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    left.set_yscale("log")
    right.set_ylim(bottom=0)
    figure.savefig(PLOT, dpi=120)


def main() -> None:
    """Make the rows that are missing, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="one row, such as 1.3B/rtn; it is printed")
    parser.add_argument("--reported", type=Path, metavar="OUTPUT", help="with --only: take the row from a calibration's output")
    args = parser.parse_args()
    wanted = [(model, method) for model in MODELS for method in METHODS]
    if args.only:
        model, method = next(pair for pair in wanted if f"{pair[0].name}/{pair[1]}" == args.only)
        print(json.dumps(reported(model, method, args.reported) if args.reported else run(model, method)))
        return
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    for model, method in wanted:
        if not any((r["model"], r["method"]) == (model.name, method) for r in rows):
            command = [sys.executable, __file__, "--only", f"{model.name}/{method}"]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append(json.loads(printed.splitlines()[-1]))
            ROWS.write_text("".join(json.dumps(r) + "\n" for r in rows))
    rows.sort(key=lambda r: (list(METHODS).index(r["method"]), r["quantized_weights"]))
    render(rows)
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
