"""Linears of other packages in Triton's interpreter, for test_bench_kernels.py: prints {name: relative error} as JSON.

What they ask a GPU for is answered here, and what the interpreter lacks (libdevice) is repaired.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"TRITON_INTERPRET": "1", "SDNQ_USE_TORCH_COMPILE": "0", "HF_HUB_OFFLINE": "1"}

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.language.extra import libdevice
from triton.runtime.autotuner import Autotuner

_spec = importlib.util.spec_from_file_location("quantdit_interpreter", Path(__file__).parents[1] / "kernels" / "interpreter.py")
_interpreter = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_interpreter)
_interpreter.install()

from quantdit.benchmarks.baselines import BASELINES  # noqa: E402


class Driver:
    """What Triton asks about the GPU."""

    utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 227 * 1024, "multiprocessor_count": 4})

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable:
        return lambda run, quantiles=None, **options: [1.0, 1.0, 1.0]


def nearest(x, **options):
    """Round to even below 2^22."""
    return (x.to(tl.float32) + 12582912.0) - 12582912.0


triton.runtime.driver.set_active(Driver())
_pruned = Autotuner.prune_configs
Autotuner.prune_configs = lambda self, arguments: list(_pruned(self, arguments))[:1]  # the first fits, and one is enough
libdevice.rint = libdevice.round = nearest
libdevice.div_rn = lambda a, b, **options: a / b
libdevice.rsqrt = lambda a, **options: 1.0 / tl.sqrt(a)
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=4, name="NVIDIA H100")

N, K, M = 64, 256, 36


def main() -> None:
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(N, K, generator=g) / K**0.5, torch.randn(M, K, generator=g)
    errors = {}
    for name in sys.argv[1:]:
        # In the interpreter gemlite's atomics know float16 alone.
        dtype = torch.float16 if BASELINES[name].package == "gemlite" else torch.bfloat16
        y = BASELINES[name].linear(weight.to(dtype))(x.to(dtype))
        exact = x.double() @ weight.double().T
        errors[name] = float((y.double() - exact).norm() / exact.norm())
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
