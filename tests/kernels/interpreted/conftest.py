"""Triton kernels on the CPU. TRITON_INTERPRET is read when a kernel is decorated: test_triton_interpreter.py starts a process.

Memory that a kernel should write is NaN (or the largest integer) before: use_deterministic_algorithms fills torch.empty.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from quantdit.formats import FORMATS, QSpec
from quantdit.tensors.qtensor import QTensor, spec_fields

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    _spec = importlib.util.spec_from_file_location("quantdit_interpreter", Path(__file__).parents[1] / "interpreter.py")
    interpreter = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(interpreter)
    interpreter.install()

    ran: dict[str, list[str]] = {}

    @pytest.fixture(autouse=True, scope="module")
    def kernels_of_a_file(request: pytest.FixtureRequest) -> Iterator[None]:
        interpreter.launched.clear()
        yield
        ran[request.path.name] = sorted(interpreter.launched)

    def pytest_sessionfinish() -> None:
        """Leave the names of the kernels that each file ran for the process that started this one."""
        if report := os.environ.get("QUANTDIT_LAUNCHED"):
            Path(report).write_text(json.dumps(ran))


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Let CPU tensors go the way of a GPU of a compute capability, and meet the ops that a CUDA tensor would."""
    from quantdit.kernels import ops
    from quantdit.kernels.triton_ops import dispatch

    library = torch.library.Library("quantdit", "IMPL")

    def pretend(capability: int) -> None:
        monkeypatch.setattr(dispatch, "on_gpu", lambda tokens: True)
        monkeypatch.setattr(dispatch, "capability_of", lambda device: capability)
        for kernel in dispatch.KERNELS:
            name = kernel.__name__
            library.impl(name, ops.OPS[name].of_leaves(kernel), "CPU", allow_override=True)

    yield pretend
    library._destroy()


@pytest.fixture
def weight() -> Callable[..., QTensor]:
    """A weight of random codes and values that keep inside int8."""

    def make(name: str, n: int, k: int, group: int | None = None, codebook_rows: int = 1) -> QTensor:
        f = FORMATS[name]
        spec = QSpec(name, n, k, group or k, codebook_rows)
        generator = torch.Generator().manual_seed(3)
        codes = torch.randint(f.code_count, (n, k // f.dim), generator=generator).to(f.code_dtype)
        if name == "fp8_e4m3":
            codes[codes % 128 == 127] = 0
        tensors = {"data": f.pack(f, codes), "scale": torch.rand(n, generator=generator) / 100}
        for key, field in spec_fields(spec).items():
            if key in ("multiplier", "offset"):
                # As large as they may be: every carry of the packed arithmetic is met.
                top = 255 // (f.code_count - 1)
                multiplier = torch.randint(0, top + 1, field.shape, generator=generator)
                offset = -128 + (torch.rand(field.shape, generator=generator) * (256 - (f.code_count - 1) * multiplier)).long()
                tensors["multiplier"], tensors["offset"] = multiplier.to(torch.uint8), offset.to(torch.int8)
            elif key == "codebook":
                entries = torch.randint(0, 256, field.shape, generator=generator).to(torch.uint8)
                entries[entries % 128 == 127] = 0  # e4m3's NaN
                tensors["codebook"] = entries.view(field.dtype)
        return QTensor(spec, **tensors)

    return make
