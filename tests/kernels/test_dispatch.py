"""Which way a layer goes on a GPU, without one; that nothing of it is imported before; where tuned configurations are kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantdit.formats import QSpec
from quantdit.kernels import ops
from quantdit.kernels.triton_ops import dispatch
from quantdit.tensors.layer_spec import ActivationSpec, LayerSpec


def spec(format: str, bits: int, rotation: str = "hadamard", rank: int = 0, activation: str = "int") -> LayerSpec:
    block = {"hadamard": 128, "outlier": 64, "none": 1}[rotation]
    return LayerSpec(QSpec(format, 256, 256, 256), ActivationSpec(bits, activation), rotation, block, False, rank)


WAYS = [
    # m, layer, dtype, capability, prepare, product
    (2, spec("table4", 16), torch.bfloat16, 90, "separate", "w4a16"),
    (64, spec("int8", 16), torch.float16, 80, "separate", "w4a16"),
    (65, spec("table4", 16), torch.bfloat16, 90, "separate", "dense"),
    (2, spec("table4", 16), torch.float32, 90, "separate", "dense"),
    (2, spec("ssvq256x8", 16), torch.bfloat16, 90, "separate", "dense"),
    (2, spec("trellis2_l12", 16), torch.bfloat16, 90, "separate", "dense"),
    (2, spec("trellis4_l12", 8), torch.bfloat16, 86, "fused", "decode"),
    (2, spec("int8", 8), torch.bfloat16, 90, "fused", "w8a8"),
    (2, spec("int4", 8), torch.bfloat16, 90, "fused", "w4a8"),
    (100000, spec("int4", 8), torch.bfloat16, 90, "fused", "decode"),
    (100000, spec("int4", 8), torch.bfloat16, 86, "fused", "w4a8"),
    (100000, spec("int4", 8), torch.bfloat16, 103, "fused", "decode"),
    (2, spec("int4", 8, rank=dispatch.LARGEST_RANK), torch.bfloat16, 90, "fused", "w4a8"),
    (2, spec("int4", 8, rank=dispatch.LARGEST_RANK + 1), torch.bfloat16, 90, "separate", "w4a8"),
    (2, spec("int4", 8, "outlier"), torch.bfloat16, 90, "separate", "w4a8"),
    (2, spec("int4", 8, "none"), torch.bfloat16, 90, "separate", "w4a8"),
    (2, spec("table4_e4m3", 8, activation="fp8"), torch.bfloat16, 90, "fused", "decode"),
    (2, spec("fp8_e4m3", 8, activation="fp8"), torch.bfloat16, 90, "fused", "w8a8"),
]


@pytest.mark.parametrize(("m", "layer", "dtype", "capability", "prepare", "product"), WAYS)
def test_the_table(m: int, layer: LayerSpec, dtype: torch.dtype, capability: int, prepare: str, product: str):
    assert dispatch.choose(m, layer, dtype, capability) == dispatch.Way(prepare, product)


def test_crossover_points_decide():
    start = dispatch.CROSSOVER["decode_from_m"]["90"]
    layer = spec("int4", 8)
    assert dispatch.choose(start - 1, layer, torch.bfloat16, 90).product == "w4a8"
    assert dispatch.choose(start, layer, torch.bfloat16, 90).product == "decode"
    assert set(dispatch.CROSSOVER["decode_from_m"]) == set(map(str, dispatch.ARCHITECTURES))


def test_a_mode_overrides_and_ends_with_its_context():
    layer = spec("int4", 8)
    for mode, product in (("packed", "w4a8"), ("decode", "decode"), ("torch", "decode")):
        with dispatch.using(mode):
            assert {dispatch.choose(m, layer, torch.bfloat16, 90).product for m in (2, 100000)} == {product}
    assert dispatch.mode == "auto"
    with pytest.raises(ValueError, match=r"'fast' is unknown; known: auto, packed"), dispatch.using("fast"):
        pass


def test_an_unknown_mode_of_the_environment_is_refused():
    code = "import quantdit.kernels.triton_ops.dispatch"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env={"QUANTDIT_KERNELS": "fast"}, timeout=900
    )
    assert done.returncode and "QUANTDIT_KERNELS = 'fast' is unknown" in done.stderr


def test_every_op_of_a_layer_has_a_kernel_on_cuda():
    for name in ops.ON_CUDA:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"quantdit::{name}", "CUDA")
        assert callable(getattr(dispatch, name))


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
