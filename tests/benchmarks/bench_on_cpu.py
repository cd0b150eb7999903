"""`quantdit bench kernels` without a GPU, for test_bench_kernels.py: tiny shapes in Triton's interpreter, a clock of the CPU.

`bench_on_cpu.py SCENARIO FILE.jsonl CROSSOVER.json`. The process that does the work imports this file again, so what is replaced
here is replaced there too.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch

_spec = importlib.util.spec_from_file_location("quantdit_interpreter", Path(__file__).parents[1] / "kernels" / "interpreter.py")
_interpreter = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_interpreter)
_interpreter.install()

from quantdit.benchmarks import gpu_kernels, kernel_cases, kernel_report  # noqa: E402
from quantdit.benchmarks.kernel_cases import Candidate, Task  # noqa: E402
from quantdit.kernels import ops  # noqa: E402
from quantdit.kernels.triton_ops import dispatch  # noqa: E402


class Event:
    """A moment, as torch.cuda.Event has it."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, stop: Event) -> float:
        return 1e3 * (stop.at - self.at)


torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda device=None: "no GPU"
torch.cuda.synchronize = lambda device=None: None
torch.cuda._sleep = lambda cycles: None
torch.cuda.Event = Event
dispatch.on_gpu = lambda tokens: True
dispatch.capability_of = lambda device: 90
dispatch.CROSSOVER_FILE = Path(sys.argv[3])
kernel_cases.gpu = lambda: torch.device("cpu")
kernel_cases.ROUNDS, kernel_cases.FLUSH, kernel_cases.COPIED, kernel_cases.LARGE = 2, 16, 1024, 32
kernel_report.MANY, kernel_report.FEW = (8, 24), (8, 16)
_library = torch.library.Library("quantdit", "IMPL")
for _kernel in dispatch.KERNELS:
    _library.impl(_kernel.__name__, ops.OPS[_kernel.__name__].of_leaves(_kernel), "CPU", allow_override=True)


def _raises() -> tuple:
    raise RuntimeError("CUDA error: an illegal memory access\nand more")


def _stops() -> tuple:
    os._exit(7)


def _hangs() -> tuple:
    time.sleep(600)
    raise AssertionError


def _wrong() -> tuple:
    return lambda: torch.ones(3), kernel_cases.equals(torch.zeros(3))


def _late() -> tuple:
    """Passes its gate and takes the process along when it is timed."""
    calls = iter(range(2))
    return lambda: next(calls) == 0 or os._exit(9), None


def _right() -> tuple:
    return lambda: torch.ones(3), kernel_cases.equals(torch.ones(3))


FAULTS = {"right": _right, "raises": _raises, "wrong": _wrong, "stops": _stops, "hangs": _hangs}
kernel_cases.MAKERS["faults"] = lambda s: {name: Candidate(make) for name, make in FAULTS.items()}
kernel_cases.MAKERS["right"] = lambda s: {"right": Candidate(_right)}
kernel_cases.MAKERS["late"] = lambda s: {"right": Candidate(_right), "late": Candidate(_late)}
kernel_cases.MAKERS["endless"] = lambda s: {"right": Candidate(_right), "hangs": Candidate(_hangs)}

N, K = 24, 128
ALL = (
    Task("many", 20, N, K),
    Task("few", 2, N, K),
    *(Task("ways of many", m, N, K) for m in (8, 24)),
    *(Task("ways of few", m, N, K) for m in (8, 16)),
)
SCENARIOS = {
    "all": {"plan": ALL, "write_crossover": True},
    "faults": {"plan": (Task("faults", 1, 2, 3), Task("late", 1, 2, 3), Task("right", 1, 2, 3)), "patience": 8.0},
    "endless": {"plan": (Task("endless", 1, 2, 3), Task("few", 2, N, K))},
    "no time": {"plan": ALL, "limit": 0.0},
    "nothing": {"plan": (Task("unknown", 1, 2, 3),)},
}

if __name__ == "__main__":
    try:
        gpu_kernels.run(Path(sys.argv[2]), tune=False, **SCENARIOS[sys.argv[1]])
    except KeyboardInterrupt:
        sys.exit(130)
