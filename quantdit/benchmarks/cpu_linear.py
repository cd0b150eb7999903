"""Measure quantized linears on this CPU against `F.linear` in the same run: `quantdit bench cpu --output FILE.jsonl`.

Every row first passes a correctness gate: an integer product must equal the int64 one, a QuantLinear the float64 product of
what it decodes to. Candidates are timed in turn, round after round, so that a drift of the machine hits all of them; the
median and the fastest of the rounds are kept.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from quantdit.calibration.quantize import quantize_weight
from quantdit.kernels import cpu
from quantdit.layers.quant_linear import QuantLinear
from quantdit.tensors import hadamard, transform
from quantdit.tensors.layer_spec import ActivationSpec, LayerSpec
from quantdit.tensors.transform import Transform

# (m, n, k): the embedded model's feed-forward at 128 images, DiT-XL/2's at 256 and 1024 tokens, Wan-1.3B's projections.
SHAPES = ((6272, 768, 192), (256, 4608, 1152), (1024, 4608, 1152), (1024, 1152, 4608), (1024, 1536, 1536), (256, 8960, 1536))
ROUNDS = 9
KINDS = {  # weight format, activation bits
    "w4a8": ("int4", 8),
    "table4 a8": ("table4", 8),
    "w8a8": ("int8", 8),
    "w4a16": ("int4", 16),
    "w2a16 codebook": ("vq256x4", 16),
}


def quant_linear(weight: Tensor, bits: str, cached: bool) -> QuantLinear:
    """Return a rotated QuantLinear of `weight` `[n, k]`, `bits` a key of KINDS; rounding method does not matter for speed."""
    format, activation_bits = KINDS[bits]
    k = weight.shape[1]
    block = hadamard.block_size(k)
    t = Transform(hadamard.random_sign(k, 0), block)
    group = 64 if format == "int4" else k
    q = quantize_weight(transform.apply_to_weight(t, weight), torch.eye(k), format, group, "rtn")
    spec = LayerSpec(q.spec, ActivationSpec(activation_bits), "hadamard", block)
    layer = QuantLinear.from_tensors(spec, q.tensors() | transform.tensors(t), None)
    layer.cache_decoded = cached
    return layer


def gate_linear(layer: QuantLinear, x: Tensor) -> None:
    """Refuse to time a layer that does not compute what it decodes to.

    Raises:
        ValueError: the output differs from the float64 product by more than float32 rounding.
    """
    rotated = transform.apply(layer.transform, x)
    if (bits := layer.layer_spec.activation.bits) < 16:
        codes, scale = torch.ops.quantdit.quantize_tokens(rotated, bits)
        rotated = codes.double() * scale.double()[:, None]
    expected = rotated.double() @ layer.qtensor.dequantize().double().T
    error = float((layer(x).double() - expected).norm() / expected.norm())
    if error > 1e-6:
        raise ValueError(f"{layer} is wrong by {error:.2e} before it is timed")


def int8_products(codes: Tensor, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return the candidate routines for codes `[m, k]` times weight `[n, k]`, both int8."""
    ones = torch.ones(weight.shape[0])
    transposed = weight.T.contiguous()
    floats = weight.float()
    candidates: dict[str, Callable[[], Tensor]] = {
        "chosen: cpu.scaled_int8_product": lambda: cpu.scaled_int8_product(codes, weight, ones),
        "float32 in exact chunks": lambda: cpu.exact_float_product(codes, floats),
        "torch._int_mm, right operand transposed": lambda: torch._int_mm(codes, weight.T),  # pyright: ignore[reportPrivateImportUsage] - the only way to it
        "torch._int_mm, right operand contiguous": lambda: torch._int_mm(codes, transposed),  # pyright: ignore[reportPrivateImportUsage] - the only way to it
    }
    return candidates | _onnxruntime_products(codes, transposed)


def _onnxruntime_products(codes: Tensor, transposed: Tensor) -> dict[str, Callable[[], Tensor]]:
    try:
        import onnx
        import onnxruntime
    except ImportError:
        return {}
    import numpy as np
    from onnx import TensorProto, helper

    k, n = transposed.shape
    kinds = {
        "u8 x s8": (128, 0, TensorProto.UINT8, TensorProto.INT8),
        "u8 x u8": (128, 128, TensorProto.UINT8, TensorProto.UINT8),
    }
    kinds["s8 x s8"] = (0, 0, TensorProto.INT8, TensorProto.INT8)
    found: dict[str, Callable[[], Tensor]] = {}
    for name, (a_zero, w_zero, a_type, w_type) in kinds.items():
        stored = (transposed.numpy().astype(np.int16) + w_zero).astype(np.uint8 if w_zero else np.int8)
        a = (codes.numpy().astype(np.int16) + a_zero).astype(np.uint8 if a_zero else np.int8)
        graph = helper.make_graph(
            [helper.make_node("MatMulInteger", ["a", "w", "a_zero", "w_zero"], ["y"])],
            "product",
            [helper.make_tensor_value_info("a", a_type, [None, k])],
            [helper.make_tensor_value_info("y", TensorProto.INT32, [None, n])],
            [
                helper.make_tensor("w", w_type, [k, n], stored.tobytes(), raw=True),
                helper.make_tensor("a_zero", a_type, [], [a_zero]),
                helper.make_tensor("w_zero", w_type, [], [w_zero]),
            ],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        label = f"onnxruntime {onnxruntime.__version__} MatMulInteger {name} (onnx {onnx.__version__})"
        found[label] = lambda session=session, a=a: torch.from_numpy(session.run(None, {"a": a})[0])
    return found


def measure(candidates: dict[str, Callable[[], Tensor]], rounds: int, untimed: int = 0) -> dict[str, tuple[float, float]]:
    """Return (median, fastest) milliseconds of each candidate over interleaved rounds, after one warm-up.

    Args:
        candidates: what is called, by name.
        rounds: how often each is timed.
        untimed: calls right before each timed one, where candidates have threads of their own: those of ONNX Runtime and of
            OpenMP wait actively for a while after a call and would take the next candidate's processors.
    """
    for run in candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            for _ in range(untimed):
                run()
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: (statistics.median(t), min(t)) for name, t in times.items()}


def rows_for(m: int, n: int, k: int, rounds: int, products: bool) -> list[dict]:
    """Measure one shape; the ratio is float32's median over the candidate's."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=generator)
    weight = torch.randn(n, k, generator=generator) / k**0.5
    layers: dict[str, QuantLinear] = {}
    for bits in ("w4a8", "w8a8", "w4a16"):
        layers[f"QuantLinear {bits}, decoded once"] = quant_linear(weight, bits, cached=True)
    layers["QuantLinear w4a8, decoded each call"] = quant_linear(weight, "w4a8", cached=False)
    for layer in layers.values():
        gate_linear(layer, x)
    narrow, narrow_weight = x.bfloat16(), weight.bfloat16()
    candidates: dict[str, Callable[[], Tensor]] = {
        "F.linear float32": lambda: nn.functional.linear(x, weight),
        "F.linear bfloat16": lambda: nn.functional.linear(narrow, narrow_weight),
    }
    candidates |= {name: (lambda layer=layer: layer(x)) for name, layer in layers.items()}
    notes: dict[str, bool] = {}
    if products:
        codes, _ = torch.ops.quantdit.quantize_tokens(x, 8)
        decoded = layers["QuantLinear w4a8, decoded once"].decoded()
        exact = codes.double() @ decoded.double().T
        # Operands that use the whole range: the ones a saturating routine fails on.
        hard_codes, hard_weight = torch.full_like(codes[:64], 127), torch.full_like(decoded[:64], 127)
        hard_exact = hard_codes.double() @ hard_weight.double().T
        hard = int8_products(hard_codes, hard_weight)
        for name, run in int8_products(codes, decoded).items():
            label = f"int8 product: {name}"
            notes[label] = bool(torch.equal(run().double(), exact)) and bool(torch.equal(hard[name]().double(), hard_exact))
            candidates[label] = run
    measured = measure(candidates, rounds)
    base = measured["F.linear float32"][0]
    return [
        {"m": m, "n": n, "k": k, "what": name, "ms_median": round(median, 3), "ms_fastest": round(fastest, 3)}
        | {"times_float32": round(base / median, 2)}
        | ({"exact": notes[name]} if name in notes else {})
        for name, (median, fastest) in measured.items()
    ]


def provenance() -> dict:
    """Return machine, versions and commit for a row."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    name = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), platform.processor())
    isa = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if f" {flag} " in f"{flags} "]
    return {
        "cpu": name,
        "isa": isa,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "command": "quantdit bench cpu",
    }


def commit() -> str:
    """Return the short hash of the checkout's commit, empty outside of one."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def markdown(rows: list[dict]) -> str:
    """Return the rows as a table: milliseconds, and how many times faster than float32 in the same run."""
    first = rows[0]
    lines = [
        "# Quantized linears on a CPU",
        "",
        f"{first['cpu']}, {first['threads']} threads, {' '.join(first['isa'])}, torch {first['torch']}, {first['commit']}.",
        "Rotation, quantization of the tokens and, where it says so, decoding are included. Made by `make bench`.",
        "",
        "| m, n, k | what | ms, median | ms, fastest | times float32 | integer sums |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        exact = {True: "exact", False: "wrong: saturates", None: ""}[row.get("exact")]
        times = " | ".join(f"{row[key]:.2f}" for key in ("ms_median", "ms_fastest", "times_float32"))
        lines.append(f"| {row['m']}, {row['n']}, {row['k']} | {row['what']} | {times} | {exact} |")
    return "\n".join(lines) + "\n"


def run(output: Path, rounds: int = ROUNDS) -> None:
    """Measure every shape and write one JSON object a line, and a table beside it."""
    origin = provenance()
    rows = []
    for index, shape in enumerate(SHAPES):
        # torch._int_mm takes seconds a call on some CPUs; one mid-sized shape is enough to rank the routines.
        for row in rows_for(*shape, rounds=rounds, products=index == 1):
            rows.append(row | origin)
            shape_text = "{m:>5} {n:>5} {k:>5}".format(**row)
            print(f"{shape_text}  {row['ms_median']:>9.2f} ms  x{row['times_float32']:<6} {row['what']}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output.with_suffix(".md").write_text(markdown(rows))
