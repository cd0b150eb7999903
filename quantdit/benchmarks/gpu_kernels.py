"""Time the GPU kernels in less than eight minutes, whatever happens: `quantdit bench kernels --output FILE.jsonl`.

Another process does the tasks of PLAN (bench_cases.py), the most important first. This one keeps what it tells: a row is in the
file as soon as it is made. A candidate that fails is a row with its error; one that takes the process down, or does not answer
for PATIENCE seconds, is too, and a new process goes on with the rest. After LIMIT seconds, or when it is interrupted, the run
ends with what there is. The page beside the file judges the targets.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from quantdit.benchmarks import cpu_linear, kernel_cases
from quantdit.benchmarks.kernel_cases import Task, error_row
from quantdit.benchmarks.kernel_report import FEED_FORWARD, FEW, MANY, MODULATION, crossovers, markdown
from quantdit.kernels.triton_ops import dispatch
from quantdit.system import files
from quantdit.system.optional_import import install

LIMIT = 450.0  # seconds for everything but the page
PATIENCE = 60.0  # seconds for one candidate, compilation included, or for all times of a task
START = 90.0  # seconds until a new process says something: it imports torch and measures the ceilings

WAN, DIT, FLUX = (
    ((8960, 1536), (1536, 8960), (1536, 1536)),
    ((4608, 1152), (1152, 4608), (1152, 1152)),
    ((12288, 3072), (3072, 3072)),
)
_FIRST = FEED_FORWARD[:2]  # all frames of a clip
PLAN = (
    *(Task("many", *shape) for shape in _FIRST),
    *(Task("few", *shape) for shape in MODULATION),
    *(Task("many", *shape) for shape in FEED_FORWARD[2:]),
    *(Task("attention", m, 2 * 12 * m, 128) for m in (32760, 8190)),  # of Wan 1.3B at 480p, 81 and 17 frames
    *(Task("ways of many", m, n, k) for n, k in (WAN[0], DIT[0]) for m in MANY),
    *(Task("ways of few", m, n, k) for n, k in ((6912, 1152), (1536, 1536)) for m in FEW),
    *(Task("baselines of many", *shape) for shape in _FIRST),
    Task("baselines of few", *MODULATION[-1]),
    *(Task("many", m, *WAN[2]) for m in (32760, 8190)),
    *(Task("many", m, n, k) for m in (8192, 1024, 256) for n, k in DIT),
    *(Task("many", 4608, n, k) for n, k in FLUX),
)


@dataclass
class Progress:
    """What is known of a run: its rows, and what a new process need not or must not do."""

    rows: list[dict] = field(default_factory=list)
    top: dict[str, float | None] = field(default_factory=dict)
    done: set[Task] = field(default_factory=set)
    broken: set[tuple[Task, str]] = field(default_factory=set)
    begun: tuple[Task, str] | None = None


def run(
    output: Path,
    tune: bool,
    write_crossover: bool = False,
    plan: Sequence[Task] = PLAN,
    work: Callable = kernel_cases.work,
    limit: float = LIMIT,
    patience: float = PATIENCE,
) -> None:
    """Measure, write one JSON object a line as they come, and a page beside them.

    Args:
        output: `.jsonl` to write; `.md` beside it.
        tune: time every shipped configuration of a kernel first, at most ten seconds a shape.
        write_crossover: put the crossover points into the file that dispatch reads, for GPUs of this architecture.
        plan: the tasks, in order.
        work: what the other process runs, as bench_cases.work.
        limit: seconds for everything but the page.
        patience: seconds without an answer after which the process is ended.

    Raises:
        ValueError: no GPU, no triton, or a process that ends before it measured anything.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "bench kernels times CUDA kernels and torch sees no GPU here; `quantdit bench cpu` measures this machine"
        )
    device = kernel_cases.gpu()
    if not dispatch.kernels_run(torch.empty(0, device=device)):
        raise ValueError(f"bench kernels needs triton and a GPU of compute capability 8.0; run: {install('triton')}")
    began = time.monotonic()
    origin = provenance(device, tune, write_crossover)
    output.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress()
    ended = "Failed"
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with output.open("w") as file:

            def keep(row: dict) -> None:
                progress.rows.append(row | origin)
                file.write(json.dumps(progress.rows[-1]) + "\n")
                file.flush()
                print(_line(row), flush=True)

            try:
                ended = _measure(progress, keep, plan, work, tune, began + limit, patience)
            except KeyboardInterrupt:
                ended = "Interrupted"
                raise
            finally:
                left_out = [f"{t.what} {t.m} {t.n} {t.k}" for t in plan if t not in progress.done]
                keep({"what": "end", "ended": ended, "seconds": round(time.monotonic() - began, 1), "left_out": left_out})
                output.with_suffix(".md").write_text(markdown(progress.rows))
    finally:
        signal.signal(signal.SIGTERM, before)
    if write_crossover:
        keep_crossover(dispatch.CROSSOVER_FILE, crossovers(progress.rows), origin)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _measure(
    progress: Progress,
    keep: Callable[[dict], None],
    plan: Sequence[Task],
    work: Callable,
    tune: bool,
    end: float,
    patience: float,
) -> str:
    """Start processes until the plan is done or the time is over; return how it ended."""
    context = multiprocessing.get_context("spawn")
    while left := [task for task in plan if task not in progress.done]:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(there, left, progress.broken, progress.top, tune))
        known = len(progress.rows)
        progress.begun = None
        process.start()
        there.close()
        answer = ""
        try:
            answer = _listen(here, progress, keep, end, patience)  # pyright: ignore[reportArgumentType] - a Connection but on Windows
        finally:
            if answer == "gone":
                process.join(10)
            process.kill()
            process.join()
            here.close()
        if answer == "out of time":
            return "Out of time"
        why = (
            f"no answer within {patience:.0f} s" if answer == "silent" else f"the process ended with exit code {process.exitcode}"
        )
        if progress.begun is None and len(progress.rows) == known and progress.done.isdisjoint(left):
            raise ValueError(f"bench kernels measured nothing: {why}; what it printed says more")
        _blame(progress, keep, why)
    return "Complete"


def _listen(connection: Connection, progress: Progress, keep: Callable[[dict], None], end: float, patience: float) -> str:
    """Take messages until the process is `gone`, `silent` or `out of time`."""
    while True:
        wait = min(patience if progress.begun else START, end - time.monotonic())
        if wait <= 0 or not connection.poll(wait):
            return "out of time" if time.monotonic() >= end else "silent"
        try:
            kind, *rest = connection.recv()
        except EOFError:
            return "gone"
        if kind == "begin":
            progress.begun = (rest[0], rest[1])
        elif kind == "ceilings":
            progress.top = rest[0]
            for name, value in rest[0].items():
                keep({"what": f"ceiling {name}", "value": value})
        elif kind == "row":
            keep(rest[0])
            if "error" in rest[0] and progress.begun is not None:
                progress.broken.add(progress.begun)
        else:
            progress.done.add(rest[0])
            progress.begun = None


def _blame(progress: Progress, keep: Callable[[dict], None], why: str) -> None:
    """Give what was under way when a process ended the row of its error, and leave it out from now on."""
    if progress.begun is None or progress.begun in progress.broken:
        return
    task, name = progress.begun
    keep(error_row(task, name, why))
    progress.broken.add((task, name))
    if name == "timing":
        progress.done.add(task)


def provenance(device: torch.device, tune: bool, write_crossover: bool) -> dict:
    """Return device, versions, commit and command of a row."""
    import triton

    options = " --tune" * tune + " --write-crossover" * write_crossover
    return {
        "device": torch.cuda.get_device_name(device),
        "capability": dispatch.capability_of(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "tuned": tune,
        "commit": cpu_linear.commit(),
        "command": "quantdit bench kernels" + options,
    }


def keep_crossover(path: Path, points: dict[str, int | None], origin: dict) -> None:
    """Put points into a crossover file, for GPUs of the architecture they were measured on; the others stay.

    Raises:
        ValueError: no point was measured.
    """
    if not points:
        raise ValueError(f"no crossover point was measured, {path} stays as it was; the page says what did not run")
    content = json.loads(path.read_text())
    row = dispatch.architecture(origin["capability"])
    for name, m in points.items():
        content[name][row] = m
    content["measured"][row] = " ".join(
        [origin["device"], "torch", origin["torch"], "triton", origin["triton"], origin["commit"]]
    )
    files.write_json(path, content)
    print(f"{path}: {points} for compute capability {row}")


def _line(row: dict) -> str:
    if "m" not in row:
        return f"{row['what']}: {row.get('value', row.get('ended'))}"
    result = f"{row['us_median']:>10.1f} us" if "us_median" in row else f"{'failed':>13}"
    return f"{row['m']:>6} {row['n']:>6} {row['k']:>6} {result}  {row['what']}" + (f": {row['error']}" if "error" in row else "")
