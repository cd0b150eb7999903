"""`--resume` of a run that is finished: nothing is done again, and it says so."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from quantdit.compiling import compile as compiler
from quantdit.compiling.report import REPORT
from quantdit.compiling.work_folder import STATE
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.system import files
from quantdit.system.files import WEIGHTS

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


OTHERS = {
    ("--seed", "1"): "seed (0, now 1)",
    ("--steps", "3"): "steps (2, now 3)",
    ("--guidance", "3"): "guidance (None, now 3.0)",
    ("--tokens", "7"): "tokens (0, now 7)",
}


@pytest.mark.parametrize("other", OTHERS)
def test_run_of_other_settings_is_not_taken_for_it(run, finished, tmp_path: Path, other: tuple[str, ...]):
    ran = run("--resume", *other)
    assert ran.code == 1 and f"finished run of other settings: {OTHERS[other]}; choose another --output" in ran.error
    assert "--overwrite" in ran.error and times(tmp_path / "out") == finished
    ran = run(*other)
    assert ran.code == 1 and "not empty" in ran.error


def test_finished_run_of_another_recipe_is_not_taken_for_it(run, finished, tmp_path: Path):
    (tmp_path / "r.toml").write_text(RECIPE.replace("int8", "int6"))
    assert "of other settings: recipe; choose" in run("--resume").error
    (tmp_path / "r.toml").write_text(f'name = "mine"\n{RECIPE}')
    assert "of other settings: recipe (r, now mine); choose" in run("--resume").error
    assert times(tmp_path / "out") == finished


def test_the_last_line_counts_the_layers_that_stay_dense(run, tmp_path: Path):
    ran = run()
    quantized = len(files.read_json(tmp_path / "out" / REPORT)["layers"])
    dense = sum(type(m) is torch.nn.Linear for m in load_pipeline(str(tmp_path / "out"))[0].transformer.modules())
    assert dense and f" {quantized} layers quantized, {dense} left dense, 8." in ran.out
    (tmp_path / "r.toml").write_text('[[rule]]\nmatch = "*"\nweight = "int8"\nmethod = "rtn"\n')
    assert " layers quantized, 8." in run("--overwrite").out


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


# ---- where an output may lie


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("output", ["models", "models/dit", "models/dit/out", "part"])
def test_source_is_never_overwritten(run, pixel_dit: Path, tmp_path: Path, output: str):
    """Its parent, itself, a folder in it, a folder that a link in it leads to."""
    shutil.copytree(pixel_dit, tmp_path / "models" / "dit")
    shutil.move(tmp_path / "models" / "dit" / "transformer", tmp_path / "part")
    (tmp_path / "models" / "dit" / "transformer").symlink_to(tmp_path / "part")
    (tmp_path / "models" / REPORT).write_text('{"recipe": {}, "provenance": {}}')  # as if quantdit had written there
    before = contents(tmp_path)
    ran = run("--model", tmp_path / "models" / "dit", "--output", tmp_path / output, "--overwrite")
    assert ran.code == 1 and str(tmp_path / output) in ran.error
    assert contents(tmp_path) == before


@pytest.mark.parametrize("option", ["--recipe", "--prompts", "--weights"])
@pytest.mark.parametrize("place", ["out", "out.partial"])
def test_what_a_run_reads_is_never_overwritten(run, cli, pixel_dit: Path, tmp_path: Path, option: str, place: str):
    assert run().code == 0
    (tmp_path / "out.partial").mkdir()
    given = tmp_path / place / "mine"
    shutil.copytree(pixel_dit, given) if option == "--weights" else given.write_text(RECIPE)
    before = contents(tmp_path)
    ran = run(option, given, "--overwrite")
    assert ran.code == 1 and str(given) in ran.error and "--output" in ran.error
    assert contents(tmp_path) == before


@pytest.mark.parametrize("report", [None, "{}", "{", '{"recipe": {}}'])
def test_overwrite_replaces_only_what_quantdit_wrote(run, tmp_path: Path, report: str | None):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    if report is not None:
        (tmp_path / "out" / REPORT).write_text(report)
    before = contents(tmp_path)
    for more in ((), ("--resume",)):
        ran = run("--overwrite", *more)
        assert ran.code == 1 and "quantdit did not write" in ran.error
    assert contents(tmp_path) == before


def strip(folder: Path) -> None:
    """Make an output one of before the report listed its files."""
    report = json.loads((folder / REPORT).read_text())
    del report["files"]
    (folder / REPORT).write_text(json.dumps(report))


def test_the_report_lists_what_the_run_wrote(run, tmp_path: Path):
    assert run().code == 0
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == {*files.read_json(tmp_path / "out" / REPORT)["files"], REPORT}


@pytest.mark.parametrize(
    ("mine", "listed"),
    [
        ("notes.txt", True),
        ("pictures/deep/1.png", False),
        ("transformer/notes.md", True),
        ("scheduler/mine.txt", False),
        (".hidden", True),
        ("report.json", True),
        ("report.json", False),
        ("link", False),
        ("way/link", True),
    ],
)
def test_overwrite_keeps_a_file_of_the_users_in_a_folder_that_quantdit_wrote(run, tmp_path: Path, mine: str, listed: bool):
    assert run().code == 0
    if not listed:
        strip(tmp_path / "out")
    path = tmp_path / "out" / mine
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(tmp_path) if path.name == "link" else path.write_text("precious")
    before = contents(tmp_path)
    for more in ((), ("--resume",), ("--seed", "1")):
        ran = run("--overwrite", *more)
        assert ran.code == 1 and str(path) in ran.error and "move it away, or choose another --output" in ran.error
        assert "loading" not in ran.err
    assert contents(tmp_path) == before and os.path.lexists(path)
    path.unlink()
    assert run("--overwrite").code == 0


@pytest.mark.parametrize("listed", ["x", [3], None, ["../r.toml"]])
def test_a_list_of_files_that_is_none_lets_nothing_of_the_users_go(run, tmp_path: Path, listed: object):
    assert run().code == 0
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    (tmp_path / "out" / REPORT).write_text(json.dumps(report | {"files": listed}))
    (tmp_path / "out" / "notes.txt").write_text("x")
    assert run("--overwrite").code == 1 and (tmp_path / "out" / "notes.txt").exists()


def test_an_output_of_save_pretrained_may_be_overwritten_too(run, pixel_dit: Path, tmp_path: Path):
    """It has no report, and its weights may lie in shards."""
    import quantdit

    pipeline = quantdit.load(pixel_dit)
    quantdit.quantize(pipeline.transformer, "w8a8")
    pipeline.save_pretrained(tmp_path / "out", max_shard_size="100KB")
    assert len(list((tmp_path / "out" / "transformer").glob("*.safetensors"))) > 1
    (tmp_path / "out" / "transformer" / "notes.txt").write_text("x")
    ran = run("--overwrite")
    assert ran.code == 1 and str(tmp_path / "out" / "transformer" / "notes.txt") in ran.error
    (tmp_path / "out" / "transformer" / "notes.txt").unlink()
    assert run("--overwrite").code == 0


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_that_comes_while_the_run_works_is_not_lost(run, tmp_path: Path, monkeypatch, overwrite: bool):
    """The old output, or an empty folder, is replaced at the end: what somebody put into it meanwhile stays, the result too."""
    assert run().code == 0 if overwrite else (tmp_path / "out").mkdir() is None
    sample = compiler.sample

    def slow(*given: object) -> None:
        (tmp_path / "out" / "notes.txt").write_text("precious")
        sample(*given)

    with monkeypatch.context() as patch:
        patch.setattr(compiler, "sample", slow)
        ran = run(*(("--overwrite",) if overwrite else ()))
    assert ran.code == 1 and str(tmp_path / "out" / "notes.txt") in ran.error
    assert (tmp_path / "out" / "notes.txt").read_text() == "precious"
    shutil.move(tmp_path / "out" / "notes.txt", tmp_path / "notes.txt")
    monkeypatch.setattr(compiler, "sample", lambda *a: pytest.fail("work was begun again"))
    assert run("--resume", *(("--overwrite",) if overwrite else ())).code == 0
    assert {p.name for p in tmp_path.iterdir()} == {"out", "notes.txt", "r.toml"}


def test_link_to_an_empty_folder_is_written_through(run, tmp_path: Path):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "link").symlink_to("large disk")
    assert run("--output", f"{tmp_path / 'link'}/").code == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "large disk" / REPORT).exists()
    assert run("--output", tmp_path / "link", "--overwrite").code == 0
    assert {p.name for p in tmp_path.iterdir()} == {"link", "large disk", "r.toml"}


@pytest.mark.parametrize(
    ("name", "words"), [("dangling", "does not exist"), (".", "runs in"), ("..", "runs in"), ("x" * 250, "bytes")]
)
def test_output_that_cannot_get_its_name_is_refused_at_once(run, tmp_path: Path, monkeypatch, name: str, words: str):
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if name == "..":
        (tmp_path / REPORT).write_text('{"recipe": {}, "provenance": {}}')
    ran = run("--overwrite", "--output", name if name.startswith(".") else tmp_path / name)
    assert ran.code == 1 and words in ran.error and "empty name" not in ran.error
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("name", ["-x", "two\nlines", "模型 ü"])
def test_output_of_an_odd_name(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tmp_path)
    assert run(f"--output={name}").code == 0
    assert (tmp_path / name / REPORT).exists()
    assert "not empty" in run(f"--output={name}").error


def test_what_a_killed_run_moved_away_goes_with_the_next(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert run().code == 0

    def kill(path: object, **options: bool) -> None:
        if ".out.old-" in str(path):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", kill)
        assert run("--overwrite").code == 130
    assert any(p.name.startswith(".out.old-") for p in tmp_path.iterdir())
    assert run("--resume").code == 0
    assert {p.name for p in tmp_path.iterdir()} == {"out", "r.toml"}


# ---- what of the source comes along


@pytest.fixture
def source(pixel_dit: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pixel_dit, tmp_path / "source"))


def link(place: str, target: str):
    return lambda source: (source / place).symlink_to(target)


@pytest.mark.parametrize(
    "change",
    [
        link("round", "."),
        link("up", ".."),
        link("scheduler/round", "."),
        link("scheduler/up", ".."),
        link("passwd", "/etc/passwd"),
        link("etc", "/etc"),
        link("scheduler/outside.json", "../../r.toml"),
        link("nothing", "nowhere"),
        link("self", "self"),
        lambda source: os.mkfifo(source / "scheduler" / "fifo"),
    ],
    ids=["round", "up", "deep-round", "deep-up", "file", "folder", "beside", "nothing", "self", "fifo"],
)
def test_links_out_of_the_source_and_special_files_are_refused(run, source: Path, tmp_path: Path, change):
    change(source)
    ran = run("--model", source)
    assert ran.code == 1 and str(source) in ran.error
    assert {p.name for p in tmp_path.iterdir()} == {"source", "r.toml"}


def test_links_of_the_hub_cache_and_within_a_model_are_followed(run, source: Path, tmp_path: Path):
    repository = tmp_path / "models--who--what"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in source.rglob("*") if p.is_file())):
        blob, placed = repository / "blobs" / str(number), snapshot / path.relative_to(source)
        shutil.move(path, blob)
        placed.parent.mkdir(parents=True, exist_ok=True)
        placed.symlink_to(os.path.relpath(blob, placed.parent))
    (snapshot / "scheduler_2").symlink_to("scheduler")
    assert run("--model", snapshot).code == 0
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"model_index.json", "scheduler", "scheduler_2", "transformer", REPORT}
    assert not any(p.is_symlink() for p in out.rglob("*"))


def test_weights_that_the_pipeline_does_not_read_stay_behind(run, source: Path, tmp_path: Path):
    index = files.read_json(source / "model_index.json")
    (source / "model_index.json").write_text(json.dumps(index | {"vae": [None, None]}))
    idle = {"whole.safetensors", "old.ckpt", "vae/model.fp16.safetensors", "vae/model.bin", "original/consolidated.pth"}
    read = {"vae/model.safetensors", "vae/config.json", "tokenizer/spiece.model", "original/README.md"}
    for name in idle | read:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("x")
    ran = run("--model", source)
    assert ran.code == 0 and ran.err.count("not copied") == 1 and "old.ckpt" in ran.err and "(and 2 more)" in ran.err
    copied = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")}
    assert read <= copied and not idle & copied
