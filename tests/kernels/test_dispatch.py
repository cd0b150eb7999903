"""Which way a layer goes on a GPU, without one; that nothing of it is imported before; where tuned configurations are kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantdit.formats import FORMATS
from quantdit.kernels import ops
from quantdit.kernels.triton_ops import dispatch

I8, E4M3, BF16 = torch.int8, torch.float8_e4m3fn, torch.bfloat16
ROUTES = [
    # m, format, what is multiplied, capability, decoded first
    (2, "table4", BF16, 90, False),
    (64, "int8", torch.float16, 80, False),
    (65, "table4", BF16, 90, True),
    (2, "table4", torch.float32, 90, True),
    (2, "ssvq256x8", BF16, 90, True),
    (2, "ssvq256x8", I8, 90, False),
    (2, "trellis2_l12", BF16, 90, True),
    (2, "trellis4_l12", I8, 86, True),
    (2, "int4", I8, 90, False),
    (100000, "int4", I8, 90, True),
    (100000, "int4", I8, 86, False),
    (100000, "int4", I8, 103, True),
    (2, "table4_e4m3", E4M3, 90, True),
    (2, "table4_e4m3", I8, 90, False),
]


@pytest.mark.parametrize(("m", "format", "x", "capability", "first"), ROUTES)
def test_the_route_of_a_packed_weight(m: int, format: str, x: torch.dtype, capability: int, first: bool):
    assert dispatch.decodes_first(m, FORMATS[format], x, capability) == first


def test_crossover_points_decide():
    start = dispatch.CROSSOVER["decode_from_m"]["90"]
    assert not dispatch.decodes_first(start - 1, FORMATS["int4"], I8, 90)
    assert dispatch.decodes_first(start, FORMATS["int4"], I8, 90)
    assert set(dispatch.CROSSOVER["decode_from_m"]) == set(map(str, dispatch.ARCHITECTURES))


def test_a_mode_overrides_and_ends_with_its_context():
    def routes(x: torch.dtype) -> set[bool]:
        return {dispatch.decodes_first(m, FORMATS["int4"], x, 90) for m in (2, 100000)}

    for mode, first in (("packed", False), ("decode", True)):
        with dispatch.using(mode):
            assert routes(I8) == routes(BF16) == {first}
    with dispatch.using("torch"):
        assert routes(I8) == {True}
    assert dispatch.MODE.get() == "auto" and routes(I8) == routes(BF16) == {False, True}
    with pytest.raises(ValueError, match=r"'fast' is unknown; known: auto, packed"), dispatch.using("fast"):
        pass


def test_an_unknown_mode_of_the_environment_is_refused():
    code = "import quantdit.kernels.triton_ops.dispatch"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env={"QUANTDIT_KERNELS": "fast"}, timeout=900
    )
    assert done.returncode and "QUANTDIT_KERNELS = 'fast' is unknown" in done.stderr


def test_every_op_of_a_layer_has_a_kernel_on_cuda():
    run = {kernel.__name__ for kernel in dispatch.KERNELS}
    assert set(ops.OPS) - run == {
        "gemm_w8a16",
        "straight_through",
        "straight_through_attention",
        "input_gradient",
    }  # torch's products
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key(f"quantdit::{name}", "CUDA") for name in run)


def test_the_table_needs_no_triton():
    """Choosing is plain Python; a GPU without triton runs the definitions."""
    code = """if True:
        import sys
        sys.modules["triton"] = None
        import torch
        import quantdit
        from quantdit.kernels.triton_ops import dispatch
        dispatch.capability_of = lambda device: 90
        dispatch.find_spec = lambda name: None
        print(dispatch.kernels_run(torch.zeros(1)), dispatch.quantize_tokens(torch.ones(1, 4), 8)[0].tolist())"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=900)
    assert done.stdout.split() == ["False", "[[127,", "127,", "127,", "127]]"], done.stderr


def test_configurations_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tuning = pytest.importorskip("quantdit.kernels.triton_ops.tuning", exc_type=ImportError)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_CHOSEN", {})
    first, second = tuning.Config(128, 128, 64, 4, 3), tuning.Config(64, 64, 64, 4, 3)
    ran: list[tuning.Config] = []
    # Untuned: the first, and nothing is run or written.
    assert tuning.chosen("gemm", (1, 2), (first, second), ran.append) == first
    assert not ran and not tuning.cache_file().exists()

    tuning._CHOSEN.clear()
    monkeypatch.setenv("QUANTDIT_TUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuning, "_device", lambda: "some-gpu")
    monkeypatch.setattr(tuning, "_milliseconds", lambda run, config: {first: 2.0, second: 1.0}[config])
    assert tuning.chosen("gemm", (1, 2), (first, second), ran.append) == second
    assert ran == [first, second]
    assert [p.name for p in tuning.cache_file().parent.iterdir()] == ["kernels.json"]

    # Another process, not tuning: what the first one found.
    tuning._CHOSEN.clear()
    monkeypatch.delenv("QUANTDIT_TUNE")
    assert tuning.chosen("gemm", (1, 2), (first, second), ran.append) == second
    assert tuning.chosen("gemm", (1, 3), (first, second), ran.append) == first
    # A file that is damaged, or names a configuration that is no longer shipped, is as none.
    tuning._CHOSEN.clear()
    tuning.cache_file().write_text(json.dumps({"x": 1}))
    assert tuning.chosen("gemm", (1, 2), (first, second), ran.append) == first


def test_tuning_ends_in_time(monkeypatch: pytest.MonkeyPatch):
    tuning = pytest.importorskip("quantdit.kernels.triton_ops.tuning", exc_type=ImportError)
    configs = tuple(tuning.Config(16 * i, 16, 16, 4, 2) for i in range(1, 9))
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(tuning.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(tuning, "_milliseconds", lambda run, config: 1000.0 - config.bm)
    ran: list[tuning.Config] = []
    assert tuning._fastest(configs, ran.append) == ran[-1]
    assert ran == list(configs[:3])  # at 4, 8 and 12 seconds
