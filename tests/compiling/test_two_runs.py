"""Two processes and one output: the second is refused while the first lives, and blocks of two runs never mix."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quantdit.cli import main
from quantdit.compiling import work_folder
from quantdit.compiling.report import REPORT
from quantdit.system import files

# Says when it has the lock, and keeps it until its input ends.
HOLDER = """
import sys
from pathlib import Path
from quantdit.compiling.work_folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
RECIPE = """
[[rule]]
match = "*.attn1.*"
weight = "{weight}"
activation_bits = 8
[[rule]]
match = "*"
weight = "dense"
"""


@pytest.fixture
def arguments(pixel_dit: Path, tmp_path: Path):
    def of(weight: str, *more: str) -> list[str]:
        recipe = tmp_path / f"{weight}.toml"
        recipe.write_text(RECIPE.format(weight=weight))
        where = ["--model", str(pixel_dit), "--recipe", str(recipe), "--output", str(tmp_path / "out")]
        return ["calibrate", *where, "--samples", "2", "--steps", "2", *more]

    return of


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that writes `tmp_path / out`."""
    command = [sys.executable, "-P", "-c", HOLDER, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_second_run_is_refused_while_the_first_lives(cli, arguments, holder: subprocess.Popen, tmp_path: Path):
    for more in ((), ("--resume",), ("--overwrite",)):
        ran = cli(*arguments("table4", *more))
        assert ran.code == 1 and f"process {holder.pid} is writing {tmp_path / 'out'}" in ran.error
    assert not (tmp_path / "out.partial").exists()
    # However it ends, its lock ends with it.
    holder.kill()
    holder.wait()
    assert (tmp_path / ".out.lock").exists()
    assert cli(*arguments("table4")).code == 0
    assert {p.name for p in tmp_path.iterdir()} == {"out", "table4.toml"}


def test_made_up_weights_are_of_one_run_too(cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from quantdit.models import known_models

    model = next(name for name, alias in known_models.KNOWN_MODELS.items() if alias.hub)
    with work_folder.locked(tmp_path / "out.random"):
        ran = cli("calibrate", "--model", model, "--bits", "w8a8", "--random-weights", "--output", tmp_path / "out")
    assert ran.code == 1 and f"process {os.getpid()} is writing {tmp_path / 'out.random'}" in ran.error
    assert not list(tmp_path.iterdir())


def test_output_is_locked_through_a_link(arguments, cli, holder: subprocess.Popen, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    ran = cli(*arguments("table4", "--output", str(tmp_path / "link")))
    assert ran.code == 1 and "is writing" in ran.error


def test_lock_file_that_was_removed_meanwhile_is_no_lock(tmp_path: Path):
    """The first run removes its lock file as it ends; a second that opened it before must not count as holding the new one."""
    with work_folder.locked(tmp_path / "out"):
        (tmp_path / ".out.lock").unlink()
        with work_folder.locked(tmp_path / "out"):
            assert (tmp_path / ".out.lock").read_text() == str(os.getpid())
    assert not list(tmp_path.iterdir())


def test_lock_file_that_goes_while_it_is_looked_at_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, look = tmp_path / ".out.lock", os.fstat
    removed: list[None] = []

    def remove_first(handle: int) -> os.stat_result:
        if not removed and path.exists():
            removed.append(path.unlink())
        return look(handle)

    monkeypatch.setattr(os, "fstat", remove_first)
    with work_folder.locked(tmp_path / "out"):
        assert removed and path.read_text() == str(os.getpid())


def test_blocks_of_another_run_are_not_taken(cli, arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The work folder of one run with the finished blocks of another, as two processes without a lock would leave it."""
    from quantdit.checkpoints import checkpoint

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    blocks = tmp_path / "out.partial" / "work" / "transformer" / "blocks"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_transformer", stop)
        assert cli(*arguments("int8")).code == 130
        shutil.copytree(blocks, tmp_path / "kept")
        assert cli(*arguments("table4", "--overwrite")).code == 130
    for kept in (tmp_path / "kept").glob("transformer_blocks.0.*"):
        shutil.copy(kept, blocks)
    ran = cli(*arguments("table4", "--resume"))
    assert ran.code == 1 and "transformer_blocks.0.json" in ran.error and "another run" in ran.error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_twenty_pairs_of_runs_never_mix(arguments, tmp_path: Path):
    """Whole processes, the second begun at a random moment of the first."""
    main(arguments("table4"))
    wanted = {"table4": files.digest(tmp_path / "out" / "transformer")}
    main(arguments("int8", "--overwrite"))
    wanted["int8"] = files.digest(tmp_path / "out" / "transformer")
    code = "import sys; from quantdit.cli import main; sys.exit(main(sys.argv[1:]))"

    def begin(weight: str, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-P", "-c", code, *arguments(weight, *more)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    refusals = 0
    began = time.perf_counter()
    first = begin("table4", "--overwrite")
    first.communicate()
    seconds = time.perf_counter() - began
    for number in range(20):
        first = begin("table4", "--overwrite")
        time.sleep(random.Random(number).uniform(0, 0.15) * seconds)
        second = begin("int8", "--overwrite")
        texts = first.communicate()[1], second.communicate()[1]
        refused = [
            code == 1 and "is writing" in text for code, text in zip((first.returncode, second.returncode), texts, strict=True)
        ]
        assert sum(refused) <= 1 and all(
            p.returncode == (1 if r else 0) for p, r in zip((first, second), refused, strict=True)
        ), texts
        refusals += any(refused)
        recipe = json.loads((tmp_path / "out" / REPORT).read_text())["recipe"]["rule"][0]["weight"]
        assert files.digest(tmp_path / "out" / "transformer") == wanted[recipe]
        assert not (tmp_path / "out.partial").exists() and not (tmp_path / ".out.lock").exists()
    assert refusals, "no two runs met"
