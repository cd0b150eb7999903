"""Weight codes compared on one heavy-tailed layer of Wan's shape, next to other packages: `make study-layer`.

    python reports/study/wan_layer.py [--peer sdnq]

The layer is `blocks.1.attn1.to_q` (1536 x 1536) of a Wan 1.3B of two blocks with made-up weights: Student's t of 5 degrees of
freedom, a few output channels eight times as large (quantdit/checkpoints/random_weights.py). Its inputs are what the block
before makes of noise: 4 calls of 1280 tokens to calibrate on, 2 others to measure on. Activations stay as they are, so that the
error is the weights' alone: rel_rmse of the layer's output on the calls held out, and of the weight itself. Bits count every
stored tensor but the bias. Without --peer quantdit's own rows; with it a package's 2, 3 and 4-bit weight-only rows of peers.py,
in an environment that has it. Rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

# PYTHONSAFEPATH, which the Makefile sets, keeps the folder of a script off the path.
sys.path.append(str(Path(__file__).parent))
import measure
import peers
import quantdit
from quantdit.calibration import stats
from quantdit.calibration.layer import quantize_layer
from quantdit.checkpoints.random_weights import write_random_transformer
from quantdit.layers.quant_linear import QuantLinear
from quantdit.models.adapter import adapter_for
from quantdit.models.known_models import transformer_config
from quantdit.models.synthetic import synthetic_inputs
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.resolve import resolve
from quantdit.recipes.rules import Layer, Recipe, Rule
from quantdit.recipes.sampling_plan import Size
from quantdit.system import files

HERE = Path(__file__).parent
ROWS, TABLE = HERE / "wan-layer.jsonl", HERE / "wan-layer.md"
LAYER = "blocks.1.attn1.to_q"
SIZE = Size(1, 5, 32, 32, 64)
SEED = 0
CALIBRATION = ((0, 900), (1, 600), (2, 300), (3, 100))  # seed and timestep of each call
HELD_OUT = ((10, 750), (11, 450))

NEAREST = {"method": "rtn", "bias_correction": False}
FORMATS = {
    4: {
        "int4 g64": {"weight": "int4", "group_size": 64},
        "Lloyd-Max table": {"weight": "table4"},
        "twin-log table": {"weight": "table4", "table": "twin-log"},
        "codebook 256 x 2": {"weight": "vq256x2"},
        "trellis": {"weight": "trellis4_l12"},
    },
    3: {
        "int3 g64": {"weight": "int3", "group_size": 64},
        "Lloyd-Max table": {"weight": "table3"},
        "twin-log table": {"weight": "table3", "table": "twin-log"},
        "codebook 64 x 2": {"weight": "vq64x2"},
        "trellis": {"weight": "trellis3_l12"},
    },
    2: {
        "int2 g32": {"weight": "int2", "group_size": 32},
        "Lloyd-Max table": {"weight": "table2"},
        "twin-log table": {"weight": "table2", "table": "twin-log"},
        "codebook 256 x 4": {"weight": "vq256x4"},
        "trellis": {"weight": "trellis2_l12"},
    },
}
WAYS = {"round to nearest": NEAREST, "error feedback": {}, "error feedback, rank 32": {"low_rank": 32}}


@dataclass(frozen=True)
class Case:
    """The layer, the tokens `[rows, 1536]` to calibrate on, and those to measure on."""

    linear: nn.Linear
    calibration: Tensor
    held_out: Tensor


def case() -> Case:
    """Make the layer and its inputs; the same on every machine but for rounding."""
    with tempfile.TemporaryDirectory() as folder:
        write_random_transformer(transformer_config("wan-1.3b") | {"num_layers": 2}, Path(folder), SEED)
        transformer = load_pipeline(folder)[0].transformer.float()
    linear, seen = transformer.get_submodule(LAYER), []
    linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2).clone()))
    adapter = adapter_for(transformer)
    for seed, step in (*CALIBRATION, *HELD_OUT):
        inputs = synthetic_inputs(transformer, adapter, SIZE, torch.Generator().manual_seed(seed), time=step)
        with torch.no_grad():
            transformer(**{name: value for name, value in inputs.items() if value is not None})
    linear._forward_pre_hooks.clear()
    split = len(CALIBRATION)
    return Case(linear, torch.cat(seen[:split]), torch.cat(seen[split:]))


def rel_rmse(got: Tensor, expected: Tensor) -> float:
    """Return the error's norm over the expected's."""
    return float(f"{float((got - expected).norm() / expected.norm()):.4g}")


def measured(given: Case, layer: nn.Module, stored: list[Tensor], **facts: object) -> dict:
    """Return the row of a layer in the place of the given one."""
    with torch.no_grad():
        expected, got = given.linear(given.held_out), layer(given.held_out)
        identity = torch.eye(given.linear.in_features)
        weight = layer(identity) - layer(torch.zeros_like(identity))
        dense = given.linear.weight.T
    return facts | {
        "bits_per_weight": round(measure.stored_bits(stored, given.linear.weight.numel()), 4),
        "output_rel_rmse": rel_rmse(got, expected),
        "weight_rel_rmse": rel_rmse(weight, dense),
    }


def own_row(given: Case, bits: int, name: str, way: str) -> dict:
    """Quantize with quantdit, as calibration quantizes a layer."""
    rule = Rule("*", **(FORMATS[bits][name] | WAYS[way]))
    linear = given.linear
    layers = [Layer(LAYER, "attention", linear.out_features, linear.in_features)]
    plan = resolve(Recipe(name, (rule,)), layers)[LAYER]
    found = stats.update(stats.init(linear.in_features, 1), given.calibration, 0)
    began = time.process_time()
    made = quantize_layer(linear.weight, linear.bias, found, plan, SEED)
    seconds = round(time.process_time() - began, 1)
    layer = QuantLinear.from_tensors(made.spec, made.tensors, made.bias)
    stored = [files.narrowest(t) for t in made.tensors.values()]  # as a checkpoint stores them
    row = measured(given, layer, stored, package="quantdit", version=quantdit.__version__)
    return row | {"bits": bits, "method": name, "way": way, "seconds": seconds}


class _Alone(peers.Model):
    """One layer as what peers.py quantizes."""

    def calibrate(self) -> None:
        with torch.no_grad():
            self.pipeline.transformer(self.pipeline.calibration)


class _Block(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.to_q = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.to_q(x)


def peer_row(given: Case, peer: peers.Peer, configuration: peers.Configuration, bits: int) -> dict:
    """Quantize with another package, through its own code."""
    linear = nn.Linear(given.linear.in_features, given.linear.out_features)
    linear.load_state_dict(given.linear.state_dict())
    model = _Alone(SimpleNamespace(transformer=_Block(linear).eval(), calibration=given.calibration), ["to_q"], [])
    began = time.process_time()
    stored = peer.quantize(model, **configuration.options)
    seconds = round(time.process_time() - began, 1)
    row = measured(given, model.transformer, stored, package=peer.package, version=version(peer.package))
    return row | {"bits": bits, "method": configuration.method, "way": "", "seconds": seconds}


def markdown(rows: list[dict]) -> str:
    """Return a table for each width, best first."""
    lines = [
        "# Weight codes on one heavy-tailed layer",
        "",
        f"`{LAYER}` of a Wan 1.3B with made-up weights (1536 x 1536, Student's t of 5 degrees of freedom), inputs from the block"
        " before, errors on calls held out, activations as they are; seed 0. Seconds of a CPU core. Made by `make study-layer`.",
    ]
    for bits in sorted({row["bits"] for row in rows}, reverse=True):
        lines += [
            "",
            f"## {bits} bits",
            "",
            "| package | weights | how | stored bits | output rel_rmse | weight rel_rmse | seconds |",
        ]
        lines.append("|---|---|---|---|---|---|---|")
        for row in sorted((r for r in rows if r["bits"] == bits), key=lambda r: r["output_rel_rmse"]):
            name = f"{row['package']} {row['version']}"
            name = f"**{name}**" if row["package"] == "quantdit" else name
            lines.append(
                f"| {name} | {row['method']} | {row['way']} | {row['bits_per_weight']:.2f} | {row['output_rel_rmse']:.4f}"
                f" | {row['weight_rel_rmse']:.4f} | {row['seconds']} |"
            )
    return "\n".join(lines) + "\n"


def wanted(peer: str | None) -> list[tuple[tuple, dict]]:
    """Return what identifies each row and what makes it."""
    if peer is None:
        return [
            (("quantdit", bits, name, way), {"bits": bits, "name": name, "way": way})
            for bits, formats in FORMATS.items()
            for name in formats
            for way in WAYS
        ]
    found = peers.PEERS[peer]
    chosen = [c for c in found.configurations if c.bits in ("w2a16", "w3a16", "w4a16")]
    return [
        ((found.package, int(c.bits[1]), c.method, ""), {"peer": found, "configuration": c, "bits": int(c.bits[1])})
        for c in chosen
    ]


def main() -> None:
    """Make the rows that are missing, one after the other, each written when it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", choices=sorted(peers.PEERS))
    args = parser.parse_args()
    rows = measure.read_rows(ROWS)
    done = {(r["package"], r["bits"], r["method"], r["way"]) for r in rows}
    missing = [(key, how) for key, how in wanted(args.peer) if key not in done]
    given = case() if missing else None
    for key, how in missing:
        try:
            row = own_row(given, **how) if args.peer is None else peer_row(given, **how)
        except Exception as error:  # of somebody else's code: the row is left out, and the reason said
            if args.peer is None:
                raise
            print(f"{key}: {type(error).__name__}: {error}", flush=True)
            continue
        rows.append(row | {"torch": torch.__version__, "seed": SEED})
        measure.write_rows(rows, ROWS)
        TABLE.write_text(markdown(rows))
        print(f"{key}: {row['output_rel_rmse']:.4f} at {row['bits_per_weight']:.2f} bits, {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
