"""Calibrations really killed (SIGKILL) go on with `--resume` and end with the bytes of an uninterrupted run."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from quantdit.cli import main
from quantdit.compiling.report import REPORT
from quantdit.system import files

# Attention layers with everything that is seeded; more blocks than a killed run gets through.
RECIPE = """
[[rule]]
match = "*.attn1.*"
weight = "table4"
activation_bits = 8
[[rule]]
match = "*"
weight = "dense"
"""
# Counts the renames of a run, and ends it without warning just before or after the one of this number.
KILLER = """
import os, signal, sys
real, left = os.replace, {number}
def replace(source, target):
    global left
    left -= 1
    if left == 0 and {before}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
from quantdit.cli import main
main({arguments!r})
"""


@pytest.fixture(scope="module")
def fresh():
    """Processes that begin with everything imported and nothing computed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["quantdit.cli", "quantdit.compiling.compile", "quantdit.pipelines.pipeline", "diffusers", "accelerate"]
    )
    return context


@pytest.fixture(scope="module")
def work(pixel_dit: Path, tmp_path_factory: pytest.TempPathFactory):
    """A folder with the recipe and an uninterrupted run; the arguments of a run."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "recipe.toml").write_text(RECIPE)

    def arguments(output: str) -> list[str]:
        where = ["--model", str(pixel_dit), "--recipe", str(folder / "recipe.toml"), "--output", str(folder / output)]
        return ["calibrate", *where, "--samples", "4", "--steps", "4", "--seed", "3"]

    began = time.perf_counter()
    assert main(arguments("whole")) == 0
    return folder, arguments, time.perf_counter() - began


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (folder / "transformer").iterdir()}


def check_resumed(folder: Path, output: str, arguments: list[str]) -> None:
    """Go on with a killed run and compare what comes of it with the uninterrupted one."""
    assert main([*arguments, "--resume"]) == 0
    assert digests(folder / output) == digests(folder / "whole")
    reports = [files.read_json(folder / name / REPORT) for name in (output, "whole")]
    for key in ("layers", "size", "model_rel_rmse", "sha256"):
        assert json.dumps(reports[0][key]) == json.dumps(reports[1][key])
    assert {p.name for p in (folder / output).iterdir()} == {p.name for p in (folder / "whole").iterdir()}
    assert not (folder / f"{output}.partial").exists()
    shutil.rmtree(folder / output)


@pytest.mark.parametrize("moment", range(3))
def test_killed_at_a_random_moment(fresh, work, moment: int):
    folder, arguments, seconds = work
    process = fresh.Process(target=main, args=(arguments(f"random{moment}"),))
    process.start()
    process.join(random.Random(moment).uniform(0.02, 1.0) * seconds)
    process.kill()
    process.join()
    check_resumed(folder, f"random{moment}", arguments(f"random{moment}"))


# The renames of this run: identity, calls, chain, inputs; of each of two blocks its tensors, its report and the inputs of the
# next; weights, config, report, finished, the name. One more is never reached.
@pytest.mark.parametrize("number", range(1, 17))
def test_killed_around_a_rename(fresh, work, number: int):
    folder, arguments, _ = work
    output = f"rename{number}"
    code = KILLER.format(number=number, before=bool(number % 2), arguments=arguments(output))
    process = fresh.Process(target=exec, args=(code, {}))
    process.start()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if number <= 15 else 0)
    if process.exitcode == 0:
        assert digests(folder / output) == digests(folder / "whole")
        return
    check_resumed(folder, output, arguments(output))
