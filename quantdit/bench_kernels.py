"""Measure the GPU kernels against torch's products in the same run: `quantdit bench kernels --output FILE.jsonl`.

Every candidate first passes a correctness gate on its first and last tokens: products must equal the definition in kernels/ops.py
to the bit in float32, codes may differ where a rotation lands on a tie. Candidates of a shape are timed in turn, round after
round, with an L2 cache that something else has filled before each call; the median and the fastest are kept. Ceilings
(a copy, large products) are measured first. The run ends after LIMIT seconds with the shapes that it has.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantdit import bench
from quantdit.hadamard import random_sign
from quantdit.kernels import ops
from quantdit.kernels.triton_ops import dispatch
from quantdit.linear import QuantLinear

LIMIT = 420.0  # seconds; with what is under way at that moment a run stays within eight minutes
ROUNDS = 15
CHECKED = 64  # tokens at either end that the gate looks at
FEW = 64  # tokens up to which 16-bit activations are timed

# (m, n, k)
SHAPES = (
    *((m, n, k) for m in (32760, 8190) for n, k in ((8960, 1536), (1536, 8960), (1536, 1536))),  # Wan-1.3B
    *((m, n, k) for m in (8192, 1024, 256) for n, k in ((4608, 1152), (1152, 4608), (1152, 1152))),  # DiT-XL/2
    *((m, 6912, 1152) for m in (2, 16)),  # its modulation
    *((4608, n, 3072) for n in (12288, 3072)),  # FLUX
)


@dataclass(frozen=True)
class Candidate:
    """Something to time: the call, what it must agree with, and what it moves and multiplies.

    Attributes:
        run: returns the output, or codes and scales.
        check: raises ValueError if the output is wrong; None for baselines.
        moved: bytes that must be read and written at least; 0 for a product.
        products: multiplications; 0 for what only moves.
    """

    run: Callable[[], object]
    check: Callable[[object], None] | None = None
    moved: int = 0
    products: int = 0


def ends(x: Tensor) -> Tensor:
    """Return the first and last CHECKED rows."""
    return x if len(x) <= 2 * CHECKED else torch.cat([x[:CHECKED], x[-CHECKED:]])


def equals(expected: Tensor) -> Callable[[object], None]:
    """Return a check that the rows at both ends are `expected` to the bit."""

    def check(y: object) -> None:
        wrong = int((ends(y) != expected).sum())
        if wrong:
            raise ValueError(f"{wrong} of {expected.numel()} outputs differ from the definition before anything is timed")

    return check


def close(expected: Tensor, limit: float) -> Callable[[object], None]:
    """Return a check that the rows at both ends are `expected` but for a relative error."""

    def check(y: object) -> None:
        error = float((ends(y).double() - expected.double()).norm() / expected.double().norm())
        if not error <= limit:
            raise ValueError(f"outputs are off by {error:.2e} of the definition, more than {limit:.0e}, before anything is timed")

    return check


def same_codes(codes: Tensor, scale: Tensor, ties: float) -> Callable[[object], None]:
    """Return a check that scales are close and codes equal, but for a part `ties` that is off by one step."""

    def check(y: object) -> None:
        difference = (ends(y[0]).int() - codes.int()).abs()
        part = float((difference > 0).float().mean())
        if part > ties or int(difference.max()) > 1 or not torch.allclose(ends(y[1]), scale, rtol=2**-8 if ties else 0, atol=0):
            raise ValueError(f"{part:.2%} of the codes differ from the definition before anything is timed")

    return check


def token_candidates(x: Tensor) -> dict[str, Candidate]:
    """Return the kernels over tokens x `[m, k]` bfloat16: bytes in and bytes out are what they must move."""
    m, k = x.shape
    signs = random_sign(k, 0).to(x.device)
    block = (k & -k) if (k & -k) < 128 else 128
    moved = m * (3 * k + 4)
    images = 1
    shift, modulation = (torch.randn(images, k, device=x.device, dtype=x.dtype) for _ in range(2))
    modulated = (shift, modulation, 1e-6, signs, block, "int", 8)
    some = ends(x)
    op = torch.ops.quantdit
    return {
        "quantize_tokens": Candidate(
            lambda: op.quantize_tokens(x, 8), same_codes(*ops.quantize_tokens_reference(some, 8), ties=0.0), moved
        ),
        "rotate_quantize": Candidate(
            lambda: op.rotate_quantize(x, signs, block, "int", 8),
            same_codes(*ops.rotate_quantize_reference(some, signs, block, "int", 8)[:2], ties=0.02),
            moved,
        ),
        "modulate_quantize": Candidate(
            lambda: op.modulate_quantize(x, *modulated),
            same_codes(*ops.modulate_quantize_reference(some, *modulated), ties=0.02),
            moved,
        ),
    }


def product_candidates(x: Tensor, layer: QuantLinear) -> dict[str, Candidate]:
    """Return W4A8 as products alone, in float32 for the gate's sake, and torch's own int8 and fp8 products."""
    codes, token_scale = torch.ops.quantdit.quantize_tokens(x, 8)
    integers = layer.decoded()
    stored = (layer.data, layer.multiplier, layer.offset, None, layer.spec.format, layer.spec.group_size)
    expected = ops.gemm_w8a8_reference(ends(codes), ends(token_scale), integers, layer.scale, None, torch.bfloat16)
    exact = ops.gemm_w8a8_reference(ends(codes), ends(token_scale), integers, layer.scale, None, torch.float32)
    products = x.numel() * layer.out_features
    op = torch.ops.quantdit
    arguments = (codes, token_scale, integers, layer.scale, None)
    packed = (codes, token_scale, *stored, layer.scale, None)
    equals(exact)(op.gemm_w8a8(*arguments, torch.float32))
    equals(exact)(op.gemm_w4a8(*packed, torch.float32))
    found = {
        "gemm_w8a8": Candidate(lambda: op.gemm_w8a8(*arguments, torch.bfloat16), equals(expected), 0, products),
        "gemm_w4a8": Candidate(lambda: op.gemm_w4a8(*packed, torch.bfloat16), equals(expected), 0, products),
        "decode8 + gemm_w8a8": Candidate(
            lambda: op.gemm_w8a8(codes, token_scale, layer.decoded(), layer.scale, None, torch.bfloat16),
            equals(expected),
            0,
            products,
        ),
    }
    weight = torch.randn(layer.out_features, layer.in_features, device=x.device).to(torch.bfloat16)
    found["torch.matmul bfloat16"] = Candidate(lambda: x @ weight.T, None, 0, products)
    if len(x) > 16:
        found["torch._int_mm, int32 out"] = Candidate(lambda: torch._int_mm(codes, integers.T), None, 0, products)
        a, b = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
        one = torch.ones((), device=x.device)
        found["torch._scaled_mm e4m3"] = Candidate(
            lambda: torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16), None, 0, products
        )
    return found


def linear_candidates(x: Tensor, layers: dict[str, QuantLinear]) -> dict[str, Candidate]:
    """Return whole layers, rotation and quantization included, by the way that dispatch takes and by the other."""
    found = {}
    for name, layer in layers.items():
        with dispatch.using("reference"):
            expected = layer(ends(x))
        products = x.numel() * layer.out_features
        for mode in ("auto", "packed", "decode") if layer.layer_spec.activation.bits < 16 else ("auto",):

            def run(layer: QuantLinear = layer, mode: str = mode) -> Tensor:
                with dispatch.using(mode):
                    return layer(x)

            found[f"linear {name}, {mode}"] = Candidate(run, close(expected, 1e-2), 0, products)
    return found


def measured(candidates: dict[str, Candidate], rounds: int, flush: Tensor) -> dict[str, tuple[float, float]]:
    """Return (median, fastest) microseconds of each candidate over interleaved rounds."""
    events: dict[str, list] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            flush.zero_()
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            candidate.run()
            stop.record()
            events[name].append((start, stop))
    torch.cuda.synchronize()
    times = {name: [1e3 * start.elapsed_time(stop) for start, stop in pairs] for name, pairs in events.items()}
    return {name: (statistics.median(t), min(t)) for name, t in times.items()}


def ceilings(device: torch.device, flush: Tensor) -> dict[str, float]:
    """Return GB/s of a copy and TOP/s of large products, as torch does them here."""
    source, size = torch.empty(2**29, dtype=torch.uint8, device=device), 8192
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    i, j = (torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8) for _ in range(2))
    candidates = {
        "copy": Candidate(lambda: target.copy_(source)),
        "bfloat16": Candidate(lambda: a @ b.T),
        "int8": Candidate(lambda: torch._int_mm(i, j.T)),
    }
    for candidate in candidates.values():
        candidate.run()
    times = measured(candidates, ROUNDS, flush)
    found = {name: 2 * size**3 / fastest / 1e6 for name, (_, fastest) in times.items()}
    return found | {"copy": 2 * source.numel() / times["copy"][1] / 1e3}


def rows_for(m: int, n: int, k: int, ceiling: dict[str, float], flush: Tensor) -> list[dict]:
    """Check and measure everything at one shape; `times_bf16` is the bfloat16 product's median over the candidate's."""
    generator = torch.Generator().manual_seed(0)
    device = flush.device
    x = torch.randn(m, k, generator=generator).to(device, torch.bfloat16)
    weight = torch.randn(n, k, generator=generator) / k**0.5
    names = ("w4a8", "table4 a8", "w8a8", *(("w4a16", "w2a16 codebook") if m <= FEW else ()))
    layers = {name: bench.quant_linear(weight, name, cached=False).to(device) for name in names}
    candidates = token_candidates(x) | product_candidates(x, layers["w4a8"]) | linear_candidates(x, layers)
    for name, candidate in candidates.items():
        try:
            y = candidate.run()  # compiles, or tunes
        except (RuntimeError, NotImplementedError) as error:
            if candidate.check is None:  # a product that this torch or this GPU does not have
                print(f"  {name}: {str(error).splitlines()[0]}")
                candidates = {other: c for other, c in candidates.items() if other != name}
                continue
            raise
        if candidate.check:
            try:
                candidate.check(y)
            except ValueError as error:
                raise ValueError(f"{name} at m, n, k = {m}, {n}, {k}: {error}") from error
    times = measured(candidates, ROUNDS, flush)
    base = times["torch.matmul bfloat16"][0]
    rows = []
    for name, (median, fastest) in times.items():
        candidate = candidates[name]
        row = {"m": m, "n": n, "k": k, "what": name, "us_median": round(median, 2), "us_fastest": round(fastest, 2)}
        if candidate.moved:
            speed = candidate.moved / median / 1e3
            row |= {"gb_s": round(speed, 1), "of_copy": round(speed / ceiling["copy"], 3)}
        else:
            speed = 2 * candidate.products / median / 1e6
            row |= {"top_s": round(speed, 1), "of_bf16": round(speed / ceiling["bfloat16"], 3)}
            row |= {"of_int8": round(speed / ceiling["int8"], 3), "times_bf16": round(base / median, 3)}
        rows.append(row)
    return rows


def run(output: Path, tune: bool) -> None:
    """Measure all shapes and write one JSON object a line, and a table beside it.

    Args:
        output: `.jsonl` to write; `.md` beside it.
        tune: time every shipped configuration of a kernel first, at most ten seconds a shape.

    Raises:
        ValueError: no GPU, no triton, or a kernel that is wrong.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "bench kernels times CUDA kernels and torch sees no GPU here; `quantdit bench cpu` measures this machine"
        )
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    if not dispatch.kernels_run(flush):
        raise ValueError("bench kernels needs triton and a GPU of compute capability 8.0; pip install 'quantdit[triton]'")
    import triton

    if tune:
        os.environ["QUANTDIT_TUNE"] = "1"
    end = time.monotonic() + LIMIT
    origin = {
        "device": torch.cuda.get_device_name(),
        "capability": dispatch.capability_of(flush.device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "tuned": tune,
        "commit": bench.commit(),
        "command": "quantdit bench kernels" + (" --tune" if tune else ""),
    }
    ceiling = ceilings(flush.device, flush)
    rows = [{"what": f"ceiling {name}", "value": round(value, 1)} | origin for name, value in ceiling.items()]
    left_out = []
    for shape in SHAPES:
        if time.monotonic() > end:
            left_out.append(shape)
            continue
        for row in rows_for(*shape, ceiling, flush):
            rows.append(row | origin)
            print("{m:>6} {n:>6} {k:>6}".format(**row), f"{row['us_median']:>10.1f} us  {row['what']}", flush=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("".join(json.dumps(row) + "\n" for row in rows))
        output.with_suffix(".md").write_text(markdown(rows))
    if left_out:
        print(f"stopped after {LIMIT:.0f} s without these shapes: {left_out}")


def markdown(rows: list[dict]) -> str:
    """Return the rows as a table."""
    first = rows[0]
    tops = ", ".join(f"{r['what'].removeprefix('ceiling ')} {r['value']}" for r in rows if "value" in r)
    lines = [
        "# Quantized linears on a GPU",
        "",
        f"{first['device']}, torch {first['torch']}, triton {first['triton']}, {first['commit']}. Measured ceilings (a copy in",
        f"GB/s, products of 8192 x 8192 in TOP/s): {tops}. `linear` includes rotation and quantization; after it a mode",
        "of kernels/triton_ops/dispatch.py. Made by `quantdit bench kernels`.",
        "",
        "| m, n, k | what | us, median | us, fastest | GB/s (of copy) or TOP/s (of bf16) | times bf16 |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "value" in row:
            continue
        speed = f"{row['gb_s']} ({row['of_copy']:.0%})" if "gb_s" in row else f"{row['top_s']} ({row['of_bf16']:.0%})"
        times = f"{row['us_median']} | {row['us_fastest']}"
        lines.append(f"| {row['m']}, {row['n']}, {row['k']} | {row['what']} | {times} | {speed} | {row.get('times_bf16', '')} |")
    return "\n".join(lines) + "\n"
