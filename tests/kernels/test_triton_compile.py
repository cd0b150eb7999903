"""The kernels compiled for GPUs that are not here: the committed table covers everything, and a few rows are made again."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from quantdit.formats import FORMATS
from quantdit.kernels.triton_ops import dispatch

triton = pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "reports" / "bench" / "static.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quantdit_static", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


static = load()
ROWS = [json.loads(line) for line in SCRIPT.with_suffix(".jsonl").read_text().splitlines()]
CASES = {case.key: case for arch in static.NAMES for case in static.cases(arch)}


def test_the_table_covers_every_kernel_configuration_and_architecture(launched: set[str]):
    keys = [(row["kernel"], row["variant"], row["arch"]) for row in ROWS]
    assert len(keys) == len(set(keys))
    assert set(keys) == set(CASES)
    assert {case.kernel for case in CASES.values()} == launched == set(static.JIT)
    assert static.markdown(ROWS) == SCRIPT.with_suffix(".md").read_text()


def test_every_format_that_dispatch_lets_in_has_a_row_on_every_architecture():
    """By asking dispatch itself, format by format, which route it takes."""
    missing = []
    for arch in static.NAMES:
        labels = [
            row["variant"].split(",")[0].split() for row in ROWS if (row["kernel"], row["arch"]) == ("gemm_packed_kernel", arch)
        ]
        there = {(label[0], x) for label in labels for x in ("i8", "bf16") if x in label}
        for name in FORMATS:
            for dtype, x in ((torch.int8, "i8"), (torch.bfloat16, "bf16")):
                whole = FORMATS[name].kind == "whole" and x == "i8"  # which gemm_w8a8 multiplies
                if not whole and not dispatch.decodes_first(2, FORMATS[name], dtype, arch) and (name, x) not in there:
                    missing.append((arch, name, x))
    assert not missing


def test_no_row_is_wrong():
    for row in ROWS:
        assert row["errors"] == [] and row["spilled"] == 0, row
        assert row["shared"] <= static.SHARED[row["arch"]]
        case = CASES[row["kernel"], row["variant"], row["arch"]]
        assert row["registers"] * 32 * case.warps <= static.REGISTERS
        assert (case.product is None) == (row["product"] == ""), row
        assert ("per_mac" in row) == bool(case.macs), row


AGAIN = [
    ("gemm_w8a8_kernel", "int8, 128x256x128 w8 s3", 90),
    ("gemm_w8a8_kernel", "e4m3, 128x128x64 w8 s3", 89),
    ("gemm_packed_kernel", "int4 g64 i8, 128x128x128 w8 s4", 90),
    ("gemm_packed_kernel", "table4 i8, 128x128x128 w8 s3", 80),
    ("gemm_packed_kernel", "table4 bf16, 16x64x128 w4 s4 k8", 120),
    ("quantize_tokens_kernel", "int rotated, k=1536", 90),
    ("decode8_kernel", "int3, block of 128", 80),
    ("sum_splits_kernel", "8 of i32", 100),
]


@pytest.mark.parametrize(("kernel", "variant", "arch"), AGAIN, ids=lambda v: str(v))
def test_rows_are_what_the_compiler_says(kernel: str, variant: str, arch: int):
    """With the triton of the table the very row; with another one no errors."""
    row = static.inspect(CASES[kernel, variant, arch])
    committed = next(r for r in ROWS if (r["kernel"], r["variant"], r["arch"]) == (kernel, variant, arch))
    assert row["errors"] == []
    if row["triton"] == committed["triton"]:
        assert row == committed


def test_inline_ptx_on_strided_tiles_is_found():
    ttgir = """
#blocked = #ttg.blocked<{sizePerThread = [1, 16], threadsPerWarp = [8, 4], warpsPerCTA = [4, 1], order = [1, 0]}>
#strided = #ttg.blocked<{sizePerThread = [4, 1], threadsPerWarp = [8, 4], warpsPerCTA = [4, 1], order = [0, 1]}>
  %1 = tt.elementwise_inline_asm "x" {packed = 4} %0 : tensor<64x64xi8, #LAYOUT> -> tensor<64x64xi8, #LAYOUT>
"""
    assert static.asm_layouts(ttgir.replace("LAYOUT", "blocked"), 4) == []
    assert static.asm_layouts(ttgir.replace("LAYOUT", "strided"), 1) == []
    assert len(static.asm_layouts(ttgir.replace("LAYOUT", "strided"), 2)) == 1


def test_registers_along_k():
    dot = "#ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 2}"
    alone = "#ttg.blocked<{sizePerThread = [1, 1], threadsPerWarp = [32, 1], warpsPerCTA = [4, 1], order = [1, 0]}>"
    shared = "#ttg.blocked<{sizePerThread = [1, 2], threadsPerWarp = [1, 32], warpsPerCTA = [4, 1], order = [1, 0]}>"
    linear = "#ttg.linear<{register = [[0, 1], [0, 2], [8, 0], [0, 16]], lane = [[0, 4]], warp = [], block = []}>"
    assert [static.together(layout, 64) for layout in (dot, alone, shared, linear, "#mma")] == [2, 4, 2, 4, 0]
    # As triton 3.6 has it: rows come first, but a thread has one row of a tile of 128, and two of one of 256.
    column = alone.replace("order = [1, 0]", "order = [0, 1]")
    assert [static.together(column, height) for height in (128, 256)] == [4, 1]


def test_a_kernel_that_does_not_compile_is_a_row_with_an_error():
    case = CASES["decode8_kernel", "int4, block of 128", 80]
    row = static.inspect(static.Case(case.kernel, "broken", 80, case.types | {"data_ptr": "i32"}, case.constants, 4, 3))
    assert row["errors"]
