"""`quantdit bench kernels` from start to end without a GPU, so that none of it is tried on a lent one for the first time."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")

from quantdit.benchmarks import gpu_kernels, kernel_cases, kernel_report
from quantdit.benchmarks.baselines import BASELINES, Baseline
from quantdit.benchmarks.kernel_cases import Task
from quantdit.kernels.triton_ops import dispatch

HERE = Path(__file__).parent


def started(scenario: str, folder: Path) -> subprocess.Popen:
    (folder / "crossover.json").write_text(dispatch.CROSSOVER_FILE.read_text())
    command = [
        sys.executable,
        "-P",
        "-W",
        "ignore",
        HERE / "bench_on_cpu.py",
        scenario,
        folder / "k.jsonl",
        folder / "crossover.json",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "QUANTDIT_TUNE": "0"}
    environment.pop("QUANTDIT_KERNELS", None)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ran(scenario: str, folder: Path) -> tuple[list[dict], str]:
    process = started(scenario, folder)
    out, error = process.communicate(timeout=900)
    assert process.returncode == 0, out[-2000:] + error[-4000:]
    return [json.loads(line) for line in (folder / "k.jsonl").read_text().splitlines()], (folder / "k.md").read_text()


def test_every_kind_of_task_is_measured_and_the_crossover_points_are_kept(tmp_path: Path):
    rows, page = ran("all", tmp_path)
    assert not [row for row in rows if "error" in row], "an error here is one on the GPU"
    assert rows[-1]["ended"] == "Complete" and rows[-1]["left_out"] == []
    timed = {(row["task"], row["what"]) for row in rows if "us_median" in row}
    for what in ("many", "few", "ways of many", "ways of few"):
        made = kernel_cases.MAKERS[what](kernel_cases.Setting(Task(what, 20, 24, 128), "cpu"))
        assert {name for task, name in timed if task == what} == set(made)
    for row in rows:
        assert {"device", "capability", "torch", "triton", "commit", "command"} <= set(row)
        if "us_median" in row:
            assert 0 < row["us_fastest"] <= row["us_median"] and row["us_host"] > 0
            assert ("of_copy" in row) != ("times_bf16" in row)
    kept = json.loads((tmp_path / "crossover.json").read_text())
    assert kept["measured"]["90"].startswith("no GPU torch")
    for name in ("decode_from_m", "torch_from_m", "w4a16_up_to_m"):
        assert kept[name]["80"] == dispatch.CROSSOVER[name]["80"]
    assert kept["w4a16_up_to_m"]["90"] in (0, 8, 16) and kept["decode_from_m"]["90"] in (8, 24, None)
    assert "| W4A8 linear, rotation and quantization included" in page and "Complete after" in page


@pytest.mark.slow
def test_what_fails_is_a_row_and_the_rest_goes_on(tmp_path: Path):
    """One candidate raises, one is wrong, one ends the process, one hangs, one ends the process when it is timed."""
    rows, page = ran("faults", tmp_path)
    errors = {(row["task"], row["what"]): row["error"] for row in rows if "error" in row}
    assert errors == {
        ("faults", "raises"): "RuntimeError: CUDA error: an illegal memory access",
        ("faults", "wrong"): "ValueError: 3 of 3 outputs differ from the definition",
        ("faults", "stops"): "the process ended with exit code 7",
        ("faults", "hangs"): "no answer within 8 s",
        ("late", "timing"): "the process ended with exit code 9",
    }
    assert [row["task"] for row in rows if "us_median" in row] == ["faults", "right"]
    assert rows[-1]["ended"] == "Complete"
    assert "| faults | 1, 2, 3 | hangs | no answer within 8 s |" in page


def test_an_interrupted_run_leaves_its_rows_and_its_page(tmp_path: Path):
    process = started("endless", tmp_path)
    file = tmp_path / "k.jsonl"
    end = time.monotonic() + 900
    while not (file.exists() and "ceiling int8" in file.read_text()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # what `timeout` sends; Ctrl-C is the same by then
    process.communicate(timeout=900)
    assert process.returncode == 130
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[-1]["ended"] == "Interrupted" and rows[-1]["left_out"] == ["endless 1 2 3", "few 2 24 128"]
    assert "Interrupted after" in (tmp_path / "k.md").read_text()


def test_time_that_is_over_ends_the_run(tmp_path: Path):
    rows, page = ran("no time", tmp_path)
    assert rows[-1]["ended"] == "Out of time" and len(rows[-1]["left_out"]) == 6
    assert "Out of time after" in page and "not measured" in page


@pytest.mark.slow
def test_a_run_that_can_measure_nothing_ends_and_says_so(tmp_path: Path):
    process = started("nothing", tmp_path)
    _, error = process.communicate(timeout=900)
    assert process.returncode == 1 and "bench kernels measured nothing: the process ended with exit code 1" in error
    assert json.loads((tmp_path / "k.jsonl").read_text().splitlines()[-1])["ended"] == "Failed"


def test_the_plan_begins_with_what_the_targets_ask_and_reaches_every_cell():
    places = {(t.what, (t.m, t.n, t.k)): i for i, t in enumerate(gpu_kernels.PLAN)}
    assert len(places) == len(gpu_kernels.PLAN)
    for target in kernel_report.TARGETS:
        for cell in target.cells:
            assert (cell.task, cell.shape) in places
            made = kernel_cases.MAKERS[cell.task](kernel_cases.Setting(Task(cell.task, *cell.shape), "cpu"))
            assert cell.what in made
    assert (
        max(places[cell.task, cell.shape] for t in kernel_report.TARGETS for cell in t.cells if cell.task in ("many", "few")) < 6
    )
    assert gpu_kernels.LIMIT + 30 <= 480  # eight minutes, with the start and the page
    shapes = {shape for _, shape in places}
    assert {(8192, 4608, 1152), (1024, 1152, 4608), (256, 1152, 1152), (4608, 12288, 3072), (4608, 3072, 3072)} <= shapes
    assert {(m, 1536, 1536) for m in (32760, 8190)} <= shapes


def test_baselines_are_near_the_dense_product():
    """Each by the package's own code, in Triton's interpreter where it has kernels; sdnq, which is GPL, where somebody has it."""
    here = [name for name, baseline in BASELINES.items() if baseline.package != "sdnq" or importlib.util.find_spec("sdnq")]
    command = [sys.executable, "-P", "-W", "ignore", HERE / "baselines_on_cpu.py", *here]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert list(errors) == here and len(here) >= 3
    for name, error in errors.items():
        assert 0.001 < error <= BASELINES[name].error, f"{name} is off by {error:.3f}"


def test_a_package_that_is_absent_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch):
    absent = Baseline("no_such_package", 0.1, False, lambda weight: weight.T)
    monkeypatch.setattr(kernel_cases, "BASELINES", {"absent": absent})
    s = kernel_cases.Setting(Task("baselines of many", 4, 8, 64), "cpu")
    with pytest.raises(ValueError, match="no_such_package is not installed; quantdit's extra bench brings it"):
        kernel_cases.passed(kernel_cases.baseline_candidates(s, few=False)["absent"])


def timed(task: str, m: int, n: int, k: int, what: str, us: float, **more: object) -> dict:
    return {"task": task, "m": m, "n": n, "k": k, "what": what, "us_median": us} | more


def test_targets_are_judged():
    first, second = kernel_report.TARGETS[:2]
    rows = [timed("many", *shape, "linear w4a8, auto", 1.0, times_bf16=1.6) for shape in kernel_report.FEED_FORWARD]

    def judged(target: kernel_report.Target, rows: list[dict]) -> str:
        return kernel_report.verdict(target, [kernel_report.figure(rows, cell) for cell in target.cells])

    assert judged(first, rows) == "met"
    assert judged(first, rows[1:]) == "not measured"
    assert judged(first, [rows[0] | {"times_bf16": 1.4}, *rows[1:2]]) == "missed"
    others = []
    for shape in kernel_report.FEED_FORWARD[:2]:
        others.append(timed("baselines of many", *shape, "linear w4a8, auto", 100.0))
        others.append(timed("baselines of many", *shape, "torch.matmul bfloat16", 150.0))
        others.append(timed("baselines of many", *shape, "linear w8a8, auto", 90.0))  # ours
        others.append(
            {"task": "baselines of many", "what": "sdnq w8a8 int8", "error": "no"} | dict(zip("mnk", shape, strict=True))
        )
    assert judged(second, others) == "met"
    slower = timed("baselines of many", *kernel_report.FEED_FORWARD[1], "gemlite w8a8 int8", 99.0)
    assert judged(second, [*others, slower]) == "missed"


def test_crossover_points_are_of_the_least_time():
    first, second, m = "linear w4a8, packed", "linear w4a8, decode", kernel_report.MANY

    def rows(n: int, at: float) -> list[dict]:
        """The second way costs as much at every m, the first in proportion to m; they meet at `at`."""
        return [timed("ways of many", x, n, 64, what, t) for x in m for what, t in ((first, x), (second, at))]

    for at in m:
        assert kernel_report.crossovers(rows(8, at + 1)) == {"decode_from_m": next((x for x in m if x > at), None)}
    assert kernel_report.crossovers(rows(8, 300) + rows(16, 3000)) == {"decode_from_m": 1024}
    assert kernel_report.crossovers(rows(8, 300)[2:]) == {}, "a shape that was not measured at every m decides nothing"
    few = [
        timed("ways of few", x, 8, 64, what, t)
        for x in kernel_report.FEW
        for what, t in (("gemm_packed_a16", x), ("decode8 + gemm_w8a16", 40))
    ]
    assert kernel_report.crossovers(few) == {"w4a16_up_to_m": 32}
    assert kernel_report.crossovers([row | {"us_median": 1.0} for row in few]) == {"w4a16_up_to_m": kernel_report.FEW[-1]}


def test_points_that_were_not_measured_leave_the_file_alone(tmp_path: Path):
    file = tmp_path / "crossover.json"
    file.write_text(dispatch.CROSSOVER_FILE.read_text())
    with pytest.raises(ValueError, match="no crossover point was measured"):
        gpu_kernels.keep_crossover(file, {}, {})
    assert file.read_text() == dispatch.CROSSOVER_FILE.read_text()
