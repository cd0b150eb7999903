"""The kernels on the CPU, in processes of their own: TRITON_INTERPRET is read when a kernel is decorated."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "interpreted"
ROOM = Path(__file__).parents[2] / "kernels" / "triton_ops"
# Which file runs which kernels: each is launched there, or the test of the file fails.
FILES = {
    "test_quantize_tokens.py": {"quantize_tokens_kernel", "quantize_project_kernel"},
    "test_decode8.py": {"decode8_kernel", "decode_trellis_kernel"},
    "test_gemm_w8a8.py": {"gemm_w8a8_kernel"},
    "test_gemm_packed.py": {"gemm_packed_kernel", "sum_splits_kernel"},
    "test_attention8.py": {"attention8_kernel", "quantize_tokens_kernel"},
    "test_checkpoint.py": {"quantize_tokens_kernel", "gemm_packed_kernel", "sum_splits_kernel"},
    "test_linear.py": {
        "quantize_tokens_kernel",
        "quantize_project_kernel",
        "decode8_kernel",
        "decode_trellis_kernel",
        "gemm_w8a8_kernel",
        "gemm_packed_kernel",
        "sum_splits_kernel",
    },
}
# Two that take long, and the others together: a process takes seconds to begin.
RUNS = (["test_gemm_packed.py"], ["test_linear.py"], sorted(FILES.keys() - {"test_gemm_packed.py", "test_linear.py"}))


def kernels() -> set[str]:
    """Return the functions of the package that are launched on a grid: jitted, named `_kernel`."""
    found = set()
    for path in ROOM.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.dump(d) for d in node.decorator_list):
                found |= {node.name} if node.name.endswith("_kernel") else set()
    return found


def test_every_kernel_that_is_launched_is_tested(launched: set[str]):
    assert launched == kernels() == set().union(*FILES.values())
    assert {path.name for path in FOLDER.glob("test_*.py")} == set(FILES)


@pytest.mark.parametrize("names", RUNS, ids=" ".join)
def test_interpreted(names: list[str], tmp_path: Path):
    report = tmp_path / "launched.json"
    environment = os.environ | {"TRITON_INTERPRET": "1", "QUANTDIT_LAUNCHED": str(report), "QUANTDIT_TUNE": "0"}
    environment.pop("QUANTDIT_KERNELS", None)
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [FOLDER / name for name in names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[2], timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
    assert json.loads(report.read_text()) == {name: sorted(FILES[name]) for name in names}
