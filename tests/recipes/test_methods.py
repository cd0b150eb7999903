"""One word for a paper: what `--method` makes of bits, that it calibrates, saves and loads, and what it refuses."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import quantdit
from quantdit.compiling.report import REPORT
from quantdit.layers.quant_linear import QuantLinear
from quantdit.models.adapter import adapter_for
from quantdit.models.synthetic import synthetic_inputs
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.finetuning import FineTuning
from quantdit.recipes.presets import METHODS, finetuning_of, from_bits
from quantdit.recipes.rules import DENSE, Recipe, Rule
from quantdit.recipes.sampling_plan import Size
from quantdit.system import files

PAPERS = {"lrq-dit": "2508.03485", "vq4dit": "2408.17131"}
FEW = ("--samples", "16", "--steps", "2")

# What the papers say of each rule: LRQ-DiT sections 4.1 and 4.2, VQ4DiT's settings.
NEAREST = {"method": "rtn", "act_order": False, "cd_passes": 0, "bias_correction": False}
TLQ = {"table": "twin-log", "table_rows": "channel", "rotation": "ars", "ars_threshold": 1.0, "smooth": "absmax", "low_rank": 0}
TOKEN = {"activation_format": "int", "activation_group_size": "token", "activation_scale": "dynamic"}
WORDS = {"rotation": "none", "activation_bits": 16, "smooth": "none", "low_rank": 0}
SAID = {
    ("lrq-dit", "w4a8"): {"weight": "table4", "activation_bits": 8, **TLQ, **TOKEN, **NEAREST},
    ("lrq-dit", "w4a4"): {"weight": "table4", "activation_bits": 4, **TLQ, **TOKEN, **NEAREST},
    ("lrq-dit", "w3a8"): {"weight": "table3", "activation_bits": 8, **TLQ, **TOKEN, **NEAREST},
    ("lrq-dit", "w3a6"): {"weight": "table3", "activation_bits": 6, **TLQ, **TOKEN, **NEAREST},
    ("vq4dit", "w2a16"): {"weight": "vq256x4", "fallback": "table2", **WORDS, **NEAREST},
    ("vq4dit", "w3a16"): {"weight": "vq64x2", "fallback": "table3", **WORDS, **NEAREST},
}
LEFT_ALONE = {"lrq-dit": {"role:outside", "role:modulation", "role:embedder"}, "vq4dit": {"role:outside", "role:embedder"}}


@pytest.mark.parametrize(("method", "bits"), SAID)
def test_the_recipe_is_what_the_paper_says(method: str, bits: str):
    *before, last = from_bits(bits, method).rules
    assert last.match == "*" and {key: getattr(last, key) for key in SAID[method, bits]} == SAID[method, bits]
    assert {rule.match for rule in before} == LEFT_ALONE[method]
    assert all(rule.weight == DENSE and rule.optional for rule in before)


def test_the_training_is_what_the_paper_says():
    said = {"steps": 500, "candidates": 2, "mode": "block", "initial": "distance", "distance": "weight", "optimizer": "rmsprop"}
    said |= {"logit_rate": 5e-2, "codebook_rate": 1e-4}
    for bits in METHODS["vq4dit"].bits:
        assert said.items() <= asdict(finetuning_of(bits, "vq4dit")).items()
    assert finetuning_of("w4a8", "lrq-dit") is None
    assert finetuning_of("w2a16") == finetuning_of("w2a16", "best") == FineTuning(candidates=1)


def test_every_method_makes_a_recipe_of_all_its_bits():
    for name, method in METHODS.items():
        assert method.bits and all(isinstance(from_bits(bits, name), Recipe) for bits in method.bits)
    assert from_bits("w3a8", "best") == from_bits("w3a8")


def test_the_help_names_the_papers(cli):
    text = cli("calibrate", "--help").out
    assert all(method.about in text and method.arxiv in text for method in METHODS.values())
    assert all(f"arXiv {number}" in text and name in text for name, number in PAPERS.items())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--bits", "w4a8", "--method", "lrqdit"), ("'lrqdit'", "did you mean lrq-dit", "best, lrq-dit, vq4dit")),
        (("--bits", "w2a8", "--method", "lrq-dit"), ("'w2a8' of method lrq-dit", "w3a4, w3a6, w3a8", "--method best has w2a8")),
        (("--bits", "w4a16", "--method", "vq4dit"), ("'w4a16' of method vq4dit", "w2a16, w3a16", "--method best has w4a16")),
        (("--bits", "auto", "--method", "vq4dit"), ("'auto' of method vq4dit",)),
        (("--bits", "w4a8", "--method", "lrq-dit", "--samples", "0"), ("lrq-dit", "--samples 0")),
        (("--bits", "w2a16", "--method", "vq4dit", "--samples", "0"), ("vq4dit", "--samples 0")),
        (("--bits", "w2a16", "--method", "vq4dit", "--weight-format", "trellis"), ("vq4dit", "leave out --weight-format")),
        (("--bits", "w4a8", "--method", "lrq-dit", "--size-budget", "0.25"), ("lrq-dit", "leave out --size-budget")),
        (("--bits", "w4a8", "--method", "lrq-dit", "--max-output-error", "0.1"), ("lrq-dit", "leave out --max-output-error")),
    ],
)
def test_what_a_method_does_not_have_is_one_line(cli, pixel_dit: Path, tmp_path: Path, given: tuple, words: tuple):
    ran = cli("calibrate", "--model", pixel_dit, "--output", tmp_path / "out", *given)
    assert ran.code == 1 and all(word in ran.error for word in words), ran.error
    assert not list(tmp_path.iterdir())


def test_a_method_beside_a_recipe_is_refused(cli, pixel_dit: Path, tmp_path: Path):
    toml = tmp_path / "mine.toml"
    toml.write_text('[[rule]]\nmatch = "*"\nweight = "int8"\n')
    ran = cli("calibrate", "--model", pixel_dit, "--output", tmp_path / "out", "--recipe", toml, "--method", "vq4dit")
    assert ran.code == 1 and "leave out --recipe" in ran.error


def test_lrq_dit_calibrates_saves_and_loads(cli, pixel_dit: Path, tmp_path: Path):
    ran = cli("calibrate", "--model", pixel_dit, "--output", tmp_path / "out", "--bits", "w4a4", "--method", "lrq-dit", *FEW)
    assert ran.code == 0, ran.err
    report = files.read_json(tmp_path / "out" / REPORT)
    assert report["recipe"]["name"] == "w4a4 lrq-dit"
    for name, layer in report["layers"].items():
        assert ".attn1." in name or ".ff." in name
        assert layer["rotation"]["asked"] == "ars"
        assert layer["rotation"]["chosen"] == ("hadamard" if layer["rms"] < 1 else "outlier")
    loaded, _ = load_pipeline(str(tmp_path / "out"))
    layers = [m for m in loaded.transformer.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == len(report["layers"])
    for layer in layers:
        assert layer.layer_spec.activation.bits == 4 and layer.spec.codebook_rows == layer.out_features
        # Half of the levels are a sign's; the smallest may round to zero.
        assert all(int(count) in (7, 8) for sign in (1, -1) for count in (sign * layer.codebook > 0).sum(dim=1))


def test_vq4dit_trains_assignments_saves_and_loads(cli, pixel_dit: Path, tmp_path: Path):
    few = ("--bits", "w2a16", "--method", "vq4dit", *FEW)
    for name, steps in (("kmeans", 0), ("trained", 30), ("again", 30)):
        ran = cli("calibrate", "--model", pixel_dit, "--output", tmp_path / name, *few, "--finetune-steps", steps)
        assert ran.code == 0, ran.err
    plain, report = (files.read_json(tmp_path / name / REPORT) for name in ("kmeans", "trained"))
    assert "training" not in plain["provenance"]
    assert report["provenance"]["training"] == asdict(finetuning_of("w2a16", "vq4dit")) | {"steps": 30}
    trained = [layer["assignments"] for layer in report["layers"].values()]
    assert any(row["helped"] and row["held_out"] < row["held_out_before"] and row["frozen"] > 0 for row in trained)
    first, second, third = (load_pipeline(str(tmp_path / name))[0].transformer for name in ("kmeans", "trained", "again"))
    codes = {name: m.data for name, m in first.named_modules() if isinstance(m, QuantLinear)}
    moved = {name: m.data for name, m in second.named_modules() if isinstance(m, QuantLinear)}
    assert codes.keys() == moved.keys() == report["layers"].keys()
    assert any(not torch.equal(codes[name], moved[name]) for name in codes)
    assert any(".norm1.linear" in name for name in codes)
    stored = third.state_dict()
    assert all(torch.equal(tensor, stored[key]) for key, tensor in second.state_dict().items())


@pytest.fixture
def model() -> torch.nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "sample_size": 8, "norm_num_groups": 1}
    return DiTTransformer2DModel(in_channels=4, out_channels=4, **sizes)


def test_quantize_takes_a_method(model: torch.nn.Module):
    adapter, generator = adapter_for(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        inputs = [synthetic_inputs(model, adapter, Size(4, 1, 8, 8, 4), generator, time) for time in (900.0, 100.0)]
        made = quantdit.quantize(model, "w2a16", inputs, method="vq4dit", finetune_steps=3)
    state = made.config.quantization_config.state
    assert state["recipe"]["name"] == "w2a16 vq4dit"
    assert state["provenance"]["training"] == asdict(finetuning_of("w2a16", "vq4dit")) | {"steps": 3}
    assert {layer["weight"]["format"] for layer in state["layers"].values()} == {"vq256x4"}


@pytest.mark.parametrize(
    ("recipe", "given", "words"),
    [
        ("w4a8", {"method": "lrq-dit"}, "'lrq-dit' calibrates"),
        ("w2a16", {"method": "vq4dit"}, "'vq4dit' calibrates"),
        ("w4a8", {"method": "no"}, "unknown method 'no'"),
        ("w2a8", {"method": "lrq-dit", "inputs": []}, "w3a4"),
        (Recipe("one", (Rule("*", "int8"),)), {"method": "lrq-dit", "inputs": []}, "leave out method="),
    ],
)
def test_quantize_refuses_a_method_in_words(model: torch.nn.Module, recipe: object, given: dict, words: str):
    with pytest.raises(ValueError, match=words):
        quantdit.quantize(model, recipe, **given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"bits": "w4a8", "method": "lrq-dit"}, "needs calibration data.*--method lrq-dit"),
        ({"bits": "w2a16", "method": "vq4dit"}, "needs calibration data.*--method vq4dit"),
        ({"bits": "w4a8", "method": "no"}, "unknown method 'no'"),
        ({"recipe": Recipe("one", (Rule("*", "int8"),)), "method": "lrq-dit"}, "leave out method="),
    ],
)
def test_loading_refuses_a_method_in_words(given: dict, words: str):
    with pytest.raises(ValueError, match=words):
        quantdit.QuantDiTConfig(**given)
