"""Quantization without data: every weight format the presets use, what is refused, and what the report can say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from quantdit.calibration.data_free import quantize_table, quantize_without_data
from quantdit.calibration.quantize import quantize_weight
from quantdit.checkpoints.checkpoint import quant_layers, read_transformer
from quantdit.compiling.compile import compile
from quantdit.compiling.plan import Plan
from quantdit.compiling.report import REPORT, to_json
from quantdit.layers.quant_linear import QuantLinear
from quantdit.pipelines.generate import generate
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.presets import from_bits
from quantdit.recipes.resolve import resolve, without_data
from quantdit.recipes.rules import WEIGHTS, Layer, Recipe, Rule
from quantdit.recipes.sampling_plan import SamplingPlan
from quantdit.system import files

NONE = ("--samples", "0")


@pytest.fixture(scope="module")
def made(pixel_dit: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """`pixel_dit` in w4a8 without data."""
    out = tmp_path_factory.mktemp("no-data") / "out"
    pipeline, source = load_pipeline(str(pixel_dit))
    return out, to_json(compile(pipeline, source, Plan(from_bits("w4a8"), SamplingPlan(samples=0)), out))


def quantized(weight: str, linear: nn.Linear, seed: int = 0, **rule: object):
    plan = Recipe("r", (Rule("*", weight, **rule),))
    layer = Layer("x", "other", linear.out_features, linear.in_features)
    return quantize_without_data(linear.weight, linear.bias, resolve(without_data(plan), [layer])["x"], seed)


FORMATS = sorted({*WEIGHTS.values(), "int2", "int3", "int6", "int8", "table2", "table3", "table6", "vq256x4", "fp8_e4m3"})


@pytest.mark.parametrize("weight", FORMATS)
def test_every_format_comes_near_its_weight(weight: str):
    linear = nn.Linear(128, 96)
    made = quantized(weight, linear, activation_bits=16)
    layer = QuantLinear.from_tensors(made.spec, made.tensors, made.bias)
    error = float((layer.weight - linear.weight).detach().norm() / linear.weight.detach().norm())
    assert error == pytest.approx(made.report["weight_rel_rmse"], rel=0.02)
    bits = 2 if weight.startswith("vq") else int(next(c for c in weight if c.isdigit()))
    assert 0 < error < {2: 0.6, 3: 0.3, 4: 0.15, 6: 0.05, 8: 0.04}[bits]
    assert torch.equal(made.bias, linear.bias) and "rel_rmse" not in made.report
    assert made.report["method"] == "rtn" and sum(made.report["weight_histogram"]["counts"]) == linear.weight.numel()


@pytest.mark.parametrize("weight", ["vq256x4", "int4"])
def test_seed_decides(weight: str):
    linear = nn.Linear(64, 64)
    first, again, other = (quantized(weight, linear, seed) for seed in (1, 1, 2))
    assert all(torch.equal(t, again.tensors[n]) for n, t in first.tensors.items())
    assert not torch.equal(first.tensors["data"], other.tensors["data"])


@pytest.mark.parametrize("bits", ["w2a16", "w3a8", "w4a4", "w4a8", "w6a16", "w8a8"])
def test_presets_work_without_data_and_their_output_runs(bits: str, pixel_dit: Path, tmp_path: Path):
    pipeline, source = load_pipeline(str(pixel_dit))
    full = generate(pipeline, 2, 0, 2)
    report = compile(pipeline, source, Plan(from_bits(bits), SamplingPlan(samples=0)), tmp_path / "out")
    assert report.model_rel_rmse is None and report.blocks == {"transformer": None}
    assert report.provenance["calibration"]["samples"] == 0
    for entry in report.layers.values():
        assert 0 < entry["weight_rel_rmse"] < 0.8 and not {"rel_rmse", "weight_only_rel_rmse", "rms"} & entry.keys()
        assert 1 < entry["bits_per_weight"] < 40
    again, _ = load_pipeline(str(tmp_path / "out"))
    assert quant_layers(again.transformer).keys() == report.layers.keys()
    images = generate(again, 2, 0, 2)
    assert torch.equal(images, generate(pipeline, 2, 0, 2)), "in memory it is as in the folder"
    assert not torch.equal(images, full) and bool(torch.isfinite(images).all())


def test_methods_that_need_data_are_left_out(made):
    _, report = made
    rules = {json.dumps(rule) for rule in report["recipe"]["rule"]}
    assert rules and all(json.loads(rule).get("method", "rtn") in ("rtn", "hqq") for rule in rules)
    assert all(e["spec"]["rotation"] in ("none", "hadamard") for e in report["layers"].values())


@pytest.mark.parametrize(
    ("rule", "word"),
    [('activation_bits = 8\nactivation_scale = "static"', "static"), ('weight = "auto"', "auto")],
)
def test_what_needs_data_is_refused(cli, pixel_dit: Path, tmp_path: Path, rule: str, word: str):
    (tmp_path / "r.toml").write_text(f'[[rule]]\nmatch = "*"\n{rule}\n')
    where = ("--model", pixel_dit, "--recipe", tmp_path / "r.toml", "--output", tmp_path / "out")
    ran = cli("calibrate", *where, *NONE, *(("--size-budget", "0.3") if word == "auto" else ()))
    assert ran.code == 1 and word in ran.error and "needs calibration data" in ran.error and "--samples" in ran.error
    assert {p.name for p in tmp_path.iterdir()} == {"r.toml"}
    ran = cli("calibrate", "--model", pixel_dit, "--bits", "auto", "--size-budget", "0.3", "--output", tmp_path / "o", *NONE)
    assert ran.code == 1 and "needs calibration data" in ran.error


def test_nan_in_a_weight_names_its_layer():
    linear = nn.Linear(64, 64)
    linear.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        quantized("int4", linear)


def test_inspect_shows_the_error_of_the_weights(cli, made, monkeypatch):
    out, report = made
    monkeypatch.setenv("COLUMNS", "200")
    ran = cli("inspect", out, "--all")
    assert ran.code == 0, ran.err
    head, *lines = ran.out.partition("\nlayer ")[2].splitlines()
    assert "of weight" in head and "rel_rmse" not in ran.out
    for name, entry in report["layers"].items():
        line = next(x for x in lines if x.startswith(f"{name} "))
        assert re.search(rf" {entry['weight_rel_rmse']:.5f} +- ", line)


def test_inspect_draws_what_there_is(cli, made, tmp_path: Path):
    from PIL import Image

    ran = cli("inspect", made[0], "--plot", tmp_path / "x.png")
    assert ran.code == 0, ran.err
    image = Image.open(tmp_path / "x.png")
    assert image.width > 1000 and 700 < image.height < 1300, "no panel of inputs, which nothing is known of"


def test_inspect_still_refuses_a_report_of_something_else(cli, made, tmp_path: Path):
    import shutil

    out = Path(shutil.copytree(made[0], tmp_path / "out"))
    report = files.read_json(out / REPORT)
    next(iter(report["layers"].values())).pop("weight_rel_rmse")
    (out / REPORT).write_text(json.dumps(report))
    ran = cli("inspect", out)
    assert ran.code == 1 and "does not fit the checkpoint" in ran.error


def test_summary_line_says_whose_error_it_is(cli, pixel_dit: Path, tmp_path: Path):
    ran = cli("calibrate", "--model", pixel_dit, "--bits", "w8a16", "--output", tmp_path / "out", *NONE)
    assert ran.code == 0 and "mean weight_rel_rmse" in ran.out
    read_transformer(tmp_path / "out" / "transformer")


@pytest.mark.parametrize(("format", "group_size"), [("int8", 64), ("int4", 16), ("int4", 64), ("int2", 32), ("fp8_e4m3", 64)])
def test_a_table_in_parts_is_the_table(format: str, group_size: int):
    weight = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[7] = 0
    whole = quantize_weight(weight, torch.eye(64), format, group_size, "rtn")
    made = quantize_table(weight.split(33), 100, 64, format, group_size)
    assert made.spec.weight == whole.spec
    assert made.tensors.keys() == whole.tensors().keys()
    assert all(torch.equal(made.tensors[name], tensor) for name, tensor in whole.tensors().items())
    error = (whole.dequantize() - weight.float()).norm() / weight.float().norm()
    assert made.report["weight_rel_rmse"] == pytest.approx(float(error), rel=1e-5)
    assert sum(made.report["weight_histogram"]["counts"]) == 33 * 64


def test_tables_that_cannot_be_quantized_by_rows_are_refused():
    weight = torch.ones(4, 64)
    with pytest.raises(ValueError, match="table4 has a codebook of all rows"):
        quantize_table([weight], 4, 64, "table4", 64)
    for rows in (3, 5):
        with pytest.raises(ValueError, match=f"of {rows} rows"):
            quantize_table([weight], rows, 64, "int8", 64)
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_table([weight / 0], 4, 64, "int8", 64)
