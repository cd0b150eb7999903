"""`--resume` of a run that is finished: nothing is done again, and it says so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from quantdit import compiler, files
from quantdit.compiler import REPORT
from quantdit.files import WEIGHTS
from quantdit.work_folder import STATE

RECIPE = """
[[rule]]
match = "*.attn1.to_q"
weight = "int8"
[[rule]]
match = "*"
weight = "dense"
"""


@pytest.fixture
def run(cli, pixel_dit: Path, tmp_path: Path):
    (tmp_path / "r.toml").write_text(RECIPE)

    def go(*more: object):
        where = ("--model", pixel_dit, "--recipe", tmp_path / "r.toml", "--output", tmp_path / "out")
        return cli("calibrate", *where, "--samples", "1", "--steps", "2", *more)

    return go


@pytest.fixture
def finished(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A finished run; when each of its files was written. No other work is done from here on."""
    assert run().code == 0
    monkeypatch.setattr(compiler, "sample", lambda *a: pytest.fail("work was begun again"))
    return times(tmp_path / "out")


def times(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_finished_run_is_not_done_again(run, finished, tmp_path: Path):
    ran = run("--resume")
    assert ran.code == 0, ran.err
    assert "finished already" in ran.out and "--overwrite" in ran.out and str(tmp_path / "out" / REPORT) in ran.out
    assert times(tmp_path / "out") == finished and {p.name for p in tmp_path.iterdir()} == {"out", "r.toml"}
    assert "already_finished" not in files.read_json(tmp_path / "out" / REPORT)


@pytest.mark.parametrize("other", [("--seed", "1"), ("--steps", "3"), ("--guidance", "3"), ("--tokens", "7"), ()])
def test_run_of_other_settings_is_not_taken_for_it(run, finished, tmp_path: Path, other: tuple[str, ...]):
    ran = run(*other) if not other else run("--resume", *other)
    assert ran.code == 1 and "not empty" in ran.error
    assert times(tmp_path / "out") == finished


@pytest.mark.parametrize("damage", ["no report", "weights", "report", "no weights"])
def test_damaged_result_is_not_called_finished(run, finished, tmp_path: Path, damage: str):
    weights, report = tmp_path / "out" / "transformer" / WEIGHTS, tmp_path / "out" / REPORT
    if damage == "no report":
        report.unlink()
    elif damage == "report":
        report.write_text("{")
    elif damage == "no weights":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    ran = run("--resume")
    assert ran.code == 1 and "not empty" in ran.error


def test_output_that_is_no_result_is_left_alone(run, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    ran = run("--resume")
    assert ran.code == 1 and "not empty" in ran.error and (tmp_path / "out" / "precious").exists()


def test_overwrite_does_it_again(run, tmp_path: Path):
    assert run().code == 0
    before = times(tmp_path / "out")
    digest = files.digest(tmp_path / "out" / "transformer")
    ran = run("--resume", "--overwrite")
    assert ran.code == 0 and "finished already" not in ran.out
    assert files.digest(tmp_path / "out" / "transformer") == digest and times(tmp_path / "out") != before


@pytest.fixture
def unmarked(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The result of a run that was killed while it got its name: it is there, still with its mark."""
    unlink = Path.unlink

    def kill(path: Path, **options: bool) -> None:
        if path.name == STATE:
            raise KeyboardInterrupt
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", kill)
        assert run().code == 130
    monkeypatch.setattr(compiler, "sample", lambda *a: pytest.fail("work was begun again"))
    return tmp_path / "out"


@pytest.mark.parametrize("name", ["out", "out.partial"])
def test_killed_while_it_got_its_name(run, unmarked: Path, tmp_path: Path, name: str):
    before = times(unmarked)
    shutil.move(unmarked, tmp_path / name)
    assert run("--resume").code == 0
    assert times(unmarked).items() < before.items()
    assert {p.name for p in tmp_path.iterdir()} == {"out", "r.toml"} and not (unmarked / STATE).exists()


@pytest.mark.parametrize("name", ["out", "out.partial"])
@pytest.mark.parametrize(
    "file", [f"transformer/{WEIGHTS}", "transformer/config.json", "scheduler/scheduler_config.json", REPORT, STATE]
)
def test_result_that_was_damaged_before_it_got_its_name(run, unmarked: Path, tmp_path: Path, name: str, file: str):
    raw = bytearray((unmarked / file).read_bytes())
    raw[len(raw) // 2] ^= 1
    (unmarked / file).write_bytes(raw)
    shutil.move(unmarked, tmp_path / name)
    ran = run("--resume")
    assert ran.code == 1 and str(tmp_path / name) in ran.error and "--overwrite" in ran.error
