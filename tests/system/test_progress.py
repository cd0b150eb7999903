"""Bars: each denoising step is a tick, a pipeline's results do not change, and without a terminal there are lines."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import pytest
import torch

from quantdit.pipelines.generate import generate
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.system import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def terminal() -> Iterator[Terminal]:
    with redirect_stderr(Terminal()) as shown:
        yield shown


class Pipeline:
    pass


@pytest.mark.parametrize(("ran", "expected"), [(3, [1, 2, 3, 4, 5, 6]), (2, [1, 2, 4, 5]), (5, [1, 2, 3, 3, 3, 4, 5, 6, 6, 6])])
def test_bar_ticks_with_each_step_and_a_batch_ends_where_it_should(monkeypatch, ran: int, expected: list[int]):
    bars, seen, pipeline, make = [], [], Pipeline(), progress.bar
    monkeypatch.setattr(progress, "bar", lambda *a: bars.append(make(*a)) or bars[0])
    with terminal(), progress.denoising(pipeline, 2, 3, "x") as batch_done:
        for _ in range(2):
            with pipeline.progress_bar(total=ran) as own:
                for _ in range(ran):
                    own.update()
                    seen.append(bars[0].n)
            batch_done()
    assert seen == expected and (bars[0].n, bars[0].total) == (6, 6)


def test_pipeline_draws_the_same_and_has_its_own_bar_again(pixel_dit: Path):
    pipeline, _ = load_pipeline(str(pixel_dit))
    wanted = generate(pipeline, 2, 0, 3)
    with terminal() as shown, progress.denoising(pipeline, 1, 3, "x") as batch_done:
        got = generate(pipeline, 2, 0, 3)
        batch_done()
    assert "3/3" in shown.getvalue() and "progress_bar" not in vars(pipeline)
    assert torch.equal(got, wanted)


def test_a_pipeline_that_had_a_bar_of_its_own_has_it_again_also_when_two_are_nested():
    pipeline = Pipeline()
    with progress.denoising(pipeline, 1, 1, "outer"):
        outer = pipeline.progress_bar
        with progress.denoising(pipeline, 1, 1, "inner"):
            assert pipeline.progress_bar is not outer
        assert pipeline.progress_bar is outer
    assert not vars(pipeline)
    pipeline.progress_bar = print
    with progress.denoising(pipeline, 1, 1, "x"):
        assert pipeline.progress_bar is not print
    assert pipeline.progress_bar is print


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds that bars see, for a test to set."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("leave", "counts"), [(True, ["7 steps", "3/7 steps", "6/7 steps", "7/7 steps"]), (False, ["3/7 steps", "6/7 steps"])]
)
def test_without_a_terminal_a_bar_is_a_line_every_ten_seconds(leave: bool, counts: list[str], clock, capsys):
    with progress.bar(7, "sample", "step", leave) as shown:
        for _ in range(7):
            clock[0] += 4
            shown.update(1)
    lines = capsys.readouterr().err.split("\n")
    assert [line.partition(",")[0] for line in lines] == [*(f"quantdit: sample: {count}" for count in counts), ""]
    assert lines[-(3 if leave else 2)] == "quantdit: sample: 6/7 steps, 00:24 so far, 00:04 left"


def test_without_a_terminal_a_slow_last_step_is_said_once_and_a_quick_bar_is_one_line(clock, capsys):
    with progress.bar(1, "slow", "layer") as shown:
        clock[0] += 60
        shown.update(1)
    with progress.bar(2, "quick", "layer") as shown:
        shown.update(2)
    progress.say("loading")
    assert capsys.readouterr().err.splitlines() == [
        "quantdit: slow: 1 layer",
        "quantdit: slow: 1/1 layers, 01:00 so far, 00:00 left",
        "quantdit: quick: 2 layers",
        "quantdit: loading",
    ]


def test_commands_say_each_phase_on_stderr_alone(cli, pixel_dit: Path, tmp_path: Path):
    arguments = ("--bits", "w8a8", "--samples", "2", "--steps", "2", "--output", tmp_path / "out")
    ran = cli("calibrate", "--model", pixel_dit, *arguments)
    assert ran.code == 0 and "\r" not in ran.err + ran.out
    assert all(f"quantdit: {phase}" in ran.err.split("\n") for phase in ("sample the model: 2 steps", "quantize: 18 layers"))
    assert "sample the model" not in ran.out
