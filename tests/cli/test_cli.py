"""The command line: exit codes, one clear line for a user's error, pictures that depend on the seed alone."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import quantdit
from laws import LAW
from quantdit.checkpoints.checkpoint import quant_layers
from quantdit.cli import command_line, options
from quantdit.compiling.report import REPORT
from quantdit.models.known_models import KNOWN_MODELS
from quantdit.pipelines.generate import generate
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.system import files
from quantdit.system.optional_import import install

COMMANDS = ("models", "calibrate", "generate", "inspect", "evaluate")
QUICK = ("--steps", "2", "--count", "3", "--columns", "3")


# ---- help and usage


@pytest.mark.parametrize("command", [(), *((c,) for c in COMMANDS)], ids=lambda c: c[0] if c else "quantdit")
def test_help_has_an_example_that_parses(cli, command: tuple[str, ...]):
    ran = cli(*command, "--help")
    assert ran.code == 0 and not ran.err
    examples = re.findall(r"^  quantdit (.+)$", ran.out.partition("example")[2], re.MULTILINE)
    assert examples
    for example in examples:
        parsed = command_line.command_parser().parse_args(example.split())
        assert callable(parsed.run)
    if command:
        assert all(example.split()[0] == command[0] for example in examples)
    else:
        assert {example.split()[0] for example in examples} == set(COMMANDS)
        assert all(name in ran.out.partition("examples")[0] for name in COMMANDS)


def test_version(cli):
    ran = cli("--version")
    assert (ran.code, ran.out.strip()) == (0, f"quantdit {__import__('quantdit').__version__}")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("comply",),
        ("calibrate",),
        ("calibrate", "--model", "x", "--output", "y"),
        ("calibrate", "--model", "x", "--output", "y", "--bits", "w4a8", "--recipe", "r.toml"),
        ("calibrate", "--bits", "w4a8", "--output", "y"),
        ("calibrate", "--model", "x", "--bits", "w4a8", "--output", "y", "--samples", "-1"),
        ("calibrate", "--model", "x", "--bits", "w4a8", "--output", "y", "--steps", "-1"),
        ("calibrate", "--model", "x", "--bits", "w4a8", "--output", "y", "--steps", "many"),
        ("calibrate", "--model", "x", "--bits", "w4a8", "--output", "y", "--seed", "1.5"),
        ("calibrate", "--model", "x", "--bits", "w4a8", "--output", "y", "--frobnicate"),
        ("generate", "x"),
        ("generate", "x", "--output", "y.png", "--count", "0"),
        ("generate", "x", "--output", "y.png", "--columns", "0"),
        ("inspect",),
        ("evaluate", "x"),
    ],
)
def test_wrong_usage_is_2(cli, arguments: tuple[str, ...]):
    ran = cli(*arguments)
    assert ran.code == 2 and re.search(r"; see quantdit( \w+)? --help$", ran.error) and not ran.out
    assert ran.err.count("\n") == 1 and " invalid _" not in ran.error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("comply",), ("'comply'", "calibrate", "see quantdit --help")),
        (("evalute", "x", "y"), ("did you mean evaluate?",)),
        (("export", "x", "--to", "onxx", "--output", "y"), ("--to", "'onxx' (did you mean onnx?)", "dense, comfyui, onnx")),
        (("inspect", "x", "--by", "7"), ("'7'; choose from role, block; see quantdit inspect --help",)),
        (("generate", "x", "--outptu", "y.png"), ("unknown option --outptu (did you mean --output?); see quantdit generate",)),
        (("generate", "x", "--output=y.png", "--promt=a b"), ("did you mean --prompt?",)),
        (("generate", "x", "--output=y.png", "--promt", "a b"), ("--promt (did you mean --prompt?)",)),
        (("inspect", "x", "y"), ("unrecognized arguments: y; see quantdit inspect --help",)),
        (("--versoin",), ("did you mean --version?",)),
        (("calibrate", "--model", "x", "--bits", "w4a8", "--out", "y"), ("unknown option --out ",)),
        (("calibrate", "--model", "x", "--bits", "w4a8", "--size-budget", "many"), ("--size-budget: must be a number",)),
        (("inspect", "x", "--a\nb"), ("unknown option --a b",)),
    ],
    ids=str,
)
def test_wrong_usage_is_one_line_that_names_what_was_meant(cli, arguments: tuple[str, ...], words: tuple[str, ...]):
    ran = cli(*arguments)
    assert ran.code == 2 and all(word in ran.error for word in words), ran.err
    assert ran.err.count("\n") == 1


def test_text_that_begins_like_an_option_is_text():
    parsed = command_line.command_parser().parse_args(["generate", "x", "--output", "y.png", "--prompt", "--a fox=", "b"])
    assert parsed.prompt == ["--a fox=", "b"]


def test_traceback_only_on_request(cli):
    arguments = ("calibrate", "--model", "x", "--bits", "w5a8", "--output", "y")
    assert "Traceback" not in cli(*arguments).err
    ran = cli(*arguments, "--traceback")
    assert ran.code == 1 and "Traceback" in ran.err and "quantdit: error: " in ran.err


def test_console_script_is_this_function():
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="quantdit")
    assert script.load() is command_line.main


def test_usage_error_reaches_the_shell():
    """The one start as a process: the console script, as users start it."""
    script = Path(sys.executable).with_name("quantdit")
    if not script.exists():
        pytest.skip("installed without its console script")
    done = subprocess.run([script, "calibrate"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 2 and "see quantdit calibrate --help" in done.stderr


PATHS = (
    ("calibrate", "--model", "", "--bits", "w4a8"),
    ("calibrate", "--model", "x", "--recipe", ""),
    *(("calibrate", "--model", "x", "--bits", "w4a8", option, "") for option in ("--output", "--weights", "--prompts")),
    ("generate", "", "--output", "x.png"),
    *(("generate", "x", "--output", "x.png", option, "") for option in ("--output", "--prompts", "--onnx")),
    ("inspect", ""),
    ("inspect", "x", "--plot", ""),
    ("evaluate", "", "x", "--output", "y"),
    ("evaluate", "x", "", "--output", "y"),
    *(
        ("evaluate", "x", "y", "--output", "z", option, "")
        for option in (
            "--output", "--prompts", "--cache", "--real", "--inception-weights", "--clip-weights", "--vbench", "--vbench-weights",
        )
    ),
    ("gate", "", "--baseline", "x"),
    ("gate", "x", "--baseline", ""),
    ("gate", "x", "--baseline", "y", "--summary", ""),
    ("export", "", "--to", "dense", "--output", "x"),
    ("export", "x", "--to", "dense", "--output", ""),
    ("bench", "cpu", "--output", ""),
)  # fmt: skip


@pytest.mark.parametrize("arguments", PATHS, ids=" ".join)
def test_an_empty_path_is_not_the_folder_one_is_in(cli, tmp_path: Path, monkeypatch, arguments: tuple[str, ...]):
    monkeypatch.chdir(tmp_path)
    ran = cli(*arguments)
    assert ran.code == 2 and "is empty; . is the folder that you are in" in ran.err
    assert not list(tmp_path.iterdir())


def test_every_option_that_is_a_path_is_tried_empty():
    """PATHS is the whole list: what a new option takes as a path belongs there."""
    (commands,) = (a for a in command_line.command_parser()._actions if a.choices and "calibrate" in a.choices)
    paths = {options.path, options.model_name}
    for name, parser in commands.choices.items():
        given = [(a.option_strings or [None])[0] for a in parser._actions if a.type in paths]
        tried = [arguments[arguments.index("") - 1] for arguments in PATHS if arguments[0] == name]
        assert {option for option in given if option} <= set(tried), name
        assert not [a.dest for a in parser._actions if a.type is Path]


# ---- models that cannot be had


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("fashion-dot", ["'fashion-dot'", "did you mean fashion-dit?"]),
        ("Fashion-DiT", ["'Fashion-DiT'", "fashion-dit"]),
        ("wan1.3b", ["'wan1.3b'", "wan-1.3b"]),
        ("zzz", ["'zzz'", "known names", *KNOWN_MODELS]),
        ("./nowhere", ["'./nowhere'"]),
        ("a/b/c", ["'a/b/c'"]),
        ("~nobody-of-this-name/model", ["'~nobody-of-this-name/model'"]),
        ("x" * 5000, []),
    ],
)
@pytest.mark.parametrize("command", ["calibrate", "generate"])
def test_unknown_model_names_near_matches(cli, tmp_path: Path, command: str, model: str, words: list[str]):
    output = ("--output", tmp_path / "out.png")
    ran = (
        cli("calibrate", "--model", model, "--bits", "w4a8", *output) if command == "calibrate" else cli(command, model, *output)
    )
    assert ran.code == 1 and (command == "generate" or "loading" not in ran.err)
    for word in words:
        assert word in ran.error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", ["w5a8", "w4", ""])
def test_unknown_bits_name_near_matches(cli, tmp_path: Path, pixel_dit: Path, bits: str):
    ran = cli("calibrate", "--model", pixel_dit, "--bits", bits, "--output", tmp_path / "out")
    assert ran.code == 1 and "w4a8" in ran.error and repr(bits) in ran.error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", ["4", "w4", "int4", "4bit", "4-bit", "W4", "nf4", "4 bits"])
def test_bits_of_weights_alone_suggest_the_preset(cli, pixel_dit: Path, tmp_path: Path, bits: str):
    ran = cli("calibrate", "--model", pixel_dit, "--bits", bits, "--output", tmp_path / "out")
    assert ran.code == 1 and "did you mean w4a16, weights alone, or w4a8" in ran.error


def test_what_calibrate_refuses_it_refuses_before_it_loads_anything(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("quantdit.pipelines.pipeline.load_pipeline", lambda *a, **b: pytest.fail("it loaded the model"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    (tmp_path / "bad.toml").write_text("[[rule]]\nmatch = 3\n")
    (tmp_path / "empty.txt").touch()
    of, new = ("calibrate", "--model"), ("--output", tmp_path / "out")
    for arguments, words in (
        ((*of, "fashion-dit", "--bits", "w4", *new), "did you mean"),
        ((*of, "fashion-dit", "--recipe", tmp_path / "bad.toml", *new), "bad.toml"),
        ((*of, "fashion-dit", "--recipe", tmp_path / "none.toml", *new), "none.toml"),
        ((*of, "fashion-dit", "--bits", "w4a8", "--output", tmp_path / "full"), "is not empty"),
        ((*of, "fashion-dit", "--bits", "w4a8", "--prompts", tmp_path / "empty.txt", *new), "holds no prompt"),
        ((*of, "fashion-dit", "--bits", "w4a8", "--size-budget", "3", *new), "a size budget is"),
        ((*of, "fashion-dot", "--bits", "w4a8", *new), "did you mean fashion-dit"),
    ):
        ran = cli(*arguments)
        assert ran.code == 1 and words in ran.error and "loading" not in ran.err, arguments
    assert not (tmp_path / "out").exists()


MARK = b"\xef\xbb\xbf"


ENDS = st.sampled_from(["\n", "\r\n", "\r"])
PROMPT = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n")).filter(lambda text: text.strip())


@LAW
@hypothesis.given(st.lists(PROMPT, min_size=1), ENDS, st.sampled_from([b"", MARK]), st.booleans())
@hypothesis.example(["a fox\u2028in the snow", "模型\x0b\x0c\x1c\x85", "last"], "\n", b"", True)
def test_prompts_end_at_line_ends_alone(tmp_path_factory, texts: list[str], end: str, mark: bytes, closed: bool):
    """Any text but line ends, which every system may write its way; empty lines are none."""
    hypothesis.assume(mark or not texts[0].startswith("\ufeff"))
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_bytes(mark + end.join([*texts, "", texts[0], ""] if closed else texts).encode())
    assert options.read_prompts(path) == texts + texts[:1] * closed


@pytest.mark.parametrize("start", [b"", MARK])
def test_recipe_as_windows_saves_it(cli, tmp_path: Path, pixel_dit: Path, start: bytes):
    text = '[[rule]]\nmatch = "*.attn1.to_q"\nweight = "int8"\n[[rule]]\nmatch = "*"\nweight = "dense"\n'
    (tmp_path / "r.toml").write_bytes(start + text.replace("\n", "\r\n").encode())
    where = ("--model", pixel_dit, "--recipe", tmp_path / "r.toml", "--output", tmp_path / "out")
    assert cli("calibrate", *where, "--samples", "0").code == 0


@pytest.mark.parametrize("raw", ["grün".encode("latin-1"), "a fox".encode("utf-16"), "a fox".encode("utf-16-le")])
@pytest.mark.parametrize("option", ["--prompts", "--recipe"])
def test_text_of_another_encoding_is_refused(cli, tmp_path: Path, pixel_dit: Path, option: str, raw: bytes):
    (tmp_path / "text").write_bytes(raw)
    how = () if option == "--recipe" else ("--bits", "w8a8")
    ran = cli("calibrate", "--model", pixel_dit, *how, option, tmp_path / "text", "--output", tmp_path / "out")
    assert ran.code == 1 and f"{tmp_path / 'text'} is not UTF-8 text" in ran.error
    assert not (tmp_path / "out.partial").exists()


def test_a_file_that_cannot_be_read_is_named_and_not_the_output(cli, tmp_path: Path, pixel_dit: Path):
    (tmp_path / "file").write_text("a fox")
    below, output = tmp_path / "file" / "prompts.txt", tmp_path / "out"
    ran = cli("calibrate", "--model", pixel_dit, "--bits", "w8a8", "--prompts", below, "--output", output)
    assert ran.code == 1 and f"cannot open {below}: Not a directory" in ran.error
    ran = cli("calibrate", "--model", pixel_dit, "--bits", "w8a8", "--output", tmp_path / "file" / "out")
    assert ran.code == 1 and f"cannot write {tmp_path / 'file' / 'out'}: a part of the path is a file" in ran.error


def test_reader_that_leaves_is_no_error(pixel_dit: Path, tmp_path: Path):
    """As `quantdit ... | head -c 0`: the pipe is closed before anything is printed."""
    code = "import sys; from quantdit.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["calibrate", "--model", pixel_dit, "--bits", "w8a8", "--samples", "0", "--output", tmp_path / "out"]
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        printed = process.stderr.read()
    assert process.returncode == 0 and (tmp_path / "out" / REPORT).exists()
    assert "Broken pipe" not in printed and "Traceback" not in printed and "BrokenPipeError" not in printed


def test_recipe_errors_are_one_line(cli, tmp_path: Path, pixel_dit: Path):
    arguments = ("calibrate", "--model", pixel_dit, "--output", tmp_path / "out", "--recipe")
    ran = cli(*arguments, tmp_path / "missing.toml")
    assert ran.code == 1 and "missing.toml" in ran.error
    ran = cli(*arguments, tmp_path)
    assert ran.code == 1 and str(tmp_path) in ran.error
    (tmp_path / "bad.toml").write_text("[[rule]]\nmatch = '*.to_k'\n[[rule]]\nmatch = '*.to_kk'\n")
    ran = cli(*arguments, tmp_path / "bad.toml")
    assert ran.code == 1 and "rule 2" in ran.error and "'*.to_kk'" in ran.error


HUB = "facebook/DiT-XL-2-256"


def explains_the_hub(error: str) -> bool:
    """What to download, where to put it, how to name it then."""
    return all(word in error for word in (HUB, f"hf download {HUB}", "--local-dir DiT-XL-2-256", "--model", "/DiT-XL-2-256"))


@pytest.mark.parametrize("model", [HUB, "dit-xl-2-256"])
def test_hub_model_without_network(cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str):
    """The real path of huggingface_hub, which conftest.py has put offline, with nothing in its cache."""
    import huggingface_hub

    assert huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    ran = cli("calibrate", "--model", model, "--bits", "w4a8", "--output", tmp_path / "out")
    assert ran.code == 1 and explains_the_hub(ran.error)
    assert not (tmp_path / "out").exists()


def hub_errors() -> list[Exception]:
    """What huggingface_hub lets out when it meets no network, a proxy that does not answer, or no such repository."""
    import huggingface_hub.errors as errors

    found: list[Exception] = [
        errors.LocalEntryNotFoundError("An error happened while trying to locate the files on the Hub"),
        errors.OfflineModeIsEnabled("Cannot reach the Hub"),
        ConnectionError("Network is unreachable"),
    ]
    for name in ("httpx", "httpx2"):  # which one depends on the version of huggingface_hub
        if name in sys.modules:
            http = sys.modules[name]
            found += [
                http.ProxyError("502 Bad Gateway"),
                http.ReadTimeout("timed out"),
                http.ConnectError("[Errno -2] Name unknown"),
            ]
    return found


def test_every_way_to_miss_the_network_is_explained(cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import huggingface_hub

    for error in hub_errors():

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        ran = cli("generate", HUB, "--output", tmp_path / "x.png")
        assert ran.code == 1 and explains_the_hub(ran.error)


def test_hub_model_that_was_fetched_goes_on_like_a_folder(cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pixel_dit: Path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda hub, **options: str(pixel_dit))
    for model, name in (("someone/tiny", "a.png"), (pixel_dit, "b.png")):
        assert cli("generate", model, "--output", tmp_path / name, *QUICK).code == 0


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _index(**values: object):
    def change(folder: Path) -> None:
        path = folder / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


@pytest.mark.parametrize(
    "damage",
    [
        _empty,
        lambda f: [(f / name).unlink() for name in ("model_index.json", "transformer/config.json")],
        lambda f: (f / "model_index.json").write_text("{"),
        lambda f: (f / "model_index.json").write_text("[]"),
        lambda f: (f / "model_index.json").write_text("{}"),
        lambda f: shutil.rmtree(f / "transformer"),
        lambda f: (f / "transformer" / "config.json").unlink(),
        lambda f: (f / "transformer" / "config.json").write_text("{}"),
        lambda f: (f / "transformer" / files.WEIGHTS).unlink(),
        lambda f: (f / "transformer" / files.WEIGHTS).write_bytes(b"x" * 100),
        lambda f: shutil.rmtree(f / "scheduler"),
        _index(_class_name="FutureDiTPipeline"),
        _index(_class_name="__version__"),
        _index(_class_name="logging"),
        _index(_class_name="AutoencoderKL"),
        _index(_class_name=3),
        _index(transformer=["diffusers", "FutureTransformer2DModel"]),
        _index(transformer=["os", "system"]),
        _index(transformer=3),
    ],
    ids=[
        "empty", "nothing-known", "index-cut", "index-list", "index-empty",
        "no-transformer", "no-config", "config-empty", "no-weights", "weights-garbage", "no-scheduler",
        "future-class", "class-string", "class-module", "class-model", "class-number",
        "future-transformer", "foreign-transformer", "transformer-number",
    ],
)  # fmt: skip
def test_folder_that_is_no_usable_pipeline_is_one_line(cli, tmp_path: Path, pixel_dit: Path, damage):
    model = Path(shutil.copytree(pixel_dit, tmp_path / "model"))
    damage(model)
    ran = cli("calibrate", "--model", model, "--bits", "w4a8", "--output", tmp_path / "out")
    assert ran.code == 1 and str(model) in ran.error
    assert not (tmp_path / "out").exists()


def test_pipeline_without_a_transformer(cli, tmp_path: Path, pixel_dit: Path):
    model = Path(shutil.copytree(pixel_dit, tmp_path / "model"))
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline", "unet": index["transformer"]}))
    ran = cli("calibrate", "--model", model, "--bits", "w4a8", "--output", tmp_path / "out")
    assert ran.code == 1 and "DDPMPipeline has no transformer" in ran.error


def test_pickled_source_weights_are_not_read(cli, tmp_path: Path, pixel_dit: Path):
    model = Path(shutil.copytree(pixel_dit, tmp_path / "model"))
    weights = model / "transformer" / files.WEIGHTS
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    ran = cli("generate", model, "--output", tmp_path / "x.png", *QUICK)
    assert ran.code == 1 and str(model) in ran.error and "safetensors" in ran.error


def test_file_in_place_of_a_folder(cli, tmp_path: Path):
    (tmp_path / "model.safetensors").write_text("x")
    ran = cli("generate", tmp_path / "model.safetensors", "--output", tmp_path / "x.png")
    assert ran.code == 1 and "is a file" in ran.error


def test_damaged_checkpoint_is_one_line(cli, copied: Path, tmp_path: Path):
    weights = copied / "transformer" / files.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    for arguments in (("inspect", copied), ("generate", copied, "--output", tmp_path / "x.png")):
        ran = cli(*arguments)
        assert ran.code == 1 and str(weights) in ran.error
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "nonsense", ""])
def test_device_that_is_not_there_is_one_line(cli, pixel_dit: Path, tmp_path: Path, device: str):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    ran = cli("generate", pixel_dit, "--device", device, "--output", tmp_path / "x.png", *QUICK)
    assert ran.code == 1 and f"device {device!r} is not available" in ran.error
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("seed", [2**31, 2**63, -(2**63), -5])
def test_a_seed_that_no_generator_takes_is_wrong_usage(cli, tmp_path: Path, seed: int):
    for command in (("calibrate", "--model", "x", "--bits", "w8a8"), ("generate", "x")):
        ran = cli(*command, f"--seed={seed}", "--output", tmp_path / "out.png")
        assert ran.code == 2 and f"a seed lies in 0..2147483647, got {seed}" in ran.error


# ---- models


def test_models_prints_the_table(cli):
    ran = cli("models")
    assert ran.code == 0 and not ran.err
    table, _, captured = ran.out.partition("\n\n")
    lines = table.splitlines()
    assert len(lines) == 1 + len(KNOWN_MODELS)
    for line, (name, alias) in zip(lines[1:], KNOWN_MODELS.items(), strict=True):
        assert line.startswith(name) and alias.transformer in line and alias.parameters in line
        assert ("yes" if not alias.hub else alias.hub) in line
        assert line.index(alias.transformer) == lines[0].index("transformer"), "columns are aligned"
    title, _, *lines = captured.splitlines()
    assert "quantdit calibrate samples" in title
    for line, (name, alias) in zip(lines, KNOWN_MODELS.items(), strict=True):
        assert line.startswith(name), "what `calibrate --help` says that this shows"
        for known in (alias.cpu, alias.gpu):
            steps = f"{known.timesteps} of {known.steps}" if known.timesteps else f"{known.steps}"
            assert f"{known.samples} samples, {steps} steps, guidance {known.guidance:g}, " in line
            assert f"{known.width}x{known.height}" in line and (known.frames == 1 or f"{known.frames} frames" in line)
    columns = {words[0]: words[1:] for line in lines if (words := re.split(" {2,}", line))}
    assert columns["emoji-wan"] == ["32 samples, 20 steps, guidance 3, 16 frames of 32x32"] * 2


def test_known_models_are_classes_of_the_installed_diffusers():
    import diffusers

    for alias in KNOWN_MODELS.values():
        assert inspect.isclass(getattr(diffusers, alias.transformer))
        if alias.hub:
            assert inspect.isclass(getattr(diffusers, alias.pipeline))


# ---- generate


def test_same_seed_same_picture_other_seed_another(cli, pixel_dit: Path, tmp_path: Path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        ran = cli("generate", pixel_dit, "--seed", seed, "--output", tmp_path / f"{name}.png", *QUICK)
        assert ran.code == 0 and ran.out.strip().endswith(f"{name}.png")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert Image.open(tmp_path / "a.png").format == "PNG"


def test_picture_of_a_quantized_folder(cli, everything, tmp_path: Path):
    for name in "ab":
        assert cli("generate", everything.folder, "--output", tmp_path / f"deep/er/{name}.png", *QUICK).code == 0
    assert (tmp_path / "deep/er/a.png").read_bytes() == (tmp_path / "deep/er/b.png").read_bytes()


@pytest.mark.parametrize("model", ["pixel_dit", "plain_dit"])
def test_image_does_not_depend_on_its_batch(request: pytest.FixtureRequest, model: str):
    pipeline, _ = load_pipeline(str(request.getfixturevalue(model)))
    classes = [0, 1, 2]
    alone, together, more = (
        generate(pipeline, count, 3, 2, batch=batch, classes=classes) for count, batch in ((5, 1), (5, 5), (7, 4))
    )
    assert together.dtype == torch.float32 and together.min() >= -1 and together.max() <= 1
    # Sums of products are rounded in another order; a fiftieth of an 8-bit step of the picture bounds it amply.
    assert torch.allclose(alone, together, atol=2 / 255 / 50, rtol=0)
    assert torch.allclose(more[:5], together, atol=2 / 255 / 50, rtol=0)
    others = torch.stack([(together[i] - together[j]).abs().max() for i in range(5) for j in range(i)])
    assert others.min() > 2 / 255, "every image has a noise of its own"


def test_seeds_do_not_overlap(pixel_dit: Path):
    """Image i of one seed is no image of the next seed."""
    pipeline, _ = load_pipeline(str(pixel_dit))
    a, b = (generate(pipeline, 4, seed, 1, classes=[1]) for seed in (0, 1))
    assert not any(torch.equal(x, y) for x in a for y in b)


def test_generation_leaves_the_global_generator_alone(pixel_dit: Path):
    pipeline, _ = load_pipeline(str(pixel_dit))
    torch.manual_seed(11)
    before = torch.get_rng_state()
    generate(pipeline, 2, 0, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_classes_are_drawn_in_turn(pixel_dit: Path):
    pipeline, _ = load_pipeline(str(pixel_dit))
    seen = []
    pipeline.transformer.register_forward_pre_hook(lambda m, a, k: seen.append(k["class_labels"].tolist()), with_kwargs=True)
    generate(pipeline, 5, 0, 1, classes=[2, 0])
    generate(pipeline, 7, 0, 1)
    assert seen[0][:5] == [2, 0, 2, 0, 2]
    assert set(seen[1][:7]) == {0, 1, 2}
    assert set(seen[1][7:]) == {3}, "the unconditional half"


@pytest.mark.parametrize("model", ["pixel_dit", "plain_dit"])
@pytest.mark.parametrize("label", [3000, -1])
def test_class_out_of_range_is_one_line(cli, request: pytest.FixtureRequest, tmp_path: Path, model: str, label: int):
    ran = cli("generate", request.getfixturevalue(model), f"--classes={label}", "--output", tmp_path / "x.png", *QUICK)
    assert ran.code == 1 and str(label) in ran.error and "class" in ran.error
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("model", ["pixel_dit", "plain_dit"])
def test_prompts_for_a_model_of_classes_are_not_ignored(cli, request: pytest.FixtureRequest, tmp_path: Path, model: str):
    (tmp_path / "prompts.txt").write_text("a red bicycle\n")
    for option, given in (("--prompts", tmp_path / "prompts.txt"), ("--prompt", "a red bicycle")):
        ran = cli("generate", request.getfixturevalue(model), option, given, "--output", tmp_path / "x.png", *QUICK)
        assert ran.code == 1 and ran.error.endswith(f"leave out {option}")


def test_python_refuses_unknown_options_and_no_samples_by_name(everything, pixel_dit: Path, tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"^evaluate has no option 'step'; did you mean steps\?$"):
        quantdit.evaluate(pixel_dit, everything.folder, out, step=4)
    with pytest.raises(ValueError, match="evaluate has no option 'sampling'"):
        quantdit.evaluate(pixel_dit, everything.folder, out, sampling=4)
    with pytest.raises(ValueError, match=r"^generate has no option 'column'; did you mean columns\?$"):
        quantdit.generate(pixel_dit, out / "x.png", column=3)
    with pytest.raises(ValueError, match=r"^export to dense has no option 'storage'; it has dtype, accept_config$"):
        quantdit.export(everything.folder, "dense", out, storage="int8")
    for name in ("samples", "columns"):
        with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
            quantdit.generate(pixel_dit, out / "x.png", **{name: 0}, steps=1)
    with pytest.raises(ValueError, match=r"^quantize has no option 'finetune_step'; did you mean finetune_steps\?$"):
        quantdit.quantize(None, "w4a8", finetune_step=0)
    with pytest.raises(ValueError, match=r"^load has no option 'accept_configs'; did you mean accept_config\?$"):
        quantdit.load(pixel_dit, accept_configs=True)
    assert not out.exists()


SAMPLED = ("samples", "steps", "batch", "height", "width", "frames")  # whole numbers of at least 1
BELOW = dict.fromkeys((*SAMPLED, "columns", "seeds", "probes"), 0) | {"seed": -1, "tokens": -1, "finetune_steps": -1}


@pytest.mark.parametrize(
    ("function", "names"),
    [
        ("evaluate", (*SAMPLED, "seed", "guidance", "seeds", "probes")),
        ("generate", (*SAMPLED, "seed", "guidance", "columns")),
        ("quantize", ("seed", "tokens", "finetune_steps")),
    ],
)
def test_python_refuses_what_is_no_number_by_its_name(pixel_dit: Path, tmp_path: Path, function: str, names: tuple[str, ...]):
    given = {
        "evaluate": (pixel_dit, pixel_dit, tmp_path),
        "generate": (pixel_dit, tmp_path / "x.png"),
        "quantize": (None, "w4a8"),
    }
    for name in names:
        kind = "finite" if name == "guidance" else "whole"
        for wrong in ("4", True, [4], float("nan"), *((4.5,) if kind == "whole" else (float("inf"),))):
            with pytest.raises(ValueError) as refused:
                getattr(quantdit, function)(*given[function], **{name: wrong})
            assert str(refused.value) == f"{name} is {wrong!r}, expected a {kind} number"
        if name in BELOW:
            with pytest.raises(ValueError, match=rf"^{name} is {BELOW[name]}, expected "):
                getattr(quantdit, function)(*given[function], **{name: BELOW[name]})
    if function != "quantize":
        for name, expected in (("prompts", "texts"), ("classes", "numbers or names")):
            with pytest.raises(ValueError, match=rf"^{name} is \[1\.5\], expected a list of {expected}$"):
                getattr(quantdit, function)(*given[function], **{name: [1.5]})
    with pytest.raises(ValueError, match=r"^steps is None, expected a whole number$"):
        quantdit.generate(pixel_dit, tmp_path / "x.png", steps=None)
    assert not list(tmp_path.iterdir())


def test_python_takes_the_numbers_of_numpy(pixel_dit: Path, tmp_path: Path):
    np = pytest.importorskip("numpy")
    numbers = {
        "samples": np.int64(2),
        "steps": np.int32(1),
        "seed": np.uint8(3),
        "guidance": np.float32(1.5),
        "columns": np.int16(1),
    }
    assert len(quantdit.generate(pixel_dit, tmp_path / "x.png", **numbers)) == 2
    one, two = (quantdit.generate(pixel_dit, tmp_path / "x.png", samples=1, steps=1, classes=c) for c in (1, [np.int64(1)]))
    assert torch.equal(one, two), "one class alone"


def test_a_dtype_is_torchs_own_or_its_name_everywhere(everything, pixel_dit: Path, tmp_path: Path):
    made = {}
    for number, dtype in enumerate((torch.bfloat16, "bfloat16", "torch.bfloat16")):
        made[dtype] = quantdit.generate(pixel_dit, tmp_path / "x.png", samples=1, steps=1, dtype=dtype)
        quantdit.export(everything.folder, "dense", tmp_path / f"{number}", dtype=dtype)
        assert quantdit.load(tmp_path / f"{number}", dtype=dtype).transformer.dtype == torch.bfloat16
    assert torch.equal(made[torch.bfloat16], made["bfloat16"]) and torch.equal(made["bfloat16"], made["torch.bfloat16"])
    for dtype in (torch.float64, "float8", 16, None):
        for ask in (
            lambda d: quantdit.evaluate(pixel_dit, pixel_dit, tmp_path / "out", dtype=d),
            lambda d: quantdit.generate(pixel_dit, tmp_path / "out.png", dtype=d),
            lambda d: quantdit.export(everything.folder, "dense", tmp_path / "out", dtype=d),
            lambda d: quantdit.load(pixel_dit, dtype=d),
        ):
            with pytest.raises(ValueError, match=f"^dtype {dtype!r} is unknown; use float32, bfloat16, float16, as text or as"):
                ask(dtype)
    assert not list(tmp_path.glob("out*"))


def test_what_is_no_path_is_named_by_its_class(pixel_dit: Path, tmp_path: Path):
    """A pipeline was taken for a path, and its whole configuration printed as the name of it."""
    pipeline, _ = load_pipeline(str(pixel_dit))
    expected = (
        "is a PixelDiTPipeline, expected the name of a model, a hub id or a folder; a pipeline's save_pretrained writes one"
    )
    for ask, words in (
        (lambda: quantdit.generate(pipeline, tmp_path / "x.png"), f"model {expected}"),
        (lambda: quantdit.evaluate(pipeline, pixel_dit, tmp_path), f"reference {expected}"),
        (lambda: quantdit.evaluate(pixel_dit, pipeline, tmp_path), f"candidate {expected}"),
        (lambda: quantdit.load(pipeline), f"folder {expected}"),
        (lambda: quantdit.export(pipeline, "dense", tmp_path), "folder is a PixelDiTPipeline, expected a path"),
        (lambda: quantdit.gate(3, {}), "report is a int, expected the path of a report, or what it holds"),
        (lambda: quantdit.generate(pixel_dit, None), "output is a NoneType, expected a path"),
        (lambda: quantdit.evaluate(pixel_dit, pixel_dit, tmp_path, cache=3), "cache is a int, expected a path"),
        (lambda: quantdit.generate(pixel_dit, ""), "output is empty, expected a path; . is the folder that you are in"),
    ):
        with pytest.raises(ValueError) as refused:
            ask()
        assert str(refused.value) == words
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "known"), [("x", ".png, .webp, .gif, .mp4"), ("x.xyz", ".webp"), ("x.jpg", "call it x.png")])
def test_a_picture_has_a_suffix_that_says_what_it_is(cli, everything, tmp_path: Path, monkeypatch, name: str, known: str):
    monkeypatch.setattr("quantdit.api.load_pipeline", lambda *a, **b: pytest.fail("it loaded the model"))
    ran = cli("generate", "fashion-dit", "--output", tmp_path / name)
    assert ran.code == 1 and known in ran.error and str(tmp_path / name) in ran.error and "loading" not in ran.err
    monkeypatch.setattr("quantdit.inspection.inspection.inspect", lambda *a: pytest.fail("it read the folder"))
    ran = cli("inspect", everything.folder, "--plot", tmp_path / name)
    assert ran.code == 1 and "plots are written as .png; call it x.png" in ran.error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("guidance", ["nan", "inf"])
def test_guidance_that_is_no_number(cli, plain_dit: Path, tmp_path: Path, guidance: str):
    ran = cli("generate", plain_dit, "--guidance", guidance, "--output", tmp_path / "x.png", *QUICK)
    assert ran.code == 2 and "--guidance" in ran.error
    assert not (tmp_path / "x.png").exists()


def test_missing_prompt_file(cli, pixel_dit: Path, tmp_path: Path):
    ran = cli("generate", pixel_dit, "--prompts", tmp_path / "none.txt", "--output", tmp_path / "x.png", *QUICK)
    assert ran.code == 1 and "none.txt" in ran.error


def test_picture_that_cannot_be_written(cli, pixel_dit: Path, tmp_path: Path):
    (tmp_path / "file").write_text("precious")
    ran = cli("generate", pixel_dit, "--output", tmp_path / "file" / "x.png", *QUICK)
    assert ran.code == 1 and "file" in ran.error
    (tmp_path / "folder.png").mkdir()
    ran = cli("generate", pixel_dit, "--output", tmp_path / "folder.png", *QUICK)
    assert ran.code == 1 and "folder.png" in ran.error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]
    assert (tmp_path / "file").read_text() == "precious"


def test_embedded_model_generates(cli, tmp_path: Path):
    ran = cli("generate", "fashion-dit", "--count", "2", "--steps", "2", "--output", tmp_path / "x.png")
    assert ran.code == 0, ran.err
    assert Image.open(tmp_path / "x.png").size[0] > 100


# ---- inspect


def assert_candidates(text: str, report: dict) -> None:
    """Every rotation and strength of smoothing that was compared has its error, the chosen one a star."""
    compared = 0
    for name, entry in report.items():
        for choice in (entry["rotation"], entry.get("smoothing", {})):
            if choice.get("errors"):
                lines = [line for line in text.splitlines() if line.startswith(f"{name} ")]
                chosen = choice["errors"][str(choice.get("chosen", choice.get("alpha")))]
                assert any(f" {chosen:.5f}*" in line for line in lines)
                assert any(all(f" {error:.5f}" in line for error in choice["errors"].values()) for line in lines)
                assert choice["errors"] and chosen == min(choice["errors"].values())
                compared += 1
    assert compared == 3  # smoothings; all rotations are fixed, or leave even tokens


def test_inspect_prints_each_layer(cli, everything, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    ran = cli("inspect", everything.folder, "--all")
    assert ran.code == 0
    first = ran.out.partition("\nlayer ")[2].partition("\n\n")[0]
    lines = {line.split()[0]: line for line in first.splitlines()}
    assert_candidates(ran.out, everything.report["layers"])
    layers = quant_layers(everything.transformer)
    for name, layer in layers.items():
        line, entry = lines[name], everything.report["layers"][name]
        assert re.search(rf"\b{layer.out_features}x{layer.in_features}\b", line)
        spec = layer.layer_spec
        assert layer.spec.format in line and f" {spec.activation} " in line
        assert line.split()[-1] != "none" or (spec.block == 1 and not spec.smoothed and not spec.rank)
        assert (f" {spec.rotation}-{spec.block}" in line) == (spec.block > 1)
        assert (" smooth" in line, f" rank {spec.rank}" in line) == (spec.smoothed, spec.rank > 0)
        assert abs(entry["bits_per_weight"] - float(re.search(r" (\d+\.\d{3}) ", line)[1])) < 6e-4
        assert f" {entry['rel_rmse']:.5f}  {entry['rms']:.3f}  " in line
        if layer.spec.group_size < layer.in_features:
            assert f" g{layer.spec.group_size} " in line
    head = ran.out.splitlines()[0]
    assert f"{len(layers)} layers" in head and f"{everything.report['size']['quantized_weights']:,}" in head


def test_inspect_fits_the_terminal_and_begins_with_the_worst(cli, everything, monkeypatch):
    """Lines were 154 characters long, and a model of 252 layers had as many of them."""
    report = everything.report["layers"]
    worst = sorted(report, key=lambda name: report[name]["rel_rmse"], reverse=True)[:10]
    for columns in (60, 80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        ran = cli("inspect", everything.folder)
        assert ran.code == 0 and max(map(len, ran.out.splitlines())) <= columns
        table = ran.out.partition("--all lists every one")[2].partition("rel_rmse: error of")[0]
        assert [line.split()[0] for line in table.splitlines() if line and line.split()[0] in report] == worst
        assert all(f"{report[name]['rel_rmse']:.5f}" in table for name in worst)
        assert all(f"\n{term}: " in ran.out for term in ("rel_rmse", "J"))
    roles = ran.out.partition("\nrole ")[2].partition("\n\n")[0]
    members = [entry["rel_rmse"] for name, entry in report.items() if ".attn1." in name]
    (line,) = [line for line in roles.splitlines() if line.startswith("attention ")]
    assert line.split()[1] == str(len(members)) and f" {sum(members) / len(members):.5f}  {max(members):.5f} " in line
    blocks = cli("inspect", everything.folder, "--by", "block").out.partition("\nblock ")[2].partition("\n\n")[0]
    names = [line.split()[0] for line in blocks.splitlines()[1:]]
    assert names == ["transformer_blocks.0", "transformer_blocks.1", "outside"]


def test_inspect_as_json(cli, everything):
    ran = cli("inspect", everything.folder, "--json")
    found = json.loads(ran.out)
    assert found["size"] == everything.report["size"] and found["allocation"] is None
    assert found["layers"].keys() == everything.report["layers"].keys()
    for name, layer in found["layers"].items():
        entry = everything.report["layers"][name]
        assert (layer["error"], layer["rms"], layer["has_data"]) == (entry["rel_rmse"], entry["rms"], True)
    assert cli("inspect", everything.folder, "--json", "--plot", "x.png").code == 2


def test_inspect_of_layers_with_and_without_data(cli, copied: Path, monkeypatch, tmp_path: Path):
    """As a mixture of experts has them, some of which saw no token."""
    monkeypatch.setenv("COLUMNS", "200")
    report = json.loads((copied / REPORT).read_text())
    name = "transformer_blocks.0.attn1.to_q"
    entry = report["layers"][name]
    for key in ("rel_rmse", "weight_only_rel_rmse", "rms", "activation_absmax"):
        del entry[key]
    entry["weight_rel_rmse"] = 0.12345
    (copied / REPORT).write_text(json.dumps(report))
    ran = cli("inspect", copied, "--all")
    assert ran.code == 0, ran.err
    (line,) = [line for line in ran.out.splitlines() if line.startswith(f"{name} ")]
    assert " 0.12345w " in line and ran.out.count("\nw: error of the weight itself") == 1
    pytest.importorskip("matplotlib")
    assert cli("inspect", copied, "--plot", tmp_path / "x.png").code == 0


def test_inspect_without_a_report_still_counts_bits(cli, copied: Path):
    (copied / REPORT).unlink()
    ran = cli("inspect", copied)
    assert ran.code == 0 and "transformer_blocks.0.attn1.to_q" in ran.out
    ran = cli("inspect", copied, "--plot", copied / "x.png")
    assert ran.code == 1 and REPORT in ran.error and not ran.out, "nothing is printed before what can be refused"


@pytest.mark.parametrize(
    "report", ["{}", "{", "[]", '{"layers": {}}', '{"layers": []}', '{"layers": {"x": 1}}', '{"layers": null}']
)
def test_inspect_with_a_damaged_report_is_one_line(cli, copied: Path, report: str):
    (copied / REPORT).write_text(report)
    ran = cli("inspect", copied, "--plot", copied / "x.png")
    assert ran.code == 1 and REPORT in ran.error
    assert not (copied / "x.png").exists()


@pytest.mark.parametrize("key", ["rel_rmse", "rms", "activation_absmax", "weight_histogram", "rotation"])
def test_inspect_of_a_report_with_odd_values_is_one_line(cli, copied: Path, key: str):
    whole = json.loads((copied / REPORT).read_text())
    name = "transformer_blocks.1.attn1.to_q"
    for odd in (True, "x", [], {"errors": {"none": "x"}}, float("nan"), float("inf"), {"counts": [0], "reach": 1}):
        layers = whole["layers"] | {name: whole["layers"][name] | {key: odd}}
        if key == "rotation" and odd == {"counts": [0], "reach": 1}:
            continue  # no errors in it: nothing was compared
        (copied / REPORT).write_text(json.dumps(whole | {"layers": layers}))
        ran = cli("inspect", copied)
        assert ran.code == 1 and REPORT in ran.error, (odd, ran.out)


def test_inspect_of_other_things_is_one_line(cli, pixel_dit: Path, tmp_path: Path):
    for folder in (pixel_dit, tmp_path, tmp_path / "nowhere", pixel_dit / "model_index.json"):
        ran = cli("inspect", folder)
        assert ran.code == 1 and str(folder) in ran.error


@pytest.mark.parametrize("command", ["inspect", "dense", "comfyui", "onnx"])
def test_what_is_no_quantized_folder_is_said_to_be_what_it_is(cli, tmp_path: Path, monkeypatch, command: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "part/transformer").mkdir(parents=True)
    index = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}
    (tmp_path / "part/model_index.json").write_text(json.dumps(index))
    more = {"comfyui": "x.safetensors", "onnx": "x.onnx"}.get(command, "x")
    how = () if command == "inspect" else ("--to", command, "--output", more)
    for folder, words in (
        ("fashion-dit", "fashion-dit is a model in full precision, .*quantdit calibrate --model fashion-dit --bits w4a8 writes"),
        ("nothing", "nothing does not exist; give the folder that quantdit calibrate or save_pretrained wrote"),
        ("file", "file is a file; give the folder"),
        ("empty", "empty has no transformer folder; give the folder"),
        ("part", "part/transformer/config.json is missing: .*; copy the folder again, or give one that save_pretrained or "),
    ):
        ran = cli("inspect" if command == "inspect" else "export", folder, *how)
        assert ran.code == 1 and re.search(words, ran.error), ran.error


def test_inspect_draws_a_picture(cli, everything, tmp_path: Path):
    pytest.importorskip("matplotlib")
    ran = cli("inspect", everything.folder, "--plot", tmp_path / "new/layers.png")
    assert ran.code == 0 and str(tmp_path / "new/layers.png") in ran.out
    with Image.open(tmp_path / "new/layers.png") as image:
        assert image.format == "PNG" and min(image.size) > 500
        assert len(image.convert("RGB").resize((200, 200)).getcolors(40000)) > 50, "something is drawn"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["layers.png"]


def test_inspect_plot_without_matplotlib_says_what_to_install(cli, everything, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = cli("inspect", everything.folder, "--plot", tmp_path / "x.png")
    assert ran.code == 1 and ran.error.endswith(f"run: {install('plot')}") and not ran.out
