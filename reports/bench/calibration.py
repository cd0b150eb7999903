"""What calibrating costs: one block of Wan 1.3B in CPU seconds by stage, and the errors that come out.

    python reports/bench/calibration.py [--label NAME] [--only w4a8]

A block of the true shapes (1536 wide, 8960 in the feed-forward), with made-up weights and made-up inputs whose channels are of
uneven size: three calls of 640 tokens and 512 of text, seed 0. Each row is a process of its own, on one thread. Its seconds are
the process's, so neighbours on a busy machine count little. Rows that are there are not made again. Run by the Python of another
checkout with a label, such as `--label before`, it measures that checkout; calibration.md sets labels side by side.
Writes calibration.jsonl and calibration.md.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).parent
ROWS, TABLE = HERE / "calibration.jsonl", HERE / "calibration.md"
SEED, BLOCKS, TRAINED = 0, 30, 4
TIMES, FRAMES, HEIGHT, WIDTH, TEXT = (900, 500, 100), 5, 16, 32, 512
REST = "the rest"


@dataclass(frozen=True)
class Case:
    """Bits, whether there are inputs, steps of training, and the seconds that are aimed at."""

    name: str
    bits: str
    data: bool = True
    steps: int = 0
    target: str = ""


CASES = (
    Case("w4a8", "w4a8", target="30"),
    Case("w3a8", "w3a8", target="80"),
    Case("w2a16, and training steps", "w2a16", steps=TRAINED, target="75; a step 1.8"),
    Case("w4a8, no data", "w4a8", data=False, target="4"),
    Case("w3a8, no data", "w3a8", data=False, target="24"),
)

# What is timed, less what is timed inside of it. A name that a checkout does not have is left out.
STAGES = {
    "Gram sums": ("calibration.stats.update",),
    "centre and transform the Gram": ("calibration.stats.Stats.centred_gram", "tensors.transform.gram"),
    "grid": ("calibration.quantize.GRIDS",),
    "Cholesky": ("calibration.gptq.factor", "calibration.gptvq.factor"),
    "gptq": ("calibration.quantize.gptq",),
    "descent": ("calibration.quantize.descend",),
    "scales and output errors": ("calibration.quantize._refine_scale", "calibration.layer.output_error"),
    "forward passes": ("calibration.observe.capture.run_block", "compiling.quantize_blocks._layer_error"),
    "training": ("compiling.finetune.train",),
    "held-out errors": ("compiling.finetune.held_out_error",),
}


class Clock:
    """CPU seconds by stage; a stage within another one stops the other's clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.stack, self.since = [REST], time.process_time()

    def switch(self) -> None:
        """Put the time since the last switch down to the stage that is on."""
        now = time.process_time()
        self.seconds[self.stack[-1]] = self.seconds.get(self.stack[-1], 0.0) + now - self.since
        self.since = now

    def timed(self, stage: str, function: Callable) -> Callable:
        """Return the function with its time put down to a stage."""

        @functools.wraps(function)
        def run(*args: object, **kwargs: object) -> object:
            self.switch()
            self.stack.append(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self.stack.pop()

        return run

    def watch(self) -> None:
        """Time what STAGES lists."""
        for stage, places in STAGES.items():
            for place in places:
                path, _, name = place.rpartition(".")
                holder = _found(path)
                value = getattr(holder, name, None)
                if isinstance(value, dict):
                    value.update({key: self.timed(stage, function) for key, function in value.items()})
                elif isinstance(value, property):
                    setattr(holder, name, property(self.timed(stage, value.fget)))
                elif value is not None:
                    setattr(holder, name, self.timed(stage, value))


def _found(path: str) -> object:
    """Return a module of quantdit, or a class in one."""
    try:
        return importlib.import_module(f"quantdit.{path}")
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(f"quantdit.{module}"), name)


def block() -> nn.Module:
    """Return a Wan of one block, whose patches have as many numbers as the block is wide, so that its inputs span its width."""
    from diffusers import WanTransformer3DModel

    from quantdit.checkpoints.random_weights import write_random_transformer
    from quantdit.models.known_models import transformer_config

    config = transformer_config("wan-1.3b") | {"num_layers": 1, "in_channels": 384}
    with tempfile.TemporaryDirectory() as folder:
        write_random_transformer(config, Path(folder) / "model", SEED)
        return WanTransformer3DModel.from_pretrained(Path(folder) / "model", torch_dtype=torch.float32)


def calls() -> list[dict[str, torch.Tensor]]:
    """Return the calls; channels have sizes over two orders of magnitude, and means."""
    generator = torch.Generator().manual_seed(SEED)

    def uneven(*shape: int, dim: int) -> torch.Tensor:
        channels = [1] * len(shape)
        channels[dim] = shape[dim]
        size = torch.randn(channels, generator=generator).exp()
        return size * (torch.randn(shape, generator=generator) + 0.5 * torch.randn(channels, generator=generator))

    return [
        {
            "hidden_states": uneven(1, 384, FRAMES, HEIGHT, WIDTH, dim=1),
            "encoder_hidden_states": uneven(1, TEXT, 4096, dim=2),
            "timestep": torch.full((1,), time),
        }
        for time in TIMES
    ]


def measure(case: Case, label: str) -> dict:
    """Return the row of one case."""
    import quantdit
    from quantdit.calibration import viterbi
    from quantdit.checkpoints.checkpoint import quant_layers

    torch.set_num_threads(1)
    transformer, inputs, clock = block(), calls() if case.data else None, Clock()
    compiled(case.bits)
    clock.watch()
    reports = {}
    put = quantdit.compiling.quantize_blocks._put
    quantdit.compiling.quantize_blocks._put = lambda *given: _kept(reports, put(*given))
    clock.since = time.process_time()
    quantdit.quantize(transformer, case.bits, inputs=inputs, seed=SEED, finetune_steps=case.steps if case.data else None)
    clock.switch()
    trained = clock.seconds.pop("training", 0.0), clock.seconds.pop("held-out errors", 0.0)
    errors = {
        key: [r[key] for r in reports.values() if key in r] for key in ("rel_rmse", "weight_only_rel_rmse", "weight_rel_rmse")
    }
    return {
        "label": label,
        "case": case.name,
        "layers": len(quant_layers(transformer)),
        "seconds": round(sum(clock.seconds.values()), 1),
        "stages": {stage: round(s, 2) for stage, s in sorted(clock.seconds.items(), key=lambda item: -item[1])},
        "training_step": round(trained[0] / case.steps, 2) if case.steps else None,
        **{key: float(f"{statistics.fmean(found):.5g}") for key, found in errors.items() if found},
        "numba": viterbi.numba_is_installed() if hasattr(viterbi, "numba_is_installed") else find_spec("numba") is not None,
        "torch": torch.__version__,
        "machine": f"{_cpu()}, {torch.backends.cpu.get_cpu_capability()}",
    }


def _kept(reports: dict, found: dict) -> dict:
    reports.update(found)
    return found


def compiled(bits: str) -> None:
    """Have numba compile what it will, or read it from its cache, which is no cost of a block's."""
    from quantdit.calibration.quantize import WeightOptions, quantize_weight
    from quantdit.recipes.presets import from_bits

    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(SEED))
    quantize_weight(
        weight, torch.eye(64), from_bits(bits).rules[-1].weight, 64, "gptq", WeightOptions(act_order=True, cd_passes=1)
    )


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def render(rows: list[dict]) -> str:
    """Return the page."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    lines = [
        "# What calibrating one block of Wan 1.3B costs",
        "",
        "1536 wide, 8960 in the feed-forward, 46.4 M weights in 10 layers, made up; three calls of 640 tokens. CPU seconds of",
        f"one thread. The whole model takes {BLOCKS} times as long. Made by `python reports/bench/calibration.py`.",
        "",
        "| " + " | ".join(["case", "aim, s", *(f"{x}, s" for x in labels), *(f"{x}, error" for x in labels)]) + " |",
        "|---|---|" + "---|" * 2 * len(labels),
    ]
    for case in CASES:
        own = [next((r for r in rows if (r["label"], r["case"]) == (label, case.name)), None) for label in labels]
        seconds = ["" if r is None else f"{r['seconds']:.1f}" + _step(r) for r in own]
        errors = ["" if r is None else f"{r.get('rel_rmse', r.get('weight_rel_rmse')):.4f}" for r in own]
        lines.append(f"| {case.name} | {case.target} | {' | '.join(seconds)} | {' | '.join(errors)} |")
    lines += ["", "Error: of a layer's output, quantized inputs included, the mean of the layers; without data of the weight."]
    for case in CASES:
        own = [r for r in rows if r["case"] == case.name]
        stages = list(dict.fromkeys(stage for r in own for stage in r["stages"]))
        if case.data and own:
            lines += [
                "",
                f"## {case.name}, by stage",
                "",
                f"| stage | {' | '.join(r['label'] for r in own)} |",
                "|---|" + "---|" * len(own),
            ]
            lines += ["| " + " | ".join([stage, *(f"{r['stages'].get(stage, 0):.1f}" for r in own)]) + " |" for stage in stages]
    lines += ["", "; ".join(dict.fromkeys(f"{r['label']}: {r['machine']}, torch {r['torch']}" for r in rows)) + "."]
    return "\n".join(lines) + "\n"


def _step(row: dict) -> str:
    return f"; a step {row['training_step']:.2f}" if row["training_step"] else ""


def main() -> None:
    """Make the rows that are missing, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--label", default="now", help="what rows are called, by the code that is measured")
    parser.add_argument("--only", help="one case; its row is printed")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(next(case for case in CASES if case.name == args.only), args.label)))
        return
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    for case in CASES:
        if not any((r["label"], r["case"]) == (args.label, case.name) for r in rows):
            command = [sys.executable, __file__, "--only", case.name, "--label", args.label]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            rows.append(json.loads(printed.splitlines()[-1]))
            ROWS.write_text("".join(json.dumps(r) + "\n" for r in rows))
    TABLE.write_text(render(rows))
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
