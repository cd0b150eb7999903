"""Bars: each denoising step is a tick, a pipeline's results do not change, and without a terminal there is silence."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import pytest
import torch

from quantdit.pipelines.pipeline import generate, load_pipeline
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


def test_no_terminal_no_bar(capsys: pytest.CaptureFixture[str]):
    with progress.bar(3, "x", "step") as shown:
        shown.update(1)
    progress.say("loading")
    assert capsys.readouterr().err == "quantdit: loading\n"
