"""Text encoders quantized beside the transformers: calibrated, streamed, resumed, loaded, measured, made dense."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import quantdit
import tiny_pipelines
from quantdit.checkpoints import checkpoint, streaming
from quantdit.compiling import quantize_blocks
from quantdit.compiling.report import REPORT
from quantdit.layers.quant_embedding import QuantEmbedding
from quantdit.recipes.presets import encoder_bits_of
from quantdit.system import files

ENCODERS = {
    "WanPipeline": ("text_encoder",),
    "FluxPipeline": ("text_encoder", "text_encoder_2"),
    "StableDiffusion3Pipeline": ("text_encoder", "text_encoder_2", "text_encoder_3"),
    "QwenImagePipeline": ("text_encoder",),
}
STEPS = 2
# What a script of a user does, in a process of its own.
SAMPLE = """
import sys, torch, quantdit
from diffusers import DiffusionPipeline
folder, output, options = sys.argv[1], sys.argv[2], eval(sys.argv[3])
pipeline = DiffusionPipeline.from_pretrained(folder)
options |= {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
made = pipeline("a red fox running", **options)
torch.save(torch.from_numpy(made.frames if hasattr(made, "frames") else made.images), output)
"""


def sizes_of(name: str) -> dict[str, int]:
    """Return the size of a tiny pipeline's samples, as the pipeline is called with."""
    return dict(zip(("height", "width", "num_frames"), tiny_pipelines.PIPELINES[name].size, strict=False))


def digests(folder: Path, parts: tuple[str, ...]) -> dict[str, str]:
    """Return the sha256 of the weights of each part."""
    return {part: files.digest(folder / part) for part in parts}


@pytest.fixture(scope="module", params=ENCODERS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path, dict]:
    """A tiny pipeline by name, its folder, that of all its components quantized, and how it was calibrated."""
    name = request.param
    work = tmp_path_factory.mktemp(name)
    full, size = tiny_pipelines.write_tiny(name, work / "full"), tiny_pipelines.PIPELINES[name].size
    how = {"samples": 2, "steps": STEPS, **dict(zip(("height", "width", "frames"), size, strict=False))}
    result = quantdit.calibrate(str(full), "w4a8", work / "small", components="all", **how)
    assert set(result.blocks) == {"transformer", *ENCODERS[name]}
    return name, full, work / "small", how


def test_every_component_is_quantized_and_smaller(made) -> None:
    name, _, small, _ = made
    report = files.read_json(small / REPORT)
    assert report["recipe"]["component"].keys() == set(ENCODERS[name])
    together = report["model_rel_rmse_together"]["transformer"]
    # The encoders add to what the transformer's own quantization costs.
    assert 0.9 * report["model_rel_rmse_of_parts"]["transformer"] < together < 0.5
    for part in ENCODERS[name]:
        config = files.read_json(small / part / "config.json")["quantization_config"]
        kinds = {entry["weight"]["format"] for entry in config["layers"].values()}
        assert kinds == {"table4", "int6"}, "linears of blocks, and the table of words"
        errors = [
            layer["rel_rmse"] for key, layer in report["layers"].items() if key.startswith(f"{part}.") and "rel_rmse" in layer
        ]
        assert errors and all(0 < error < 0.3 for error in errors)
        assert 0 < report["model_rel_rmse_of_parts"][part] < 0.3
        encoder = getattr(quantdit.load(small), part)
        assert sum(isinstance(module, QuantEmbedding) for module in encoder.modules()) == 1


def test_another_process_makes_the_same_samples(made, tmp_path: Path) -> None:
    name, _, small, _ = made
    options = sizes_of(name)
    pipeline = quantdit.load(small)
    here = pipeline(
        "a red fox running", num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), output_type="np", **options
    )
    here = torch.from_numpy(here.frames if hasattr(here, "frames") else here.images)
    output = tmp_path / "there.pt"
    subprocess.run([sys.executable, "-c", SAMPLE, str(small), str(output), repr(options)], check=True, capture_output=True)
    assert torch.equal(here, torch.load(output, weights_only=True))


@pytest.mark.parametrize("made", ["WanPipeline", "StableDiffusion3Pipeline"], indirect=True)
def test_streamed_and_resident_give_the_same_bytes(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, full, small, how = made
    monkeypatch.setattr(streaming, "need_of", lambda *_: streaming.Need(resident=100, streamed=1))
    quantdit.calibrate(str(full), "w4a8", tmp_path / "streamed", components="all", memory_budget=50, **how)
    assert files.read_json(tmp_path / "streamed" / REPORT)["memory"]["streamed"]
    parts = ("transformer", *ENCODERS[name])
    assert digests(tmp_path / "streamed", parts) == digests(small, parts)


@pytest.mark.parametrize("made", ["FluxPipeline", "QwenImagePipeline"], indirect=True)
def test_interrupted_run_goes_on_with_the_same_bytes(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends in the last text encoder, whose first block is finished."""
    name, full, small, how = made
    write, last = quantize_blocks._write, ENCODERS[name][-1]

    def ends(job, *rest: object) -> None:
        write(job, *rest)
        if job.folder.name == last:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quantize_blocks, "_write", ends)
        quantdit.calibrate(str(full), "w4a8", tmp_path / "out", components="all", **how)
    quantdit.calibrate(str(full), "w4a8", tmp_path / "out", components="all", resume=True, **how)
    parts = ("transformer", *ENCODERS[name])
    assert digests(tmp_path / "out", parts) == digests(small, parts)


def test_an_encoder_alone_is_quantized_beside_a_transformer_that_is_not_in_memory(
    wan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, _ = wan
    how = {"samples": 1, "steps": STEPS, "height": 32, "width": 32, "frames": 5}
    for name, budget in (("resident", None), ("streamed", 50)):
        if budget is not None:
            monkeypatch.setattr(streaming, "need_of", lambda *_: streaming.Need(resident=100, streamed=1))
        quantdit.calibrate(str(full), "w8a8", tmp_path / name, components="text_encoder", memory_budget=budget, **how)
    assert files.digest(tmp_path / "resident" / "text_encoder") == files.digest(tmp_path / "streamed" / "text_encoder")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple]:
    """A tiny Wan, and the options that it is calibrated with."""
    folder = tiny_pipelines.write_tiny("WanPipeline", tmp_path_factory.mktemp("wan") / "full")
    return folder, ("--samples", 1, "--steps", STEPS, *tiny_pipelines.PIPELINES["WanPipeline"].options)


def test_transformer_alone_is_the_default_and_its_bytes_do_not_depend_on_the_others(wan, cli, tmp_path: Path) -> None:
    full, how = wan
    for name, more in (
        ("alone", ()),
        ("both", ("--components", "transformer,text_encoder")),
        ("other", ("--components", "text_encoder")),
    ):
        ran = cli("calibrate", "--model", full, "--bits", "w8a8", *how, *more, "--output", tmp_path / name)
        assert ran.code == 0, ran.err
    quantized = {
        n: {p for p in ("transformer", "text_encoder") if checkpoint.is_quantized(tmp_path / n / p)}
        for n in ("alone", "both", "other")
    }
    assert quantized == {"alone": {"transformer"}, "both": {"transformer", "text_encoder"}, "other": {"text_encoder"}}
    for part, names in (("text_encoder", ("other", "both")), ("transformer", ("alone", "both"))):
        one, two = (load_file(files.weight_files(tmp_path / name / part)[0]) for name in names)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_recipe_has_a_section_for_each_encoder(wan, cli, tmp_path: Path) -> None:
    full, how = wan
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        '[[rule]]\nmatch = "*"\nweight = "int8"\n'
        '[[component.text_encoder.rule]]\nmatch = "role:feed_forward"\nweight = "int4"\n'
        '[[component.text_encoder.rule]]\nmatch = "*"\nweight = "dense"\n'
    )
    ran = cli("calibrate", "--model", full, "--recipe", recipe, "--components", "all", *how, "--output", tmp_path / "out")
    assert ran.code == 0, ran.err
    layers = files.read_json(tmp_path / "out" / "text_encoder" / "config.json")["quantization_config"]["layers"]
    assert layers and all("DenseReluDense" in name and entry["weight"]["format"] == "int4" for name, entry in layers.items())


@pytest.mark.parametrize("name", ["w4a8", "mine"])
def test_a_recipe_without_a_section_does_not_say_by_its_name(name: str, wan, cli, tmp_path: Path) -> None:
    full, how = wan
    recipe = tmp_path / f"{name}.toml"
    recipe.write_text('[[rule]]\nmatch = "*"\nweight = "int8"\n')
    arguments = ("calibrate", "--model", full, "--recipe", recipe, "--components", "all", *how)
    ran = cli(*arguments, "--output", tmp_path / "out")
    assert ran.code == 1 and "does not say how text_encoder is quantized; give --encoder-bits" in ran.err, ran.err


@pytest.mark.parametrize(("bits", "expected"), [("w2a16", "w3a16"), ("w3a8", "w3a16"), ("w6a8", "w8a16"), ("autoa8", "w4a16")])
def test_encoders_are_as_narrow_as_the_transformer_with_wider_inputs(bits: str, expected: str) -> None:
    assert encoder_bits_of(bits) == expected


REFUSED = {
    "unknown component": (
        ("--bits", "w4a8", "--components", "vae"),
        "has no component 'vae' that can be quantized; it has transformer, text_encoder",
    ),
    "unknown bits": (
        ("--bits", "w4a8", "--components", "all", "--encoder-bits", "w2a16"),
        "unknown bits 'w2a16' of a text encoder",
    ),
    "nothing": (("--bits", "w4a8", "--components", ""), "component"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_quantized_is_refused_in_a_line(case: str, wan, cli, tmp_path: Path) -> None:
    full, how = wan
    arguments, message = REFUSED[case]
    ran = cli("calibrate", "--model", full, *arguments, *how, "--output", tmp_path / "out")
    assert ran.code == 1 and message in ran.err, ran.err
    assert not (tmp_path / "out").exists()


def test_encoder_that_is_quantized_already_is_refused_by_name(wan, cli, tmp_path: Path) -> None:
    full, how = wan
    ran = cli(
        "calibrate", "--model", full, "--bits", "w8a8", "--components", "text_encoder", *how, "--output", tmp_path / "first"
    )
    assert ran.code == 0, ran.err
    ran = cli(
        "calibrate", "--model", tmp_path / "first", "--bits", "w8a8", "--components", "all", *how, "--output", tmp_path / "second"
    )
    assert ran.code == 1 and "text_encoder" in ran.err and "quantized already" in ran.err, ran.err


def test_inspect_and_dense_export_take_every_component(wan, cli, tmp_path: Path) -> None:
    full, how = wan
    ran = cli("calibrate", "--model", full, "--bits", "w8a8", "--components", "all", *how, "--output", tmp_path / "small")
    assert ran.code == 0, ran.err
    ran = cli("inspect", tmp_path / "small", "--json")
    assert ran.code == 0 and any(name.startswith("text_encoder.") for name in json.loads(ran.out)["layers"]), ran.err
    assert cli("export", tmp_path / "small", "--to", "dense", "--output", tmp_path / "dense").code == 0
    pipeline, quantized = quantdit.load(tmp_path / "dense"), quantdit.load(tmp_path / "small")
    assert not checkpoint.quant_layers(pipeline.text_encoder) and not checkpoint.quant_layers(pipeline.transformer)
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        got, wanted = (p.text_encoder(tokens).last_hidden_state for p in (pipeline, quantized))
    assert float((got - wanted).norm() / wanted.norm()) < 0.02  # bfloat16


def test_evaluate_compares_all_components_or_some_of_them(wan, cli, tmp_path: Path) -> None:
    """Only the transformer, only the encoder: the sum of both is more than either."""
    pytest.importorskip("efficientnet_lite_pytorch")
    full, how = wan
    ran = cli("calibrate", "--model", full, "--bits", "w4a8", "--components", "all", *how, "--output", tmp_path / "small")
    assert ran.code == 0, ran.err
    sampling = ("--samples", 4, "--steps", STEPS, "--probes", 2, *tiny_pipelines.PIPELINES["WanPipeline"].options)
    found = {}
    for only in ("", "transformer", "text_encoder"):
        more = ("--only", only) if only else ()
        ran = cli("evaluate", full, tmp_path / "small", *sampling, *more, "--output", tmp_path / f"drift-{only}")
        assert ran.code == 0, ran.err
        found[only] = files.read_json(tmp_path / f"drift-{only}" / "report.json")["drift"]["PSNR"]["mean"]
    assert found[""] < found["text_encoder"] and found["text_encoder"] != found["transformer"]
