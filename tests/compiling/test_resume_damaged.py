"""A flipped bit anywhere in OUTPUT.partial: `--resume` ends with the bytes of an undamaged run, or refuses in one line."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from quantdit.calibration.layer import quantize_layers
from quantdit.compiling import quantize_blocks
from quantdit.compiling.report import REPORT
from quantdit.system import files

RECIPE = """
[[rule]]
match = "*.attn1.to_q"
weight = "auto"
[[rule]]
match = "*"
weight = "dense"
"""
FLIPS = 2  # of each file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture
def run(cli, pixel_dit: Path, folder: Path):
    (folder / "r.toml").write_text(RECIPE)

    def go(output: str, *more: object):
        where = ("--model", pixel_dit, "--recipe", folder / "r.toml", "--size-budget", "0.5", "--output", folder / output)
        return cli("calibrate", *where, "--samples", "2", "--steps", "2", *more)

    return go


@pytest.fixture
def begun(run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run interrupted in its last block, and an uninterrupted one, `whole`."""
    if not (folder / "whole").exists():
        assert run("whole").code == 0
        left = [1]  # each block has one layer

        def counted(*args, **kwargs):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return quantize_layers(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(quantize_blocks, "quantize_layers", counted)
            assert run("begun").code == 130
    return folder / "begun.partial"


def kinds(partial: Path) -> list[Path]:
    """One file of each folder and kind; blocks by their names."""
    found = {}
    for path in sorted(p.relative_to(partial) for p in partial.rglob("*") if p.is_file()):
        found.setdefault((path.parent, path.suffix, "output" in path.name), path)
    return list(found.values())


def test_flipped_bit_never_gives_other_bytes(run, begun: Path, folder: Path):
    places = kinds(begun)
    names = {str(path) for path in places}
    for part in ("identity.json", "chain.json", "calls/", "inputs/", "blocks-0/", "sensitivity/"):
        assert any(part in name for name in names), names
    wanted = files.digest(folder / "whole" / "transformer")
    layers = files.read_json(folder / "whole" / REPORT)["layers"]
    numbers, outcomes = random.Random(0), []
    for path in places:
        for _ in range(FLIPS):
            shutil.copytree(begun, folder / "x.partial", dirs_exist_ok=True)
            raw = bytearray((folder / "x.partial" / path).read_bytes())
            raw[numbers.randrange(len(raw))] ^= 1 << numbers.randrange(8)
            (folder / "x.partial" / path).write_bytes(raw)
            ran = run("x", "--resume")
            outcomes.append(ran.code)
            if ran.code == 0:
                assert files.digest(folder / "x" / "transformer") == wanted, path
                assert files.read_json(folder / "x" / REPORT)["layers"] == layers, path
                shutil.rmtree(folder / "x")
            else:
                assert str(folder / "x.partial") in ran.error and "--overwrite" in ran.error, (path, ran.error)
                shutil.rmtree(folder / "x.partial")
    assert outcomes.count(1) > len(places)


@pytest.mark.parametrize("name", ["identity.json", "work/transformer/chain.json", "work/calls/transformer/index.json"])
def test_empty_file_names_itself_and_the_way_out(run, begun: Path, folder: Path, name: str):
    shutil.copytree(begun, folder / "y.partial")
    (folder / "y.partial" / name).write_bytes(b"")
    ran = run("y", "--resume")
    assert ran.code == 1 and str(folder / "y.partial" / name) in ran.error and "--overwrite" in ran.error
    assert run("y", "--overwrite").code == 0
    assert files.digest(folder / "y" / "transformer") == files.digest(folder / "whole" / "transformer")
    shutil.rmtree(folder / "y")


@pytest.mark.parametrize("name", ["model_index.json", "scheduler/scheduler_config.json", "transformer/config.json"])
def test_changed_source_is_another_source(cli, run, pixel_dit: Path, folder: Path, begun: Path, tmp_path: Path, name: str):
    source = Path(shutil.copytree(pixel_dit, tmp_path / pixel_dit.name))
    (source / name).write_text((source / name).read_text() + "\n")
    shutil.copytree(begun, tmp_path / "z.partial")
    ran = run("../z", "--resume", "--model", source, "--output", tmp_path / "z")
    assert ran.code == 1 and "begun with another source, recipe or settings: source_config_sha256; --resume" in ran.error


def test_measurements_that_are_gone_are_refused(run, folder: Path, begun: Path):
    """The inputs of a block that is finished are gone, too, so that it cannot be measured again."""
    partial = Path(shutil.copytree(begun, folder / "gone.partial"))
    (first,) = (partial / "work" / "transformer" / "sensitivity").glob("*.0.json")
    first.unlink()
    ran = run("gone", "--resume")
    assert ran.code == 1 and "lacks the finished block" in ran.error and "--overwrite" in ran.error
