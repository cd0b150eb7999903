"""What `quantdit bench kernels` times, and the process that does it: tasks at one shape each, candidates timed in turn.

A candidate must first pass its gate on its first and last tokens: products equal the definition in kernels/ops.py to the bit,
codes may differ where a rotation lands on a tie, a whole linear is within 1 %. What fails is a row with its error, and the rest
goes on. Times are the GPU's: a pause before each call lets Python run ahead, so launches do not count; they are `us_host`.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from quantdit.benchmarks.baselines import BASELINES
from quantdit.benchmarks.cpu_linear import KINDS
from quantdit.formats import FORMATS, QSpec
from quantdit.kernels import ops
from quantdit.kernels.ops import Epilogue
from quantdit.kernels.schema import flat
from quantdit.kernels.triton_ops import dispatch
from quantdit.layers import quant_attention
from quantdit.layers.quant_linear import QuantLinear
from quantdit.recipes.attention import AttentionSpec
from quantdit.tensors import hadamard
from quantdit.tensors.layer_spec import ActivationSpec, LayerSpec
from quantdit.tensors.qtensor import spec_fields

ROUNDS = 15
CHECKED = 64  # tokens at either end that the gate looks at
FLUSH = 2**28  # bytes written before each call: more than any L2 cache
COPIED = 2**29  # bytes of the copy that is the ceiling of what moves
LARGE = 8192  # m, n, k of the products that are the ceiling of what multiplies
PAUSE = 1_000_000  # GPU cycles, half a millisecond: longer than Python takes to launch a linear
BF16 = "torch.matmul bfloat16"
BF16_ATTENTION = "torch attention bfloat16"
Run = Callable[[], Any]
Check = Callable[[Any], None] | None


@dataclass(frozen=True)
class Task:
    """What is timed together: `what` is a key of MAKERS."""

    what: str
    m: int
    n: int
    k: int


@dataclass(frozen=True)
class Candidate:
    """Something to time.

    Attributes:
        make: returns the call and its gate, which raises ValueError if the output is wrong (None: torch's own products).
        moved: bytes that must be read and written at least; 0 for a product.
    """

    make: Callable[[], tuple[Run, Check]]
    moved: int = 0


def gpu() -> torch.device:
    """Return where everything runs."""
    return torch.device("cuda", 0)


def ends(x: Tensor) -> Tensor:
    """Return the first and last CHECKED rows."""
    return x if len(x) <= 2 * CHECKED else torch.cat([x[:CHECKED], x[-CHECKED:]])


def equals(expected: Tensor) -> Callable[[Any], None]:
    """Return a check that the rows at both ends are `expected` to the bit."""

    def check(y: Tensor) -> None:
        wrong = int((ends(y) != expected).sum())
        if wrong:
            raise ValueError(f"{wrong} of {expected.numel()} outputs differ from the definition")

    return check


def close(expected: Tensor, limit: float) -> Callable[[Any], None]:
    """Return a check that the rows at both ends are `expected` but for a relative error."""

    def check(y: Tensor) -> None:
        error = float((ends(y).double() - expected.double()).norm() / expected.double().norm())
        if not error <= limit:
            raise ValueError(f"outputs are off by {error:.2e} of the definition, more than {limit:.0e}")

    return check


def same_codes(codes: Tensor, scale: Tensor, ties: float) -> Callable[[Any], None]:
    """Return a check that scales are close and codes equal, but for a part `ties` that is off by one step."""

    def check(y: tuple[Tensor, ...]) -> None:
        difference = (ends(y[0]).int() - codes.int()).abs()
        part = float((difference > 0).float().mean())
        if part > ties or int(difference.max()) > 1 or not torch.allclose(ends(y[1]), scale, rtol=2**-8 if ties else 0, atol=0):
            raise ValueError(f"{part:.2%} of the codes differ from the definition")

    return check


def random_linear(n: int, k: int, kind: str, device: torch.device) -> QuantLinear:
    """Return a rotated QuantLinear of random codes, `kind` a key of bench.KINDS: speed does not depend on their values."""
    format, activation_bits = KINDS[kind]
    f, block = FORMATS[format], hadamard.block_size(k)
    spec = QSpec(format, n, k, 64 if format == "int4" else k)
    g = torch.Generator(device).manual_seed(0)
    random = partial(torch.randint, generator=g, device=device)
    codes = random(f.code_count, (n, k // f.dim)).to(f.code_dtype)
    tensors = {"data": f.pack(f, codes), "scale": (1 + torch.rand(n, generator=g, device=device)) / (64 * k**0.5)}
    for name, field in spec_fields(spec).items():
        if name == "multiplier":  # code * multiplier + offset: -128..112 at most
            tensors[name] = random(8, 17, field.shape).to(field.dtype)
            tensors["offset"] = -(8 * tensors[name].int()).to(torch.int8)
        elif name == "codebook":
            tensors[name] = random(-127, 128, field.shape).to(field.dtype).sort(dim=-1).values
    tensors["premultiplier"] = hadamard.random_sign(k, 0).to(device)
    layer = QuantLinear.from_tensors(LayerSpec(spec, ActivationSpec(activation_bits), "hadamard", block), tensors, None)
    layer.cache_decoded = False
    return layer


class Setting:
    """The tensors of one shape, each made when it is first asked for; definitions run in torch, not in the kernels."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self.m, self.n, self.k, self.device = task.m, task.n, task.k, device
        self._layers: dict[str, QuantLinear] = {}

    def _random(self, rows: int, seed: int) -> Tensor:
        g = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(rows, self.k, generator=g, device=self.device).to(torch.bfloat16)

    @cached_property
    def x(self) -> Tensor:
        """Return tokens `[m, k]` bfloat16."""
        return self._random(self.m, 0)

    @cached_property
    def weight(self) -> Tensor:
        """Return the weight of baselines `[n, k]` bfloat16."""
        return self._random(self.n, 1) / self.k**0.5

    @cached_property
    def codes(self) -> tuple[Tensor, Tensor]:
        """Return int8 codes `[m, k]` of x and their scales `[m]`."""
        return ops.quantize_tokens_reference(self.x, 8)

    def layer(self, kind: str) -> QuantLinear:
        """Return the quantized linear of a kind, a key of bench.KINDS."""
        if kind not in self._layers:
            self._layers[kind] = random_linear(self.n, self.k, kind, self.device)
        return self._layers[kind]

    def expected(self, kind: str) -> Tensor:
        """Return what the layer's definition makes of the first and last tokens."""
        with dispatch.using("reference"):
            return self.layer(kind)(ends(self.x))

    def decoded(self, kind: str) -> Tensor:
        """Return `I` `[n, k]` of a layer by its definition."""
        return self.layer(kind).qtensor.decode8()


def token_candidates(s: Setting) -> dict[str, Candidate]:
    """Return the kernels over tokens: bytes in and bytes out are what they must move."""
    op, block = torch.ops.quantdit, hadamard.block_size(s.k)
    moved = s.m * (3 * s.k + 4)

    def plain() -> tuple[Run, Check]:
        return lambda: op.quantize_tokens(s.x, 8), same_codes(*ops.quantize_tokens_reference(ends(s.x), 8), ties=0.0)

    def rotated() -> tuple[Run, Check]:
        arguments = (hadamard.random_sign(s.k, 0).to(s.device), block, "int", 8)
        expected = ops.rotate_quantize_reference(ends(s.x), *arguments)[:2]
        return lambda: op.rotate_quantize(s.x, *arguments), same_codes(*expected, ties=0.02)

    makers = {"quantize_tokens": plain, "rotate_quantize": rotated}
    return {name: Candidate(make, moved) for name, make in makers.items()}


def torch_candidates(s: Setting) -> dict[str, Candidate]:
    """Return torch's own products; those of 8 bits have no scales, no bias and no quantization of the tokens."""

    def bfloat16() -> tuple[Run, Check]:
        return lambda: s.x @ s.weight.T, None

    def int8() -> tuple[Run, Check]:
        codes, decoded = s.codes[0], s.decoded("w8a8")
        return lambda: torch._int_mm(codes, decoded.T), None  # pyright: ignore[reportPrivateImportUsage] - the only way to it

    def e4m3() -> tuple[Run, Check]:
        a, b, one = s.x.to(torch.float8_e4m3fn), s.weight.to(torch.float8_e4m3fn), torch.ones((), device=s.device)
        return lambda: torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16), None  # pyright: ignore[reportPrivateImportUsage] - the only way to it

    found = {BF16: bfloat16}
    if s.m > 16:
        found |= {"torch._int_mm, int32 out": int8, "torch._scaled_mm e4m3": e4m3}
    return {name: Candidate(make) for name, make in found.items()}


def product_candidates(s: Setting) -> dict[str, Candidate]:
    """Return W4A8 as products alone; each must be exact in float32 too."""
    op = torch.ops.quantdit

    def of(run: Callable[[Epilogue], Tensor]) -> tuple[Run, Check]:
        def check(dtype: torch.dtype) -> Callable[[Any], None]:
            codes, token_scale = map(ends, s.codes)
            weight = s.layer("w4a8").qtensor
            return equals(ops.gemm_packed_a8_reference(codes, weight, Epilogue(dtype, token_scale)))

        check(torch.float32)(run(Epilogue(torch.float32, s.codes[1])))
        return lambda: run(Epilogue(torch.bfloat16, s.codes[1])), check(torch.bfloat16)

    def w8a8() -> tuple[Run, Check]:
        decoded = s.decoded("w4a8")
        return of(lambda after: op.gemm_w8a8(s.codes[0], decoded, s.layer("w4a8").scale, *flat(after)))

    def packed() -> tuple[Run, Check]:
        weight = s.layer("w4a8").qtensor
        return of(_in("packed", lambda after: op.gemm_packed_a8(s.codes[0], *flat(weight), *flat(after))))

    def decoded() -> tuple[Run, Check]:
        layer = s.layer("w4a8")
        return of(lambda after: op.gemm_w8a8(s.codes[0], layer.decoded(), layer.scale, *flat(after)))

    makers = {"gemm_w8a8": w8a8, "gemm_packed_a8": packed, "decode8 + gemm_w8a8": decoded}
    return {name: Candidate(make) for name, make in makers.items()}


def few_candidates(s: Setting) -> dict[str, Candidate]:
    """Return products of 16-bit activations with weights decoded in registers, and the way that decodes all of it first."""
    op = torch.ops.quantdit

    def of(kind: str, run: Run) -> tuple[Run, Check]:
        expected = ops.gemm_packed_a16_reference(ends(s.x), s.layer(kind).qtensor, Epilogue(s.x.dtype))
        return run, close(expected, 1e-2)

    def packed(kind: str) -> tuple[Run, Check]:
        weight = s.layer(kind).qtensor
        return of(kind, _in("packed", lambda: op.gemm_packed_a16(s.x, *flat(weight), *flat(Epilogue(s.x.dtype)))))

    def dense() -> tuple[Run, Check]:
        layer = s.layer("w4a16")
        return of("w4a16", lambda: op.gemm_w8a16(s.x, layer.decoded(), layer.scale, None))

    return {
        "gemm_packed_a16": Candidate(partial(packed, "w4a16")),
        "gemm_packed_a16 codebook": Candidate(partial(packed, "w2a16 codebook")),
        "decode8 + gemm_w8a16": Candidate(dense),
    }


def _in(mode: str, run: Callable) -> Callable:
    """Return the same call in a mode of dispatch."""

    def call(*arguments: object) -> object:
        with dispatch.using(mode):
            return run(*arguments)

    return call


def linear_candidates(s: Setting, kinds: Sequence[str], modes: Sequence[str]) -> dict[str, Candidate]:
    """Return whole layers, rotation and quantization included, by the ways of some modes of dispatch."""

    def make(kind: str, mode: str) -> tuple[Run, Check]:
        layer = s.layer(kind)
        return _in(mode, lambda: layer(s.x)), close(s.expected(kind), 1e-2)

    return {f"linear {kind}, {mode}": Candidate(partial(make, kind, mode)) for kind in kinds for mode in modes}


def baseline_candidates(s: Setting, few: bool) -> dict[str, Candidate]:
    """Return the linears of other packages, which must be near the dense product."""

    def make(name: str) -> tuple[Run, Check]:
        baseline = BASELINES[name]
        linear = baseline.linear(s.weight)
        return lambda: linear(s.x), close(ends(s.x).double() @ s.weight.double().T, baseline.error)

    return {name: Candidate(partial(make, name)) for name, baseline in BASELINES.items() if baseline.few == few}


def attention_candidates(s: Setting) -> dict[str, Candidate]:
    """Return torch's attention over m tokens of n / 2m heads (n counts scores and values), ours in 8 bits and SageAttention's."""
    heads = max(1, s.n // (2 * s.m))
    g = torch.Generator(s.device).manual_seed(0)
    q, k, v = (torch.randn(1, heads, s.m, s.k, generator=g, device=s.device).to(torch.bfloat16) for _ in range(3))

    def by_token(y: Tensor) -> Tensor:
        return y[0].transpose(0, 1).flatten(1)

    def plain() -> tuple[Run, Check]:
        return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), None

    def ours(pv: str) -> tuple[Run, Check]:
        spec = AttentionSpec(pv=pv)
        with dispatch.using("reference"):
            expected = torch.cat([by_token(quant_attention.attend(q[:, :, rows], k, v, spec)) for rows in ends_of(s.m)])
        return lambda: by_token(quant_attention.attend(q, k, v, spec)), close(expected, 2e-2)

    def sage() -> tuple[Run, Check]:
        from sageattention import sageattn  # pyright: ignore[reportMissingImports] - of an optional package

        expected = ends(by_token(torch.nn.functional.scaled_dot_product_attention(q, k, v)))
        return lambda: by_token(sageattn(q, k, v, tensor_layout="HND")), close(expected, 5e-2)

    makers = {BF16_ATTENTION: plain} | {f"attention8, {pv}": partial(ours, pv) for pv in ("uint8", "fp8", "none")}
    return {name: Candidate(make) for name, make in (makers | {"sageattention": sage}).items()}


def ends_of(m: int) -> tuple[slice, ...]:
    """Return the rows that `ends` of m rows takes."""
    return (slice(0, m),) if m <= 2 * CHECKED else (slice(0, CHECKED), slice(m - CHECKED, m))


def _bfloat16(s: Setting) -> dict[str, Candidate]:
    return {BF16: torch_candidates(s)[BF16]}


MAKERS: dict[str, Callable[[Setting], dict[str, Candidate]]] = {
    "many": lambda s: (
        torch_candidates(s)
        | linear_candidates(s, ["w4a8"], ["auto", "packed", "decode", "torch"])
        | linear_candidates(s, ["table4 a8", "w8a8"], ["auto"])
        | token_candidates(s)
        | product_candidates(s)
    ),
    "few": lambda s: _bfloat16(s) | few_candidates(s) | linear_candidates(s, ["w4a16", "w2a16 codebook", "w4a8"], ["auto"]),
    "ways of many": lambda s: _bfloat16(s) | linear_candidates(s, ["w4a8"], ["packed", "decode", "torch"]),
    "ways of few": lambda s: (
        _bfloat16(s) | {name: c for name, c in few_candidates(s).items() if name in ("gemm_packed_a16", "decode8 + gemm_w8a16")}
    ),
    "attention": attention_candidates,
    "baselines of many": lambda s: (
        _bfloat16(s) | linear_candidates(s, ["w4a8", "w8a8"], ["auto"]) | baseline_candidates(s, few=False)
    ),
    "baselines of few": lambda s: _bfloat16(s) | linear_candidates(s, ["w4a16"], ["auto"]) | baseline_candidates(s, few=True),
}


def measured(runs: dict[str, Run], flush: Tensor) -> dict[str, dict[str, float]]:
    """Return microseconds of each run over interleaved rounds: median and fastest on the GPU, median of launching it."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        events = []
        for name, run in runs.items():
            flush.zero_()
            torch.cuda._sleep(PAUSE)
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            began = time.perf_counter()
            run()
            host = time.perf_counter() - began
            stop.record()
            events.append((name, start, stop, host))
        torch.cuda.synchronize()
        for name, start, stop, host in events:
            times[name].append((1e3 * start.elapsed_time(stop), 1e6 * host))
    return {
        name: {
            "us_median": round(statistics.median(gpu for gpu, _ in pairs), 2),
            "us_fastest": round(min(gpu for gpu, _ in pairs), 2),
            "us_host": round(statistics.median(host for _, host in pairs), 1),
        }
        for name, pairs in times.items()
    }


def ceilings(flush: Tensor) -> dict[str, float | None]:
    """Return GB/s of a copy and TOP/s of large products, as torch does them here; None for what it does not have."""
    source, device = torch.empty(COPIED, dtype=torch.uint8, device=flush.device), flush.device
    target = torch.empty_like(source)
    a, b = (torch.randn(LARGE, LARGE, device=device).bfloat16() for _ in range(2))
    i, j = (torch.randint(-127, 128, (LARGE, LARGE), device=device, dtype=torch.int8) for _ in range(2))
    runs: dict[str, Run] = {
        "copy": lambda: target.copy_(source),
        "bfloat16": lambda: a @ b.T,
        "int8": lambda: torch._int_mm(i, j.T),  # pyright: ignore[reportPrivateImportUsage] - the only way to it
    }
    found: dict[str, float | None] = {}
    for name, run in runs.items():
        try:
            run()
            fastest = measured({name: run}, flush)[name]["us_fastest"]
            found[name] = round(2 * COPIED / fastest / 1e3 if name == "copy" else 2 * LARGE**3 / fastest / 1e6, 1)
        except (RuntimeError, NotImplementedError):
            found[name] = None
    return found


def row_of(task: Task, name: str, candidate: Candidate, times: dict[str, float], base: float | None, top: dict) -> dict:
    """Return the row of a candidate: its speed against the ceilings, and how many times faster than bfloat16."""
    row = {"task": task.what, "m": task.m, "n": task.n, "k": task.k, "what": name} | times
    median = times["us_median"]
    if candidate.moved:
        speed = candidate.moved / median / 1e3
        return row | {"gb_s": round(speed, 1), "of_copy": round(speed / top["copy"], 3) if top.get("copy") else None}
    speed = 2 * task.m * task.n * task.k / median / 1e6
    row |= {"top_s": round(speed, 1)} | {
        f"of_{name}": round(speed / top[name], 3) for name in ("bfloat16", "int8") if top.get(name)
    }
    return row | ({"times_bf16": round(base / median, 3)} if base else {})


@torch.no_grad()
def work(connection: Connection, plan: Sequence[Task], broken: set[tuple[Task, str]], top: dict, tune: bool) -> None:
    """Do the tasks in their order and tell of each candidate before it runs, of each row, and of each task that is done.

    Messages are tuples: `("begin", task, name)`, `("ceilings", dict)`, `("row", row)`, `("done", task)`. After an error that
    leaves the GPU unusable the process ends; the one that comes after it is told what is broken.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this process ends it
    if tune:
        os.environ["QUANTDIT_TUNE"] = "1"
    device = gpu()
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=device)
    if not top:
        top = ceilings(flush)
        connection.send(("ceilings", top))
    for task in plan:
        setting = Setting(task, device)
        candidates = {name: c for name, c in MAKERS[task.what](setting).items() if (task, name) not in broken}
        runs: dict[str, Run] = {}
        for name, candidate in candidates.items():
            connection.send(("begin", task, name))
            try:
                runs[name] = passed(candidate)
            except Exception as error:  # whatever a compiler, a driver or another package raises is what its row says
                connection.send(("row", error_row(task, name, error)))
                torch.cuda.synchronize()  # raises, and ends the process, where the GPU took harm
        connection.send(("begin", task, "timing"))
        times = measured(runs, flush)
        base = times.get(BF16, times.get(BF16_ATTENTION, {})).get("us_median")
        for name, found in times.items():
            connection.send(("row", row_of(task, name, candidates[name], found, base, top)))
        connection.send(("done", task))


def passed(candidate: Candidate) -> Run:
    """Return the call of a candidate whose output is right; it is compiled, and tuned, by then."""
    run, check = candidate.make()
    y = run()
    torch.cuda.synchronize()
    if check:
        check(y)
    return run


def error_row(task: Task, name: str, error: Exception | str) -> dict:
    """Return the row of what failed."""
    said = str(error).strip().splitlines()
    kind = f"{type(error).__name__}: " if isinstance(error, Exception) else ""
    return {
        "task": task.what,
        "m": task.m,
        "n": task.n,
        "k": task.k,
        "what": name,
        "error": f"{kind}{said[0] if said else ''}"[:300],
    }
