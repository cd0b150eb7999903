"""The compiler end to end on tiny models: same bytes for same inputs, resumable, and nothing lost when something fails."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import resource
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from quantdit.calibration import stats as statistics
from quantdit.calibration.layer import quantize_layer, quantize_layers
from quantdit.checkpoints import checkpoint
from quantdit.checkpoints.checkpoint import quant_layers, read_transformer
from quantdit.compiling import compile as compiler
from quantdit.compiling import quantize_blocks
from quantdit.compiling.compile import compile
from quantdit.compiling.plan import Plan
from quantdit.compiling.report import REPORT
from quantdit.compiling.work_folder import clear_disk_errors
from quantdit.layers.quant_linear import QuantLinear
from quantdit.pipelines.generate import generate
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.presets import from_bits
from quantdit.recipes.resolve import resolve
from quantdit.recipes.rules import Layer, Recipe, Rule, from_dict
from quantdit.recipes.sampling_plan import SamplingPlan
from quantdit.system import files
from quantdit.tensors import hadamard

# Quick, and still with everything that is seeded: rotation signs, k-means, error feedback.
SMALL = """
[[rule]]
match = "*.attn1.to_q"
weight = "vq256x4"
[[rule]]
match = "role:attention"
activation_bits = 8
[[rule]]
match = "*"
weight = "dense"
"""
ONCE = ("--samples", "1", "--steps", "1")
QUICK = ("--samples", "2", "--steps", "2")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def run(cli, pixel_dit: Path, small: Path, tmp_path: Path) -> Callable:
    """Calibrate the tiny model with the small recipe into `tmp_path / output`."""

    def go(*more: object, output: str = "out", model: Path = pixel_dit):
        return cli("calibrate", "--model", model, "--recipe", small, "--output", tmp_path / output, *QUICK, *more)

    return go


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def transformer_digests(folder: Path) -> dict[str, str]:
    return digests(folder / "transformer")


def sources(tmp_path: Path, model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Return a copy of a model with changed weights."""
    folder = Path(shutil.copytree(model, tmp_path / "changed"))
    weights = folder / "transformer" / files.WEIGHTS
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


# ---- the product


def test_same_seed_gives_the_same_bytes_and_another_seed_others(run, tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run("--seed", seed, output=name).code == 0
    a, b, c = (transformer_digests(tmp_path / name) for name in "abc")
    assert a == b and a.keys() == {"config.json", files.WEIGHTS}
    assert all(a[name] != c[name] for name in a)


def test_output_is_a_whole_pipeline_folder_and_the_source_is_untouched(run, tmp_path: Path, pixel_dit: Path):
    before = digests(pixel_dit)
    assert run().code == 0
    assert digests(pixel_dit) == before
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"model_index.json", "scheduler", "transformer", REPORT}
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        assert digests(out)[name] == before[name]
    assert {p.name for p in tmp_path.iterdir()} == {"out", "small.toml"}


def test_memory_and_folder_generate_the_same_pictures(everything, pixel_dit: Path):
    pipeline, _ = load_pipeline(str(pixel_dit))
    pipeline.transformer = everything.transformer
    loaded, _ = load_pipeline(str(everything.folder))
    assert torch.equal(generate(pipeline, 3, 7, 3), generate(loaded, 3, 7, 3))


@pytest.mark.parametrize("model", ["pixel_dit", "plain_dit", "odd_dit"])
def test_any_diffusers_folder_takes_the_same_way(cli, request: pytest.FixtureRequest, model: str, tmp_path: Path):
    source = request.getfixturevalue(model)
    out = tmp_path / "out"
    ran = cli("calibrate", "--model", source, "--bits", "w4a8", "--output", out, *QUICK)
    assert ran.code == 0, ran.err
    assert str(out / REPORT) in ran.out and "18 layers" in ran.out
    transformer = read_transformer(out / "transformer")
    linears = {n: m for n, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    assert {n for n, m in linears.items() if not isinstance(m, QuantLinear)} == {"proj_out_1", "proj_out_2"}
    # Uniform 4 bits over a random weight cost about a tenth of its output even without error feedback.
    errors = {n: e["rel_rmse"] for n, e in json.loads((out / REPORT).read_text())["layers"].items()}
    assert min(errors.values()) > 0 and max(errors.values()) < 0.1
    sizes = {(p.name, p.is_dir()) for p in source.iterdir()} | {(REPORT, False)}
    assert {(p.name, p.is_dir()) for p in out.iterdir()} == sizes
    assert cli("generate", out, "--count", "2", "--steps", "2", "--output", tmp_path / "x.png").code == 0


def test_width_that_no_block_or_group_divides_is_handled(odd_dit: Path, tmp_path: Path):
    pipeline, source = load_pipeline(str(odd_dit))
    compile(pipeline, source, Plan(from_bits("w3a8"), SamplingPlan(samples=2, steps=2)), tmp_path / "out")
    layer = quant_layers(read_transformer(tmp_path / "out" / "transformer"))["transformer_blocks.0.attn1.to_q"]
    assert (layer.in_features, layer.spec.group_size) == (44, 44)
    assert (layer.layer_spec.rotation, layer.layer_spec.block) == ("hadamard", 4)


@pytest.mark.parametrize("width", [33, 1, 7])
@pytest.mark.parametrize("weight", ["int4", "int8", "table4", "fp8_e4m3"])
def test_odd_width_is_quantized_without_rotation(width: int, weight: str):
    linear = nn.Linear(width, 24)
    x = torch.randn(200, width)
    plan = resolve(Recipe("r", (Rule("*", weight, activation_bits=8),)), [Layer("x", "other", 24, width)])["x"]
    assert plan.group_size == width
    made = quantize_layer(linear.weight, linear.bias, statistics.update(statistics.init(width, 1), x, 0), plan, 0)
    assert (made.spec.rotation, made.spec.block) == ("none", 1)
    layer = QuantLinear.from_tensors(made.spec, made.tensors, made.bias)
    with torch.no_grad():
        error = float((layer(x) - linear(x)).norm() / (linear(x) - linear.bias).norm())
    assert error < (0.15 if layer.spec.format in ("int4", "table4") else 0.05)
    assert math.isfinite(made.report["weight_only_rel_rmse"])


def test_error_feedback_has_less_output_error_than_rounding(pixel_dit: Path, tmp_path: Path):
    errors = {}
    for method in ("gptq", "rtn"):
        pipeline, source = load_pipeline(str(pixel_dit))
        rules = (Rule("role:outside", weight="dense"), Rule("*", "int4", activation_bits=16, method=method))
        report = compile(pipeline, source, Plan(Recipe("w4a16", rules), SamplingPlan(samples=8, steps=2)), tmp_path / method)
        errors[method] = [layer["rel_rmse"] for layer in report.layers.values()]
        assert {layer["method"] for layer in report.layers.values()} == {method}
    mean = {method: sum(e) / len(e) for method, e in errors.items()}
    assert mean["gptq"] < mean["rtn"]


def test_more_bits_are_never_worse(pixel_dit: Path, tmp_path: Path):
    mean = []
    for bits in (2, 3, 4, 6, 8):
        pipeline, source = load_pipeline(str(pixel_dit))
        rules = (Rule("*.ff.*", f"int{bits}", group_size=64 if bits < 8 else "auto"), Rule("*", "dense"))
        report = compile(pipeline, source, Plan(Recipe("r", rules), SamplingPlan(samples=2, steps=2)), tmp_path / str(bits))
        mean.append(sum(layer["rel_rmse"] for layer in report.layers.values()))
        assert report.size["bits_per_weight"] > bits
    assert mean == sorted(mean, reverse=True)


def test_report_says_what_the_files_hold(everything):
    stored = json.loads((everything.folder / REPORT).read_text())
    assert stored == json.loads(json.dumps(everything.report))
    weights = everything.folder / "transformer" / files.WEIGHTS
    config = json.loads((everything.folder / "transformer" / "config.json").read_text())["quantization_config"]
    assert stored["sha256"] == config["sha256"] == files.sha256(weights)
    assert stored["provenance"]["calibration"]["samples"] == 2 and stored["provenance"]["calibration"]["seed"] == 0
    assert from_dict(stored["recipe"]).name == "everything"

    # Bits per weight counted from the bytes in the file.
    assert stored["size"]["file_bytes"] == weights.stat().st_size
    with safe_open(weights, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    bits, count, dense = 0, 0, sum(t.numel() for t in tensors.values())
    assert stored["layers"].keys() == config["layers"].keys()
    for name, layer in stored["layers"].items():
        own = [t for key, t in tensors.items() if key.rpartition(".")[0] == name and not key.endswith(".bias")]
        weight_count = layer["spec"]["weight"]["out_features"] * layer["spec"]["weight"]["in_features"]
        assert layer["bits_per_weight"] == pytest.approx(8 * sum(t.nbytes for t in own) / weight_count, abs=1e-4)
        bits, count, dense = bits + 8 * sum(t.nbytes for t in own), count + weight_count, dense - sum(t.numel() for t in own)
        assert layer["spec"] == config["layers"][name]
        assert 0 < layer["rel_rmse"] < 1 and 0 <= layer["weight_only_rel_rmse"] < 1 and layer["rms"] > 0
        # Two steps are two rows at the timestep embedder: the bias and one direction of the weight reproduce them.
        assert layer["weight_only_rel_rmse"] > 0 or "timestep_embedder" in name
        assert len(layer["activation_absmax"]) == stored["provenance"]["calibration"]["buckets"]
        assert max(layer["activation_absmax"]) >= layer["rms"]
        assert sum(layer["weight_histogram"]["counts"]) == weight_count
    assert stored["size"]["quantized_weights"] == count
    assert stored["size"]["bits_per_weight"] == pytest.approx(bits / count, abs=1e-4)
    assert stored["size"]["dense_values"] == dense


def test_layers_that_share_an_input_report_the_same_statistics(everything):
    q, k, v = (everything.report["layers"][f"transformer_blocks.0.attn1.to_{x}"] for x in "qkv")
    assert q["rms"] == k["rms"] == v["rms"] and q["activation_absmax"] == k["activation_absmax"]
    assert q["rms"] != everything.report["layers"]["transformer_blocks.0.attn1.to_out.0"]["rms"]


def test_all_zero_layer_stays_zero(cli, pixel_dit: Path, tmp_path: Path):
    """A fresh adaLN-zero model has such layers."""
    name = "transformer_blocks.0.attn1.to_out.0"
    model = sources(tmp_path, pixel_dit, lambda t: t[f"{name}.weight"].zero_())
    ran = cli("calibrate", "--model", model, "--bits", "w4a8", "--output", tmp_path / "out", *QUICK)
    assert ran.code == 0, ran.err
    layer = quant_layers(read_transformer(tmp_path / "out" / "transformer"))[name]
    assert torch.equal(layer(torch.randn(5, 64)), layer.bias.expand(5, 64))
    assert cli("inspect", tmp_path / "out").code == 0
    pytest.importorskip("matplotlib")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert cli("inspect", tmp_path / "out", "--plot", tmp_path / "x.png").code == 0


def test_one_sample_of_one_step_is_enough_to_run(cli, pixel_dit: Path, tmp_path: Path):
    ran = cli("calibrate", "--model", pixel_dit, "--bits", "w2a4", "--output", tmp_path / "out", *ONCE, "--finetune-steps", "2")
    assert ran.code == 0, ran.err


def test_recipe_that_quantizes_nothing_is_refused(cli, pixel_dit: Path, tmp_path: Path):
    (tmp_path / "dense.toml").write_text('[[rule]]\nmatch = "*"\nweight = "dense"\n')
    ran = cli("calibrate", "--model", pixel_dit, "--recipe", tmp_path / "dense.toml", "--output", tmp_path / "out", *QUICK)
    assert ran.code == 1 and "dense" in ran.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("bits", "more"), [("w4a8", ()), ("w2a16", ("--finetune-steps", "2"))])
def test_number_of_threads_changes_nothing(cli, pixel_dit: Path, tmp_path: Path, bits: str, more: tuple[str, ...]):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ran = cli("calibrate", "--model", pixel_dit, "--bits", bits, "--output", tmp_path / str(threads), *QUICK, *more)
            assert ran.code == 0 and torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert transformer_digests(tmp_path / "1") == transformer_digests(tmp_path / "2")


def test_the_model_runs_in_as_many_threads_as_asked_for(cli, monkeypatch: pytest.MonkeyPatch, pixel_dit: Path, tmp_path: Path):
    """Some processors multiply a few rows with other last bits in two threads; the tiny model is too narrow to show it."""
    seen, forward = set(), torch.nn.Linear.forward

    def seeing(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        seen.add(torch.get_num_threads())
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", seeing)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for more, expected in (((), {1}), (("--threads", "2"), {1, 2})):
            seen.clear()
            ran = cli("calibrate", "--model", pixel_dit, "--bits", "w8a8", "--output", tmp_path / str(len(more)), *ONCE, *more)
            assert ran.code == 0 and seen == expected, ran.err
        ran = cli(
            "calibrate", "--model", pixel_dit, "--bits", "w8a8", "--output", tmp_path / "0", *ONCE, "--threads", 2, "--resume"
        )
        assert ran.code == 1 and "threads" in ran.error
    finally:
        torch.set_num_threads(before)


# ---- interrupted runs


@contextmanager
def interrupted_after(monkeypatch: pytest.MonkeyPatch, inputs: int) -> Iterator[None]:
    """Press Ctrl-C when the layers of so many inputs are quantized."""
    left = [inputs]

    def counted(*args, **kwargs):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return quantize_layers(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(quantize_blocks, "quantize_layers", counted)
        yield


@pytest.fixture
def begun(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The work folder of a run interrupted in its second block; each block has two inputs, of q, k, v and of the projection."""
    with interrupted_after(monkeypatch, 4):
        ran = run()
    assert ran.code == 130 and "--resume" in ran.err and "Traceback" not in ran.err
    assert not (tmp_path / "out").exists()
    return tmp_path / "out.partial"


def test_resumed_run_gives_the_bytes_of_an_uninterrupted_one(run, begun: Path, monkeypatch, tmp_path: Path):
    assert run(output="whole").code == 0
    done = []
    monkeypatch.setattr(quantize_blocks, "quantize_layers", lambda *a: done.append(1) or quantize_layers(*a))
    ran = run("--resume")
    assert ran.code == 0, ran.err
    assert len(done) == 3, "the first block was not done again"
    assert transformer_digests(tmp_path / "out") == transformer_digests(tmp_path / "whole")
    reports = [json.loads((tmp_path / name / REPORT).read_text()) for name in ("out", "whole")]
    assert reports[0]["layers"] == reports[1]["layers"] and reports[0]["size"] == reports[1]["size"]
    assert not begun.exists()


def test_interrupted_run_is_not_begun_again_unasked(run, begun: Path, tmp_path: Path):
    before = digests(begun)
    ran = run()
    assert ran.code == 1 and "--resume" in ran.error and "--overwrite" in ran.error
    assert digests(begun) == before
    assert run("--overwrite").code == 0


@pytest.mark.parametrize("other", [("--seed", "1"), ("--samples", "3"), ("--steps", "3"), ("--guidance", "3")])
def test_resume_with_other_settings_is_refused(run, begun: Path, other: tuple[str, str]):
    before = digests(begun)
    ran = run("--resume", *other)
    assert ran.code == 1 and "--resume" in ran.error and "settings" in ran.error
    assert digests(begun) == before


def test_resume_with_another_recipe_is_refused(cli, begun: Path, pixel_dit: Path, tmp_path: Path):
    ran = cli("calibrate", "--model", pixel_dit, "--bits", "w8a8", "--output", tmp_path / "out", *QUICK, "--resume")
    assert ran.code == 1 and "recipe" in ran.error


def test_resume_with_another_model_is_refused(run, begun: Path, odd_dit: Path):
    ran = run("--resume", model=odd_dit)
    assert ran.code == 1 and "source" in ran.error


def test_resume_without_a_beginning_just_begins(run, tmp_path: Path):
    assert run("--resume").code == 0
    assert (tmp_path / "out" / REPORT).exists()


@pytest.mark.parametrize("file", ["transformer_blocks.0.safetensors", "transformer_blocks.0.json", "../../../identity.json"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped"])
def test_damaged_work_folder_is_noticed(run, begun: Path, tmp_path: Path, file: str, damage: str):
    """What a power cut or a bad disk leaves is named, and never carried into the output."""
    path = begun / "work" / "transformer" / "blocks" / file
    raw = bytearray(path.read_bytes())
    if damage == "flipped":
        raw[-100 if path.suffix == ".safetensors" else raw.index(b'"', len(raw) // 2) + 1] ^= 1
    path.write_bytes({"empty": b"", "truncated": bytes(raw[: len(raw) // 2]), "flipped": bytes(raw)}[damage])
    ran = run("--resume")
    assert ran.code == 1 and str(begun) in ran.error and path.name in ran.error
    assert "begin again with --overwrite in place of --resume" in ran.error
    assert not (tmp_path / "out").exists()


# ---- what is there already


def test_non_empty_output_is_refused_before_any_work(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    monkeypatch.setattr(compiler, "sample", lambda *a, **k: pytest.fail("work was begun"))
    ran = run()
    assert ran.code == 1 and "--overwrite" in ran.error and str(tmp_path / "out") in ran.error
    assert (tmp_path / "out" / "precious").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "small.toml"]


def test_empty_output_is_used(run, tmp_path: Path):
    (tmp_path / "out").mkdir()
    assert run().code == 0


def test_missing_parents_are_made(run, tmp_path: Path):
    assert run(output="a/b/out").code == 0
    assert (tmp_path / "a/b/out" / REPORT).exists()


def test_overwrite_replaces_the_whole_folder(run, tmp_path: Path):
    assert run().code == 0
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    (tmp_path / "out" / "stale.safetensors").write_text("x")
    (tmp_path / "out" / REPORT).write_text(json.dumps(report | {"files": [*report["files"], "stale.safetensors"]}))
    assert run("--overwrite", "--seed", "1").code == 0
    assert run("--seed", "1", output="fresh").code == 0
    assert transformer_digests(tmp_path / "out") == transformer_digests(tmp_path / "fresh")
    assert digests(tmp_path / "out").keys() == digests(tmp_path / "fresh").keys()


def test_good_output_survives_an_overwrite_that_fails(run, tmp_path: Path, monkeypatch):
    assert run().code == 0
    before = digests(tmp_path / "out")
    for failure, code in ((KeyboardInterrupt, 130), (OSError(errno.ENOSPC, "No space left on device"), 1), (ValueError("x"), 1)):

        def fail(*args, failure=failure):
            raise failure

        monkeypatch.setattr(checkpoint, "write_transformer", fail)
        assert run("--overwrite", "--seed", "1").code == code
        assert digests(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["out.old", "out.partial"])
@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_folders_of_the_user_are_never_deleted(run, tmp_path: Path, name: str, more: tuple):
    """`mv out out.old` is how people keep a backup before they calibrate anew."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").write_text("x")
    ran = run(*more)
    assert ran.code == (1 if name == "out.partial" else 0)
    assert ran.code == 0 or "out.partial is where work on out would go, but holds something else" in ran.error
    assert (tmp_path / name / "precious").exists()


def test_output_inside_the_source_folder(run, pixel_dit: Path, tmp_path: Path):
    model = Path(shutil.copytree(pixel_dit, tmp_path / "model"))
    ran = run(output="model/w4a8", model=model)
    assert ran.code == 1 and str(model) in ran.error
    assert digests(pixel_dit) == digests(model)


# ---- broken models


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weight_that_is_not_finite_names_the_layer(cli, pixel_dit: Path, tmp_path: Path, value: float):
    name = "transformer_blocks.1.ff.net.2"
    model = sources(tmp_path, pixel_dit, lambda t: t[f"{name}.weight"].view(-1)[3].fill_(value))
    ran = cli("calibrate", "--model", model, "--bits", "w4a8", "--output", tmp_path / "out", *QUICK)
    assert ran.code == 1 and f"layer {name}:" in ran.error and "NaN or infinite" in ran.error
    assert {p.name for p in tmp_path.iterdir()} == {"changed"}


@pytest.mark.parametrize(
    "tensor", ["transformer_blocks.0.attn1.to_v.bias", "pos_embed.proj.weight", "proj_out_1.weight", "proj_out_2.bias"]
)
def test_nan_outside_the_quantized_weights_names_its_tensor(cli, pixel_dit: Path, tmp_path: Path, tensor: str):
    model = sources(tmp_path, pixel_dit, lambda t: t[tensor].view(-1)[0].fill_(float("nan")))
    ran = cli("calibrate", "--model", model, "--bits", "w8a8", "--output", tmp_path / "out", *ONCE)
    assert ran.code == 1 and tensor.rpartition(".")[0] in ran.error
    assert not (tmp_path / "out").exists()


# Finite weights; the product overflows float32, or only its square in the Gram matrix does.
@pytest.mark.parametrize("gain", [8e38, 1e25])
def test_activation_that_overflows_names_the_layer(cli, pixel_dit: Path, tmp_path: Path, gain: float):
    model = sources(tmp_path, pixel_dit, lambda t: t["transformer_blocks.0.ff.net.0.proj.weight"].mul_(1e20).mul_(gain / 1e20))
    ran = cli("calibrate", "--model", model, "--bits", "w4a8", "--output", tmp_path / "out", "--samples", "2", "--steps", "1")
    assert ran.code == 1 and "layer transformer_blocks.0.ff.net.2:" in ran.error
    assert not (tmp_path / "out").exists()


def test_quantized_source_is_refused(cli, everything, tmp_path: Path):
    ran = cli("calibrate", "--model", everything.folder, "--bits", "w4a8", "--output", tmp_path / "out", *QUICK)
    assert ran.code == 1 and "quantized already" in ran.error
    assert not list(tmp_path.iterdir())


def test_truncated_source_weights_name_the_folder(cli, pixel_dit: Path, tmp_path: Path):
    model = Path(shutil.copytree(pixel_dit, tmp_path / "model"))
    weights = model / "transformer" / files.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:5000])
    ran = cli("calibrate", "--model", model, "--bits", "w4a8", "--output", tmp_path / "out", *QUICK)
    assert ran.code == 1 and str(model) in ran.error
    assert not (tmp_path / "out").exists()


# ---- outputs that cannot be written


def test_output_that_is_a_file(run, tmp_path: Path):
    (tmp_path / "out").write_text("precious")
    for more in ((), ("--overwrite",)):
        ran = run(*more)
        assert ran.code == 1 and "is a file" in ran.error and str(tmp_path / "out") in ran.error
    assert (tmp_path / "out").read_text() == "precious"


def test_output_below_a_file(run, tmp_path: Path):
    (tmp_path / "file").write_text("precious")
    ran = run(output="file/out")
    assert ran.code == 1 and "cannot write" in ran.error and str(tmp_path / "file/out") in ran.error


@contextmanager
def without_privileges() -> Iterator[None]:
    """Give up root, whom no permission stops."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public(pixel_dit: Path) -> Iterator[Path]:
    """A model that everybody may read; pytest's own folders are open to their owner alone."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        model = Path(shutil.copytree(pixel_dit, Path(place) / "model"))
        for path in model.rglob("*"):
            path.chmod(0o755)
        yield model


def test_output_in_a_folder_that_may_not_be_written(public: Path, cli, small: Path):
    locked = public.parent / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    pipeline, source = load_pipeline(str(public))
    with without_privileges(), pytest.raises(ValueError, match=r"cannot write .*locked.*permission.*--output"):  # noqa: SIM117
        with clear_disk_errors(locked / "out"):
            compile(pipeline, source, Plan(from_bits("w8a8"), SamplingPlan(samples=1, steps=1)), locked / "out")
    assert not list(locked.iterdir())


FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("during", ["block", "weights", "config", "report", "copy"])
def test_full_disk_is_one_line_and_leaves_nothing_under_the_final_name(run, tmp_path: Path, monkeypatch, during: str):
    def full(condition: Callable[..., bool], error: Exception, real: Callable) -> Callable:
        def write(*args, **kwargs):
            if condition(*args):
                raise error
            return real(*args, **kwargs)

        return write

    no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        if during == "block":
            patch.setattr(quantize_blocks, "save_file", full(lambda t, path, *_: ".1." in path.name, FULL, save_file))
        elif during == "weights":
            patch.setattr(files, "save_file", full(lambda *a: True, FULL, save_file))
        elif during == "copy":
            patch.setattr(shutil, "copyfile", full(lambda s, *a: "scheduler" in str(s), no_space, shutil.copyfile))
        else:
            name = {"config": "config.json", "report": REPORT}[during]
            for module in (checkpoint, files):
                patch.setattr(module, "write_json", full(lambda p, c: p.name == name, no_space, files.write_json))
        ran = run()
    assert ran.code == 1 and "disk is full" in ran.error and "--resume" in ran.error and str(tmp_path / "out") in ran.error
    assert not (tmp_path / "out").exists()
    ran = run("--resume")
    assert ran.code == 0, ran.err
    read_transformer(tmp_path / "out" / "transformer")


@pytest.mark.parametrize("limit", [1_000, 30_000, 300_000])
def test_file_that_may_not_grow_is_one_line_and_leaves_nothing_under_the_final_name(run, tmp_path: Path, limit: int):
    """The operating system really refuses here: to `identity.json`, to a block, to the weights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        ran = run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ran.code == 1 and str(tmp_path / "out") in ran.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EROFS, errno.EIO])
def test_any_refusal_that_safetensors_reports_is_one_line(run, tmp_path: Path, monkeypatch, number: int):
    def refuse(*args, **kwargs):
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

    monkeypatch.setattr(files, "save_file", refuse)
    ran = run()
    assert ran.code == 1 and str(tmp_path / "out") in ran.error
    assert not (tmp_path / "out").exists()


def test_rotation_signs_depend_on_the_seed_alone(everything):
    layer = quant_layers(everything.transformer)["transformer_blocks.0.attn1.to_q"]
    assert torch.equal(layer.premultiplier, hadamard.random_sign(64, 0))
