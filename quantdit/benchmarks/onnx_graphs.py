"""Measure exported graphs in ONNX Runtime on this CPU, ours and others: `quantdit bench onnx --output FILE.jsonl`.

Two blocks of a known transformer's true shapes, with made-up heavy-tailed weights. Every graph of ours first passes the export's
own verification. Candidates are timed in turn, round after round, so that a drift of the machine hits all of them; the error of
each is that of its output against float32 PyTorch's. Nothing is calibrated on data, by nobody: weights are rounded to nearest,
ours after the Hadamard rotation that the presets have, HQQ's by HQQ.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from quantdit.benchmarks import cpu_linear
from quantdit.checkpoints.random_weights import write_random_transformer
from quantdit.compiling.compile import compile
from quantdit.compiling.plan import Plan
from quantdit.exporters import onnx_session, onnx_verify, to_onnx
from quantdit.models.adapter import adapter_for
from quantdit.models.known_models import transformer_config
from quantdit.models.prediction import prediction_of
from quantdit.models.synthetic import synthetic_inputs
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.presets import from_bits, with_weight_format
from quantdit.recipes.rules import Recipe, Rule
from quantdit.recipes.sampling_plan import SamplingPlan, Size

ROUNDS = 7
BASELINE = "ONNX Runtime float32, our export's graph"
BLOCKS = 2


@dataclass(frozen=True)
class Subject:
    """What is measured: a known model's shapes, cut to BLOCKS blocks, and the size of its inputs."""

    model: str
    size: Size
    tokens: int


SUBJECTS = (
    Subject("wan-1.3b", Size(1, 5, 32, 32, 64), 1280),
    Subject("dit-xl-2-256", Size(2, 1, 32, 32), 512),
)

# Rules that replace the preset's last one: integers in groups of 128, which MatMulNBits keeps at 4 bits.
GROUPED = {"weight": "int4", "group_size": 128, "method": "rtn", "activation_bits": 8}


@dataclass(frozen=True)
class Ours:
    """One way of ours: bits as a preset, with other weights perhaps, or GROUPED ones for the blocks; the export's target."""

    bits: str
    target: str
    weights: str = ""
    grouped: bool = False


OURS = {
    "ours w8a8, target cpu": Ours("w8a8", "cpu"),
    "ours w8a8, target cpu-vnni": Ours("w8a8", onnx_session.VNNI),
    "ours w4a8 (table), target cpu": Ours("w4a8", "cpu"),
    "ours w4a8 (trellis), target cpu": Ours("w4a8", "cpu", "trellis"),
    "ours w4a8 (int4 g128), target cpu": Ours("w4a8", "cpu", grouped=True),
    "ours w4a8 (int4 g128), target cpu-nbits": Ours("w4a8", "cpu-nbits", grouped=True),
}


def plan(how: Ours) -> Recipe:
    """Return the recipe of a way of ours."""
    preset = from_bits(how.bits)
    if how.weights:
        return with_weight_format(preset, how.weights)
    if not how.grouped:
        return preset
    *before, last = preset.to_dict()["rule"]
    rules = [Rule(**rule) for rule in (*before, last | GROUPED)]
    return Recipe(f"{how.bits} int4 g128", tuple(rules))


def dense_graph(transformer: nn.Module, arguments: dict, path: Path) -> None:
    """Write the full-precision transformer as float32, each weight an initializer, as other quantizers want it."""
    model, content, _ = to_onnx.graph_of(transformer, arguments, narrow=False)
    to_onnx.save(model, path, content)


def plain_graph(transformer: nn.Module, arguments: dict, path: Path) -> None:
    """Write the same as `torch.onnx.export` does it, without what our export mends."""
    program = torch.onnx.export(transformer, (), kwargs=arguments, dynamo=True, verbose=False)
    assert program is not None
    program.save(path, external_data=True)


def peers(dense: Path, folder: Path) -> dict[str, Path]:
    """Return the graphs that ONNX Runtime's own quantizers make of a float32 graph; each touches MatMul nodes alone."""
    import onnx
    from onnxruntime.quantization import QuantType, matmul_nbits_quantizer, quantize_dynamic

    found: dict[str, Path] = {}

    def float32() -> onnx.ModelProto:
        model = onnx.load(dense)
        del model.metadata_props[:]  # the digest in it is of our graph, and what is made of it is another
        return model

    def nbits(name: str, block: int, **options: Any) -> None:
        quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(float32(), block_size=block, accuracy_level=4, **options)
        quantizer.process()
        path = folder / f"{len(found)}.onnx"
        onnx.save(cast(Any, quantizer.model).model, path, save_as_external_data=True, location=f"{path.name}.data")
        found[name] = path

    nbits("MatMulNBitsQuantizer int4 g32", 32, is_symmetric=True)
    nbits("MatMulNBitsQuantizer int4 g128", 128, is_symmetric=True)
    hqq = matmul_nbits_quantizer.HQQWeightOnlyQuantConfig(block_size=128, bits=4)
    nbits("MatMulNBitsQuantizer HQQ int4 g128", 128, algo_config=hqq)
    plain = float32()
    del plain.graph.value_info[:]  # it trips over shapes that it has changed itself
    for name, kind in (("quantize_dynamic int8 per channel", QuantType.QInt8), ("quantize_dynamic uint8", QuantType.QUInt8)):
        path = folder / f"{len(found)}.onnx"
        # MatMul alone (Gemm becomes one): its form of Attention is refused by ONNX Runtime itself.
        options = {"per_channel": kind == QuantType.QInt8, "op_types_to_quantize": ["MatMul"], "use_external_data_format": True}
        quantize_dynamic(plain, path, weight_type=kind, **options)
        found[name] = path
    return found


def runner(path: Path, feeds: dict[str, np.ndarray]) -> Callable[[], Tensor]:
    """Return a call of a graph with the settings that `quantdit.exporters.session` has."""
    opened = onnx_session.session(path)
    named = {i.name: feeds[i.name] for i in opened.get_inputs()}
    return lambda: torch.from_numpy(opened.run(None, named)[0])


def file_bytes(path: Path) -> int:
    """Return the bytes of a graph and of its weights beside it."""
    return sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*"))


def bare_transformer(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Return the transformer of a folder that holds nothing else."""
    bare: Any = load_pipeline(str(folder), dtype=dtype)[0]
    return bare.transformer


def rows_for(subject: Subject, folder: Path, rounds: int) -> list[dict]:
    """Measure one subject."""
    config = transformer_config(subject.model) | {"num_layers": BLOCKS}
    write_random_transformer(config, folder / "dense", 0)
    dense = bare_transformer(folder / "dense", torch.float32)
    generator = torch.Generator().manual_seed(0)
    inputs = synthetic_inputs(dense, adapter_for(dense), subject.size, generator, time=500)
    arguments = {name: value for name, value in inputs.items() if value is not None}
    expected = torch_runner(dense, arguments)().clone()
    graphs: dict[str, Path] = {}
    for number, (name, how) in enumerate(OURS.items()):
        if how.target == onnx_session.VNNI and onnx_session.saturates():
            continue
        made = folder / f"ours{number}"
        pipeline, source = load_pipeline(str(folder / "dense"))
        compile(pipeline, source, Plan(plan(how), SamplingPlan(samples=0)), made)
        graphs[name] = folder / f"ours{number}.onnx"
        found = to_onnx.to_onnx(made, graphs[name], target=how.target)["verified"]
        print(f"{subject.model}: {name} verified, parts {found['parts_rel_rmse']:.1e}, whole {found['rel_rmse']:.1e}")
    path, plain = folder / "float32.onnx", folder / "plain.onnx"
    dense_graph(dense, arguments, path)
    plain_graph(dense, arguments, plain)
    graphs = {BASELINE: path, "ONNX Runtime float32, torch.onnx.export's graph": plain} | graphs | peers(path, folder)
    feeds = {name: value.numpy() for name, value in onnx_session.leaves(arguments) if isinstance(value, Tensor)}
    candidates = {name: runner(graph, feeds) for name, graph in graphs.items()}
    candidates |= {"torch float32": torch_runner(dense, arguments)}
    narrow = bare_transformer(folder / "dense", torch.bfloat16)
    halves = {n: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in arguments.items()}
    candidates |= {"torch bfloat16": torch_runner(narrow, halves)}
    measured = cpu_linear.measure(candidates, rounds, untimed=1)
    base = measured[BASELINE][0]
    return [
        {
            "model": subject.model,
            "blocks": BLOCKS,
            "tokens": subject.tokens,
            "what": name,
            "ms_median": round(median, 1),
            "ms_fastest": round(fastest, 1),
            "times_ort_float32": round(base / median, 2),
            "rel_rmse": float(f"{onnx_verify.rel_rmse([(candidates[name](), expected)]):.2e}"),
        }
        | ({"file_mb": round(file_bytes(graphs[name]) / 1e6, 1)} if name in graphs else {})
        for name, (median, fastest) in measured.items()
    ]


def torch_runner(transformer: nn.Module, arguments: dict) -> Callable[[], Tensor]:
    """Return a call of PyTorch's transformer."""

    def run() -> Tensor:
        with torch.no_grad():
            y = prediction_of(transformer(**arguments))
        assert y is not None
        return y

    return run


def markdown(rows: list[dict]) -> str:
    """Return the rows as a table for each model."""
    first = rows[0]
    lines = [
        "# Exported graphs in ONNX Runtime",
        "",
        f"{first['cpu']}, {first['threads']} threads, {' '.join(first['isa'])}, onnxruntime {first['onnxruntime']},"
        f" torch {first['torch']}, {first['commit']}. Made by `make bench-onnx`.",
        "Made-up weights, nothing calibrated on data; rel_rmse is the output's against float32 PyTorch.",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        lines += ["", f"## {of_model[0]['blocks']} blocks of {model}, {of_model[0]['tokens']} tokens", ""]
        lines += ["| what | ms, median | ms, fastest | times ORT float32 | rel_rmse | file, MB |", "|---|---|---|---|---|---|"]
        for row in of_model:
            size = row.get("file_mb", "")
            times = f"{row['ms_median']:.1f} | {row['ms_fastest']:.1f} | {row['times_ort_float32']:.2f}"
            lines.append(f"| {row['what']} | {times} | {row['rel_rmse']:.1e} | {size} |")
    return "\n".join(lines) + "\n"


def run(output: Path, subjects: tuple[Subject, ...] = SUBJECTS, rounds: int = ROUNDS) -> None:
    """Measure every subject and write one JSON object a line, and a table beside it.

    Raises:
        ImportError: the packages of quantdit's extra onnx are missing.
        ValueError: a graph that does not compute what its checkpoint does.
    """
    to_onnx.require_packages()
    import onnxruntime

    logging.disable(logging.INFO)  # of ONNX Runtime's quantizers, a line for every tensor
    origin = cpu_linear.provenance() | {"onnxruntime": onnxruntime.__version__, "command": "quantdit bench onnx"}
    rows = []
    for subject in subjects:
        with tempfile.TemporaryDirectory() as folder:
            for row in rows_for(subject, Path(folder), rounds):
                rows.append(row | origin)
                speed = f"{row['ms_median']:>9.1f} ms  x{row['times_ort_float32']:<6}"
                print(f"{row['model']}  {speed} {row['rel_rmse']:.1e}  {row['what']}", flush=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("".join(json.dumps(row) + "\n" for row in rows))
        output.with_suffix(".md").write_text(markdown(rows))
