"""What the rows of `quantdit bench kernels` say: targets judged by name, crossover points, and the page. No GPU is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MANY = (64, 128, 256, 512, 1024, 2048, 4096, 8192)  # m at which a W4A8 linear is timed by each way
FEW = (8, 16, 32, 64, 128, 256)  # the same for 16-bit activations
FEED_FORWARD = tuple((m, n, k) for m in (32760, 8190) for n, k in ((8960, 1536), (1536, 8960)))  # Wan-1.3B's
MODULATION = ((2, 6912, 1152), (16, 6912, 1152))  # DiT-XL/2's


@dataclass(frozen=True)
class Cell:
    """One figure of a target: a field of a row; the least of the rows whose names begin as in `against` is divided by it."""

    task: str
    shape: tuple[int, int, int]
    what: str
    field: str = "times_bf16"
    against: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """What an H100 should reach at every cell."""

    name: str
    least: float
    cells: tuple[Cell, ...]


OTHERS = ("torch.matmul bfloat16", "gemlite", "orbitquant", "sdnq")  # what whole linears of other packages begin with
TARGETS = (
    Target(
        "W4A8 linear, rotation and quantization included, against bfloat16 at Wan-1.3B's feed-forward",
        1.5,
        tuple(Cell("many", shape, "linear w4a8, auto") for shape in FEED_FORWARD),
    ),
    Target(
        "the same linear against the fastest other one",
        1.0,
        tuple(
            Cell("baselines of many", shape, "linear w4a8, auto", "us_median", OTHERS)
            for shape in FEED_FORWARD
            if shape[0] == 32760
        ),
    ),
    Target(
        "tokens quantized in one pass, of the bandwidth of a copy",
        0.7,
        tuple(
            Cell("many", shape, what, "of_copy")
            for what in ("quantize_tokens", "rotate_quantize")
            for shape in FEED_FORWARD
            if shape[0] == 32760
        ),
    ),
    Target(
        "W4A16 product of up to 16 tokens against bfloat16",
        3.0,
        tuple(Cell("few", shape, "gemm_packed_a16") for shape in MODULATION),
    ),
)


def figure(rows: Sequence[dict], cell: Cell) -> float | None:
    """Return what was measured for a cell, None if it was not; of several `against`, against the fastest that ran."""
    there = [r for r in rows if (r.get("task"), (r.get("m"), r.get("n"), r.get("k"))) == (cell.task, cell.shape)]
    own = next((r[cell.field] for r in there if r["what"] == cell.what and r.get(cell.field) is not None), None)
    if own is None or not cell.against:
        return own
    others = [r[cell.field] for r in there if r["what"].startswith(cell.against) and cell.field in r]
    return round(min(others) / own, 3) if others else None


def verdict(target: Target, figures: Sequence[float | None]) -> str:
    """Return `met`, `missed` or `not measured`; one figure below is enough to miss."""
    if any(f is not None and f < target.least for f in figures):
        return "missed"
    return "not measured" if None in figures else "met"


def crossovers(rows: Sequence[dict]) -> dict[str, int | None]:
    """Return the points of crossover.json that the rows decide; a point that no shape was measured for everywhere is left out.

    A point is that of the smallest sum, over shapes and m, of the logarithm of the time of the way it chooses.
    """
    many, few = "ways of many", "ways of few"
    found: dict[str, int | None] = {}
    if grid := _grid(rows, many, MANY, "linear w4a8, packed", "linear w4a8, decode"):
        found["decode_from_m"] = _first_of_second(grid, MANY)
    if grid := _grid(rows, many, MANY, "linear w4a8, decode", "linear w4a8, torch"):
        found["torch_from_m"] = _first_of_second(grid, MANY)
    if grid := _grid(rows, few, FEW, "gemm_packed_a16", "decode8 + gemm_w8a16"):
        start = _first_of_second(grid, FEW)
        found["w4a16_up_to_m"] = FEW[-1] if start is None else max((m for m in FEW if m < start), default=0)
    return found


def _grid(rows: Sequence[dict], task: str, grid: Sequence[int], first: str, second: str) -> list[tuple[int, float, float]]:
    """Return (m, time of the first way, of the second) of shapes that have both at every m."""
    times = {
        (r["n"], r["k"], r["m"], r["what"]): r["us_median"]
        for r in rows
        if r.get("task") == task and r.get("us_median") is not None
    }
    found = []
    for n, k in sorted({key[:2] for key in times}):
        pairs = [(m, times.get((n, k, m, first)), times.get((n, k, m, second))) for m in grid]
        if all(a is not None and b is not None for _, a, b in pairs):
            found += pairs
    return found


def _first_of_second(times: Sequence[tuple[int, float, float]], grid: Sequence[int]) -> int | None:
    """Return the m from which on the second way is taken, None for never; of equals the largest."""

    def total(start: float) -> float:
        return sum(math.log(b if m >= start else a) for m, a, b in times)

    best = min(reversed((*grid, math.inf)), key=total)
    return None if best == math.inf else int(best)


def markdown(rows: Sequence[dict]) -> str:
    """Return the page of a run's rows: how it went, the targets, the crossover points, what failed, all times."""
    timed = [r for r in rows if "us_median" in r]
    failed = [r for r in rows if "error" in r]
    first = rows[0]
    end = next((r for r in rows if r["what"] == "end"), None)
    ceilings = ", ".join(f"{r['what'].removeprefix('ceiling ')} {r['value']}" for r in rows if r["what"].startswith("ceiling "))
    lines = [
        "# Quantized linears on a GPU",
        "",
        f"{first['device']}, torch {first['torch']}, triton {first['triton']}, {first['commit']}. Measured ceilings (a copy in",
        f"GB/s, products of 8192 x 8192 in TOP/s): {ceilings or 'none'}. Made by `{first['command']}`.",
        "",
        "`linear` includes rotation and quantization; after it a mode of kernels/triton_ops/dispatch.py. `host` is what Python",
        "takes to launch the call, which is not in the other times. Rows of one shape and task were timed in turn.",
        "",
        f"{_how_it_ended(end)}",
        "",
        "## Targets",
        "",
        "Set for an H100.",
        "",
        "| target | at least | m, n, k | what | measured | |",
        "|---|---|---|---|---|---|",
    ]
    for target in TARGETS:
        figures = [figure(rows, cell) for cell in target.cells]
        lines.append(f"| {target.name} | {target.least} | | | | **{verdict(target, figures)}** |")
        for cell, found in zip(target.cells, figures, strict=True):
            value = "not measured" if found is None else f"{found:.2f}"
            lines.append(f"| | | {', '.join(map(str, cell.shape))} | {cell.what} | {value} | |")
    points = crossovers(rows)
    lines += ["", "## Crossover points", ""]
    lines += [f"* `{name}`: {'never' if m is None else m}" for name, m in points.items()] or ["Not measured."]
    if failed:
        lines += ["", "## What did not run", "", "| task | m, n, k | what | |", "|---|---|---|---|"]
        lines += [f"| {r['task']} | {_shape(r)} | {r['what']} | {r['error'].replace('|', '/')} |" for r in failed]
    lines += ["", "## Times", ""]
    lines += ["| task | m, n, k | what | us, median | us, fastest | host | GB/s (of copy) or TOP/s (of bf16) | times bf16 |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for r in timed:
        speed, part = (r["gb_s"], r["of_copy"]) if "gb_s" in r else (r["top_s"], r.get("of_bfloat16"))
        of = "" if part is None else f" ({part:.0%})"
        times = f"{r['us_median']} | {r['us_fastest']} | {r['us_host']}"
        lines.append(f"| {r['task']} | {_shape(r)} | {r['what']} | {times} | {speed}{of} | {r.get('times_bf16', '')} |")
    return "\n".join(lines) + "\n"


def _how_it_ended(end: dict | None) -> str:
    if end is None:
        return "The run has not ended."
    left = f"; not reached: {', '.join(end['left_out'])}" if end["left_out"] else ""
    return f"{end['ended']} after {end['seconds']:.0f} s{left}."


def _shape(row: dict) -> str:
    return f"{row['m']}, {row['n']}, {row['k']}"
