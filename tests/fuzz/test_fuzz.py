"""A slice of `make fuzz`: damaged files are refused with a message, or change nothing."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("memory and CPU time of a process are limited as Linux does it", allow_module_level=True)
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

spec = importlib.util.spec_from_file_location("fuzz_run", Path(__file__).with_name("run.py"))
fuzz_run = sys.modules.setdefault("fuzz_run", importlib.util.module_from_spec(spec))
spec.loader.exec_module(fuzz_run)

COUNT = 200


def test_damaged_files_are_refused_or_change_nothing(everything, pixel_dit: Path, tmp_path: Path) -> None:
    made = {"source": pixel_dit, "quantized": everything.folder}
    outcomes = list(fuzz_run.fuzz(tmp_path, COUNT, made=made))
    assert {o.target for o in outcomes} == fuzz_run.TARGETS.keys()
    faults = [o for o in outcomes if o.verdict == fuzz_run.FAULT]
    assert not faults, "\n".join(fuzz_run.summary(faults))


@pytest.mark.parametrize(
    ("opened", "verdict", "error"),
    [
        ("raise KeyError('x')", "FAULT", "KeyError"),
        ("raise ValueError('say what to do')", "refused", "ValueError"),
        ("raise ValueError", "FAULT", "ValueError"),
        ("return 'another'", "FAULT", "another result"),
        ("return 'whole'", "same", ""),
        ("os.abort()", "FAULT", "crash: SIGABRT"),
        ("return bytearray(600 * 2**20) and 'whole'", "FAULT", "over-allocation"),
        ("return bytearray(2**40)", "FAULT", "over-allocation"),
        ("sum(range(10**12))", "FAULT", "hang"),
        ("open(folder.parents[1] / 'pipe')", "FAULT", "hang"),
    ],
)
def test_every_kind_of_fault_is_seen(tmp_path: Path, monkeypatch, opened: str, verdict: str, error: str) -> None:
    scope: dict = {"os": os}
    exec(f"def open_it(folder):\n    {opened}", scope)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.json").write_text('{"a": [1, 2]}')
    os.mkfifo(tmp_path / "pipe")
    target = fuzz_run.Target("made-up", "files", ("*.json",), scope["open_it"])
    monkeypatch.setitem(fuzz_run.TARGETS, "made-up", target)
    monkeypatch.setattr(fuzz_run, "CPU_SECONDS", 1.0 if error == "hang" else 20.0)  # pages may come slowly
    monkeypatch.setattr(fuzz_run, "STILL_SECONDS", 0.5)
    numbers = range(1 if error == "hang" else 2)  # one more begins after a crash
    found = list(fuzz_run.batch("made-up", numbers, 0, tmp_path, "whole"))
    assert [(o.number, o.verdict, o.error) for o in found] == [(number, verdict, error) for number in numbers]
    assert all(o.mutation.startswith("a.json: ") for o in found)
