"""Damage every file that quantdit reads, many times, and say what did not end as it must (`make fuzz`).

Each mutation runs in a forked process, so that a crash, a hang or a full memory costs that mutation alone, and ends in one of:

    refused     a ValueError or OSError with a message
    same        it opened, and gave what the undamaged file gives, to the bit
    other       it opened as something else, where nothing says what it should be (a model in full precision)
    theirs      diffusers failed in its own code: no line of quantdit is in the traceback
    FAULT       another error, another result than the undamaged one's, a crash, 20 s of CPU time, 512 MiB more memory

    python tests/fuzz/run.py --count 20000 --seed 0 --output reports/fuzz.jsonl
    python tests/fuzz/run.py --replay gate:17       # one of them again, with its traceback
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from mutate import mutate
from targets import MAKERS, TARGETS, Target, Wrong

BATCH = 25  # mutations of one process
CPU_SECONDS = 20
STILL_SECONDS = 10  # asleep for so long: it waits for what does not come
MEMORY = 2**29
ADDRESSES = 2**30
FILE_BYTES = 2**28  # of a file that is written
REFUSED, SAME, OTHER, THEIRS, FAULT = "refused", "same", "other", "theirs", "FAULT"
NOT_REFUSALS = (UnicodeError, json.JSONDecodeError)  # a ValueError that nobody wrote for a user
HOME = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """What came of one mutation.

    Attributes:
        target: its name.
        number: of the mutation.
        verdict: one of the five.
        error: kind of fault, or the class of the error.
        where: the innermost line of ours that it passed.
        message: of the error, its beginning.
        mutation: what was done.
        seconds: of CPU time.
    """

    target: str
    number: int
    verdict: str
    error: str = ""
    where: str = ""
    message: str = ""
    mutation: str = ""
    seconds: float = 0.0


def prepare(root: Path, names: Sequence[str], made: Mapping[str, Path] | None = None) -> dict[str, str]:
    """Make the undamaged folders that the targets need; returns what each target gives when it is opened.

    Args:
        root: where they go.
        names: of the targets.
        made: those of the folders that are there already.
    """
    needed = {TARGETS[name].folder for name in names} | {"source", "quantized", "saved"}
    with quiet():
        for name, make in MAKERS.items():
            if name in (made or {}):
                shutil.copytree(made[name], root / name)
            elif name in needed:
                torch.manual_seed(0)
                make(root / name, root)
        expected = {}
        for name in names:
            with copied(TARGETS[name], root) as folder:
                expected[name] = TARGETS[name].open(folder)
    return expected


@contextlib.contextmanager
def copied(target: Target, root: Path) -> Iterator[Path]:
    """Have a copy of a target's undamaged folder; its files are hard links, which a mutation replaces."""
    place = Path(tempfile.mkdtemp(prefix="fuzz-", dir=root))
    try:
        for name in ("source", "saved"):  # what some are opened with
            (place / name).symlink_to(root / name)
        whole = place / (target.folder if target.folder not in ("source", "saved") else f"{target.folder}-damaged")
        # A calibration writes into what was interrupted.
        shutil.copytree(root / target.folder, whole, copy_function=shutil.copy if target.folder == "partial" else os.link)
        yield whole
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and warnings away."""
    with (
        open(os.devnull, "w") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(nothing),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def attempt(name: str, number: int, seed: int, root: Path, expected: str, replay: bool = False) -> Outcome:
    """Make one mutation, open what came of it, and judge."""
    target = TARGETS[name]
    began, before = time.process_time(), _memory("VmRSS")
    with copied(target, root) as folder:
        what = damaged(target, number, seed, folder)
        try:
            got = target.open(folder)
            verdict, error = (SAME, None) if got == expected else (FAULT if target.strict else OTHER, None)
        except Exception as raised:  # that is what is asked
            verdict, error = judged(raised, target), raised
            if replay:
                traceback.print_exc()
    grown = _memory("VmHWM") - before
    kind = type(error).__name__ if error is not None else "another result" if verdict == FAULT else ""
    if verdict != THEIRS and (grown > MEMORY or isinstance(error, MemoryError) or "can't allocate memory" in str(error)):
        verdict, kind = FAULT, "over-allocation"
    where = _ours(error) if error is not None else ""
    message = str(error).partition("\n")[0][:200] if error is not None else ""
    return Outcome(name, number, verdict, kind, where, message, what, round(time.process_time() - began, 2))


def judged(error: Exception, target: Target) -> str:
    """Return whether an error is a refusal, a fault of ours, or none of our business."""
    if isinstance(error, ValueError | OSError) and not isinstance(error, NOT_REFUSALS) and str(error):
        return REFUSED
    if target.foreign and not isinstance(error, Wrong) and not _ours(error):
        return THEIRS
    return FAULT


def _ours(error: Exception) -> str:
    """Return the innermost line of quantdit that an error passed, as file:line; empty for none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(HOME)]
    places = [Path(f.filename).relative_to(HOME) for f in frames]
    found = [
        f"{place.as_posix()}:{f.lineno}"
        for place, f in zip(places, frames, strict=True)
        if place.parts[0] in ("quantdit", "exporters", "calibration", "kernels")
    ]
    return found[-1] if found else ""


def _memory(kind: str) -> int:
    """Return the bytes of this process in memory: now (VmRSS), or at most since they were counted anew (VmHWM)."""
    if kind == "VmRSS":
        Path("/proc/self/clear_refs").write_text("5")  # counts anew
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(kind))
    return int(line.split()[1]) * 1024


def child(pipe: int, name: str, numbers: Sequence[int], seed: int, root: Path, expected: str) -> None:
    """Make mutations one after the other, writing a line before and after each; never returns."""
    code = 1
    try:
        logging.disable(logging.CRITICAL)
        faulthandler.disable()
        soft = _memory("VmSize") + ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # kills, wherever the time is spent
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nothing, number)
        warnings.simplefilter("ignore")
        for number in numbers:
            os.write(pipe, f"{number}\n".encode())
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            outcome = attempt(name, number, seed, root, expected)
            os.write(pipe, (json.dumps(asdict(outcome)) + "\n").encode())
        code = 0
    finally:
        os._exit(code)


def batch(name: str, numbers: Sequence[int], seed: int, root: Path, expected: str) -> Iterator[Outcome]:
    """Yield the outcomes of mutations, those that end their process included."""
    left = list(numbers)
    while left:
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reader)
            child(writer, name, left, seed, root, expected)
        os.close(writer)
        begun = None
        stuck = False
        for line in lines_of(reader, process):
            if line is None:
                stuck = True
                os.kill(process, signal.SIGKILL)
            elif line.startswith("{"):
                yield Outcome(**json.loads(line))
                left.pop(0)
                begun = None
            else:
                begun = int(line)
        os.close(reader)
        status = os.waitpid(process, 0)[1]
        if left:
            number = left.pop(0) if begun is None else left.pop(left.index(begun))
            ended = signal.Signals(status & 127).name if status & 127 else f"exit code {status >> 8}"
            error = "hang" if stuck or ended == "SIGPROF" else f"crash: {ended}"
            with copied(TARGETS[name], root) as folder:
                what = damaged(TARGETS[name], number, seed, folder)
            yield Outcome(name, number, FAULT, error, mutation=what)


def lines_of(reader: int, process: int) -> Iterator[str | None]:
    """Yield what a process writes, line by line; None if it sleeps and no longer gets anywhere."""
    rest, spent, still = b"", -1, time.monotonic()
    while True:
        if not select.select([reader], [], [], 1.0)[0]:
            state, used = _state(process)
            # One that waits for a core is not asleep, however busy the machine is.
            if state != "S" or used != spent:
                spent, still = used, time.monotonic()
            elif time.monotonic() - still > STILL_SECONDS:
                yield None
                return
            continue
        data = os.read(reader, 65536)
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        yield from (line.decode() for line in whole)
        still = time.monotonic()


def _state(process: int) -> tuple[str, int]:
    """Return the state of a process, such as R or S, and the clock ticks of CPU time it has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[11]) + int(fields[12])


def damaged(target: Target, number: int, seed: int, folder: Path) -> str:
    """Make the mutation of this number; returns what was done."""
    rng = random.Random(f"{seed} {target.name} {number}")
    return mutate(folder, rng.choice(target.files(folder)), rng, not target.given)


def shares(names: Sequence[str], count: int) -> dict[str, int]:
    """Return how many mutations each target gets."""
    total = sum(TARGETS[name].share for name in names)
    return {name: max(1, round(count * TARGETS[name].share / total)) for name in names}


def fuzz(
    root: Path, count: int, seed: int = 0, names: Sequence[str] = tuple(TARGETS), made: Mapping[str, Path] | None = None
) -> Iterator[Outcome]:
    """Yield the outcome of every mutation.

    Args:
        root: an empty folder to work in.
        count: of mutations, over all targets.
        seed: of all that is random.
        names: of the targets.
        made: as `prepare`.
    """
    torch.set_num_threads(1)
    expected = prepare(root, names, made)
    for name, number in shares(names, count).items():
        for first in range(0, number, BATCH):
            yield from batch(name, range(first, min(first + BATCH, number)), seed, root, expected[name])


def replayed(root: Path, name: str, number: int, seed: int) -> Outcome:
    """Make one mutation in this process and print the traceback of what it raises."""
    torch.set_num_threads(1)
    expected = prepare(root, [name])[name]
    return attempt(name, number, seed, root, expected, replay=True)


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a line for each target, and below it one for each fault that differs from the others, with an example."""
    lines = []
    for name in dict.fromkeys(o.target for o in outcomes):
        mine = [o for o in outcomes if o.target == name]
        counts = Counter(o.verdict for o in mine)
        lines.append(f"{name}: " + ", ".join(f"{counts[v]} {v}" for v in (REFUSED, SAME, OTHER, THEIRS, FAULT) if counts[v]))
        kinds = Counter((o.error, o.where) for o in mine if o.verdict == FAULT)
        for (error, where), times in kinds.most_common():
            one = next(o for o in mine if o.verdict == FAULT and (o.error, o.where) == (error, where))
            lines.append(f"  {times} x {error} {where}  [{one.target}:{one.number}] {one.mutation[:100]}: {one.message[:100]}")
    return lines


def main() -> int:
    """Run the command line; returns 1 if anything is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20000, help="mutations over all targets (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="a row for each fault and the counts of each target")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--replay", metavar="TARGET:NUMBER", help="make one mutation again and print its traceback")
    args = parser.parse_args()
    from tqdm import tqdm

    with tempfile.TemporaryDirectory(prefix="quantdit-fuzz-") as folder:
        if args.replay:
            name, _, number = args.replay.rpartition(":")
            print(replayed(Path(folder), name, int(number), args.seed))
            return 0
        outcomes = []
        with tqdm(total=sum(shares(args.targets, args.count).values()), unit="mutation") as bar:
            for outcome in fuzz(Path(folder), args.count, args.seed, args.targets):
                outcomes.append(outcome)
                bar.set_description(outcome.target)
                bar.update()
    faults = [o for o in outcomes if o.verdict == FAULT]
    print("\n".join(summary(outcomes)))
    print(f"{len(outcomes)} mutations, {len(faults)} faults")
    if args.output:
        counts = {n: Counter(o.verdict for o in outcomes if o.target == n) for n in args.targets}
        spent = {n: round(sum(o.seconds for o in outcomes if o.target == n), 1) for n in args.targets}
        rows = [{"target": name, "seed": args.seed, "seconds": spent[name], **count} for name, count in counts.items()]
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *(asdict(o) for o in faults)]))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
