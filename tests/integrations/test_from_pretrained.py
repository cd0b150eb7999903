"""diffusers loads, saves and dequantizes quantized folders: bit for bit, and as suspicious of them as our own reader."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantdit
from quantdit import QuantDiTConfig
from quantdit.checkpoints import checkpoint
from quantdit.checkpoints.checkpoint import quant_layers
from quantdit.inspection.inspection import inspect
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.rules import Recipe, Rule
from quantdit.system import files
from quantdit.system.files import WEIGHTS, CheckpointError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def same_tensors(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


# ---- bit for bit


def test_the_fixture_holds_every_family_of_formats(made):
    specs = [layer.layer_spec for layer in quant_layers(made.model).values()]
    families = {"int4", "table3", "vq256x4", "trellis3_l10", "fp8_e4m3", "int8", "table4"}
    assert {spec.weight.format for spec in specs} == families
    assert {spec.rotation for spec in specs} >= {"hadamard", "outlier"}
    assert max(spec.rank for spec in specs) > 0 and max(spec.activation.buckets for spec in specs) == 10
    assert len(list((made.folder / "many").glob("*.safetensors"))) > 2


@pytest.mark.parametrize("layout", ["one", "many"])
def test_memory_load_and_from_pretrained_give_the_same_bits(made, run, layout: str):
    folder = made.folder / layout
    loaded = quantdit.load(folder)
    read = made.cls.from_pretrained(folder)
    assert same_tensors(loaded, made.model) and same_tensors(read, made.model)
    for inputs in made.inputs:
        expected = run(made.model, inputs)
        assert torch.equal(run(loaded, inputs), expected)
        assert torch.equal(run(read, inputs), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["one", "many"])
def test_load_and_from_pretrained_agree_in_every_dtype(made, run, layout: str, dtype: torch.dtype):
    folder = made.folder / layout
    loaded, read = quantdit.load(folder, dtype=dtype), made.cls.from_pretrained(folder, torch_dtype=dtype)
    assert loaded.dtype == read.dtype == dtype
    assert same_tensors(loaded, read)
    for layer in quant_layers(read).values():
        assert layer.scale.dtype == torch.float32
    for inputs in made.inputs:
        assert torch.equal(run(loaded, inputs), run(read, inputs))


def test_modules_that_the_class_keeps_in_float32_stay_so(made):
    """Wan asks for it, and its forward relies on it."""
    kept = getattr(made.cls, "_keep_in_fp32_modules", None) or ()
    for model in (
        quantdit.load(made.folder / "one", dtype=torch.bfloat16),
        made.cls.from_pretrained(made.folder / "one", torch_dtype=torch.bfloat16),
    ):
        wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
        assert wide == {name for name, _ in model.named_parameters() if set(kept) & set(name.split("."))}
        assert bool(wide) == (made.name == "WanTransformer3DModel")


def test_what_calibrate_wrote_loads_with_diffusers_in_every_format(everything, run):
    """All fifteen formats of the command line's folder: in memory, by our reader, by diffusers."""
    folder = everything.folder / "transformer"
    generator = torch.Generator().manual_seed(5)
    inputs = {
        "hidden_states": torch.randn(2, 1, 8, 8, generator=generator),
        "timestep": torch.tensor([900, 17]),
        "class_labels": torch.tensor([0, 2]),
    }
    read = type(everything.transformer).from_pretrained(folder)
    assert torch.equal(run(read, inputs), run(everything.transformer, inputs))
    narrow = type(read).from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert torch.equal(run(narrow, inputs), run(checkpoint.read_transformer(folder, torch.bfloat16), inputs))


def test_saving_again_and_again_changes_nothing(made, run, tmp_path: Path):
    folder = made.folder / "one"
    for number in range(2):
        made.cls.from_pretrained(folder).save_pretrained(tmp_path / str(number))
        folder = tmp_path / str(number)
    assert same_tensors(made.cls.from_pretrained(folder), made.model)
    first, last = (files.read_json(f / "config.json")["quantization_config"] for f in (made.folder / "one", folder))
    assert first == last
    header = [files.open_weights(f / WEIGHTS).metadata()["quantdit"] for f in (made.folder / "one", folder)]
    assert header[0] == header[1] and json.loads(header[0])["recipe"]["name"] == "downstream"


def test_bfloat16_is_saved_as_it_runs(made, run, tmp_path: Path):
    narrow = quantdit.load(made.folder / "one", dtype=torch.bfloat16)
    narrow.save_pretrained(tmp_path / "narrow", max_shard_size="50KB")
    again = made.cls.from_pretrained(tmp_path / "narrow", torch_dtype=torch.bfloat16)
    assert torch.equal(run(again, made.inputs[0]), run(narrow, made.inputs[0]))


# ---- pipelines


def test_a_whole_pipeline_loads_and_samples_as_ours(plain_dit: Path, tmp_path: Path):
    from diffusers import DiffusionPipeline

    pipeline, _ = load_pipeline(str(plain_dit))
    quantdit.quantize(pipeline.transformer, "w4a8", lambda: pipeline([1, 2], num_inference_steps=2))
    expected = pipeline([3], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    pipeline.save_pretrained(tmp_path / "out")
    for again in (DiffusionPipeline.from_pretrained(tmp_path / "out"), quantdit.load(tmp_path / "out")):
        again.set_progress_bar_config(disable=True)
        images = again([3], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
        assert (images == expected).all()


def test_scales_of_trellis_codes_are_trained_in_memory_too(tiny):
    """On the outputs of blocks; the codes of the first block, which nothing trained comes before, stay."""
    plan = Recipe("queries", (Rule("*to_q", "trellis2_l10", method="rtn"),))
    made = []
    for steps in (0, 20):
        model, inputs = tiny("DiTTransformer2DModel")
        quantdit.quantize(model, plan, inputs, finetune_steps=steps)
        made.append(quant_layers(model)["transformer_blocks.0.attn1.to_q"])
    assert torch.equal(made[0].data, made[1].data) and not torch.equal(made[0].scale, made[1].scale)


def test_bits_are_trained_as_their_preset_says(tiny, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr("quantdit.compiling.in_memory.finetuning_of", lambda *given: asked.append(given))
    model, inputs = tiny("DiTTransformer2DModel")
    quantdit.quantize(model, "w8a8", inputs)
    assert asked == [("w8a8", "best")]


@pytest.mark.parametrize(("name", "asked"), [("fashion-dit", [3]), ("emoji-wan", "a bat moving left")])
def test_diffusers_knows_the_pipelines_of_the_embedded_models(name: str, asked: object, tmp_path: Path):
    """Their classes are quantdit's own; model_index.json names them as it names diffusers'."""
    from diffusers import DiffusionPipeline

    def sampled(pipeline: DiffusionPipeline) -> object:
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipeline(asked, num_inference_steps=1, guidance_scale=1, generator=generator, output_type="pt")[0]

    pipeline = quantdit.load(name)
    quantdit.quantize(pipeline.transformer, "w8a8")
    pipeline.save_pretrained(tmp_path / "quantized")
    again = DiffusionPipeline.from_pretrained(tmp_path / "quantized")
    assert type(again) is type(pipeline) and quant_layers(again.transformer)
    assert torch.equal(sampled(again), sampled(pipeline))
    again.save_pretrained(tmp_path / "again", max_shard_size="500KB")
    assert torch.equal(sampled(type(again).from_pretrained(tmp_path / "again")), sampled(pipeline))


def test_a_pipeline_is_quantized_while_it_loads(plain_dit: Path):
    from diffusers import DiffusionPipeline, PipelineQuantizationConfig

    wanted = PipelineQuantizationConfig(quant_mapping={"transformer": QuantDiTConfig(bits="w4a8")})
    pipeline = DiffusionPipeline.from_pretrained(plain_dit, quantization_config=wanted)
    assert {layer.spec.format for layer in quant_layers(pipeline.transformer).values()} == {"table4"}
    named = PipelineQuantizationConfig(
        quant_backend="quantdit", quant_kwargs={"bits": "w4a8"}, components_to_quantize=["transformer"]
    )
    again = DiffusionPipeline.from_pretrained(plain_dit, quantization_config=named)
    assert same_tensors(again.transformer, pipeline.transformer)


# ---- quantization while loading


def test_one_configuration_serves_several_models(made, run):
    config = QuantDiTConfig(bits="w8a16")
    first, second = (made.cls.from_pretrained(made.folder / "full", quantization_config=config) for _ in range(2))
    assert same_tensors(first, second) and quant_layers(second)
    assert config.state is None


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, "w4a8"), (torch.bfloat16, "w8a16")], ids=str)
def test_quantized_while_loading_is_what_the_command_line_makes_without_data(
    made, run, cli, tmp_path: Path, dtype: torch.dtype, bits: str
):
    source = tmp_path / "source"
    # Weights of 16 bits, as published; what is cast to float16 and back was rounded before it is quantized.
    made.cls.from_pretrained(made.folder / "full", torch_dtype=torch.bfloat16).save_pretrained(source)
    loaded = made.cls.from_pretrained(source, torch_dtype=dtype, quantization_config=QuantDiTConfig(bits=bits, seed=3))
    ran = cli("calibrate", "--model", source, "--bits", bits, "--samples", 0, "--seed", 3, "--output", tmp_path / "out")
    assert ran.code == 0, ran.err
    written = checkpoint.read_transformer(tmp_path / "out" / "transformer", dtype)
    assert same_tensors(loaded, written)
    assert torch.equal(run(loaded, made.inputs[0]), run(written, made.inputs[0]))
    loaded.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    assert same_tensors(made.cls.from_pretrained(tmp_path / "saved", torch_dtype=dtype), loaded)
    saved, calibrated = (inspect(tmp_path / name).layers.values() for name in ("saved", "out"))
    errors = [layer.error for layer in saved]
    assert errors == [layer.error for layer in calibrated] and min(errors) > 0


def test_modules_can_be_left_alone(made):
    config = QuantDiTConfig(recipe=Recipe("one", (Rule("*", "int8"),)), modules_to_not_convert=["to_q", "norm"])
    layers = quant_layers(made.cls.from_pretrained(made.folder / "full", quantization_config=config))
    assert layers and not [name for name in layers if "to_q" in name or "norm" in name]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "one of the two"),
        ({"bits": "w4a8", "recipe": "x.toml"}, "one of the two"),
        ({"bits": "w5a8"}, "did you mean"),
        ({"bits": "autoa8"}, "needs calibration data"),
        ({"bits": "w8a8", "weight_format": "vq"}, "w2 or w3 or w4"),
    ],
)
def test_a_senseless_configuration_is_refused(arguments: dict, words: str):
    with pytest.raises(ValueError, match=words):
        QuantDiTConfig(**arguments)


def test_a_misspelled_argument_is_refused():
    with pytest.raises(TypeError, match="takes no 'bit'"):
        QuantDiTConfig(bit="w4a8")


def test_broken_weights_are_refused_while_loading(made, tmp_path: Path):
    folder = Path(shutil.copytree(made.folder / "full", tmp_path / "full"))
    tensors = load_file(folder / WEIGHTS)
    name = next(key for key in tensors if key.endswith("to_q.weight"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"layer {name.removesuffix('.weight')}: 1 values"):
        made.cls.from_pretrained(folder, quantization_config=QuantDiTConfig(bits="w4a8"))


# ---- hostile folders


@pytest.fixture
def one_class(made):
    """The checks know nothing of classes, so that one will do."""
    if made.name != "DiTTransformer2DModel":
        pytest.skip("checked with DiT")
    return made


def damaged(folder: Path, key: str, forged: bool) -> None:
    """Set a tensor's first entry to NaN or another code; `forged`: the digest in the header is made to fit."""
    header = files.open_weights(folder / WEIGHTS).metadata()
    tensors = load_file(folder / WEIGHTS)
    flat = tensors[key].view(-1)
    flat[0] = float("nan") if flat.is_floating_point() else flat[0] ^ 1
    if forged:
        content = json.loads(header["quantdit"]) | {"tensors_sha256": checkpoint.tensors_digest(tensors.items())}
        header["quantdit"] = json.dumps(content)
    save_file(tensors, folder / WEIGHTS, header)


def readers(made, folder: Path) -> list:
    return [lambda: made.cls.from_pretrained(folder), lambda: checkpoint.read_transformer(folder)]


@pytest.mark.parametrize("field", ["data", "scale", "bias"])
def test_damage_to_a_saved_folder_is_found(one_class, tmp_path: Path, field: str):
    made = one_class
    folder = Path(shutil.copytree(made.folder / "one", tmp_path / "copy"))
    name = next(n for n, layer in quant_layers(made.model).items() if layer.spec.format == "int4" and layer.bias is not None)
    damaged(folder, f"{name}.{field}", forged=False)
    for read in readers(made, folder):
        with pytest.raises(CheckpointError, match="sha256"):
            read()


@pytest.mark.parametrize("field", ["scale", "bias"])
def test_values_no_calibration_writes_are_refused_by_diffusers_too(one_class, tmp_path: Path, field: str):
    made = one_class
    folder = Path(shutil.copytree(made.folder / "one", tmp_path / "copy"))
    name = next(n for n, layer in quant_layers(made.model).items() if layer.spec.format == "int4" and layer.bias is not None)
    damaged(folder, f"{name}.{field}", forged=True)
    for read in readers(made, folder):
        with pytest.raises(CheckpointError, match=rf"{name}.*(NaN|not finite)"):
            read()


def change(folder: Path, **entries: object) -> None:
    content = files.read_json(folder / "config.json")
    content["quantization_config"].update(entries)
    files.write_json(folder / "config.json", content)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"spec": 1}, "calibrate the model again"),
        ({"spec": 99, "news": [1]}, "upgrade quantdit"),
        ({"layers": {"nowhere.to_q": {}}}, "does not exist"),
        ({"layers": None}, "table of layers"),
        ({"timestep_edges": [1.0, 3.0, 2.0]}, "all fall or all rise"),
        ({"sha256": "0" * 64}, "sha256"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(one_class, tmp_path: Path, entries: dict, words: str):
    made = one_class
    folder = Path(shutil.copytree(made.folder / "one", tmp_path / "copy"))
    change(folder, **entries)
    for read in readers(made, folder):
        with pytest.raises(CheckpointError, match=words):
            read()


def test_a_missing_shard_tensor_and_pickled_weights_are_refused(one_class, tmp_path: Path):
    made = one_class
    folder = Path(shutil.copytree(made.folder / "one", tmp_path / "copy"))
    tensors, header = load_file(folder / WEIGHTS), files.open_weights(folder / WEIGHTS).metadata()
    del tensors[next(key for key in tensors if key.endswith(".codebook"))]
    save_file(tensors, folder / WEIGHTS, header)
    for read in readers(made, folder):
        with pytest.raises(CheckpointError, match=r"codebook is missing"):
            read()
    with pytest.raises(ValueError, match="safe_serialization"):
        made.cls.from_pretrained(made.folder / "one").save_pretrained(tmp_path / "pickle", safe_serialization=False)


# ---- dequantize


def test_dequantize_leaves_an_ordinary_model(made, run, tmp_path: Path):
    model = made.cls.from_pretrained(made.folder / "one")
    weights = {name: layer.weight for name, layer in quant_layers(model).items()}
    assert model.dequantize() is model
    assert not quant_layers(model) and not hasattr(model, "hf_quantizer")
    for name, weight in weights.items():
        assert type(model.get_submodule(name)) is torch.nn.Linear
        assert torch.equal(model.get_submodule(name).weight, weight)
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in files.read_json(tmp_path / "plain" / "config.json")
    again = made.cls.from_pretrained(tmp_path / "plain")
    assert torch.equal(run(again, made.inputs[0]), run(model, made.inputs[0]))


def test_the_dense_export_of_a_transformer_alone_is_the_dequantized_one(made, cli, tmp_path: Path):
    ran = cli("export", made.folder / "many", "--to", "dense", "--output", tmp_path / "dense")
    assert ran.code == 0, ran.err
    dense = made.cls.from_pretrained(tmp_path / "dense", torch_dtype=torch.bfloat16)
    expected = made.cls.from_pretrained(made.folder / "one").dequantize().state_dict()
    assert {key: t.shape for key, t in dense.state_dict().items()} == {key: t.shape for key, t in expected.items()}
    assert all(torch.equal(t, expected[key].to(t.dtype)) or t.dtype == torch.float32 for key, t in dense.state_dict().items())


def test_without_quantized_activations_dequantizing_changes_only_rounding(made, run):
    model = made.cls.from_pretrained(made.folder / "full", quantization_config=QuantDiTConfig(bits="w8a16"))
    before = run(model, made.inputs[1])
    after = run(model.dequantize(), made.inputs[1])
    torch.testing.assert_close(after, before, atol=1e-4 * float(before.abs().max()), rtol=0)  # float32 sums in another order


# ---- registration


def started(code: str) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


TABLES = """
import diffusers.quantizers.auto as d, transformers.quantizers.auto as t, peft.tuners.lora.model as p
print([m['quantdit'].__name__ for m in (d.AUTO_QUANTIZER_MAPPING, d.AUTO_QUANTIZATION_CONFIG_MAPPING,
    t.AUTO_QUANTIZER_MAPPING, t.AUTO_QUANTIZATION_CONFIG_MAPPING)], p.dispatch_default.quantdit)
"""


QUANTDIT_FIRST = """
import sys, quantdit
assert not {'diffusers', 'transformers', 'peft'} & {name.split('.')[0] for name in sys.modules}
quantdit.QuantDiTConfig(bits='w4a8')
"""


@pytest.mark.parametrize(
    "first",
    [QUANTDIT_FIRST, "import diffusers.models, transformers.quantizers.auto, peft, quantdit"],
    ids=["quantdit first", "quantdit last"],
)
def test_registered_in_whatever_order_libraries_are_imported(first: str):
    printed = started(first + TABLES)
    assert printed == "['QuantDiTQuantizer', 'QuantDiTConfig', 'QuantDiTHfQuantizer', 'QuantDiTConfig'] True"


ORDERS = {
    "quantdit first": "import quantdit; from diffusers import DiffusionPipeline",
    "quantdit last": "from diffusers import DiffusionPipeline; import quantdit",
    "our pipeline first": "import quantdit.models.pixel_wan; from diffusers import DiffusionPipeline",
}


@pytest.mark.parametrize("order", ORDERS)
def test_diffusers_knows_them_in_whatever_order_things_are_imported(order: str):
    name = "import quantdit.models.known_models as a; print(type(DiffusionPipeline.from_pretrained(a.EMBEDDED / {!r})).__name__)"
    printed = started(f"{ORDERS[order]}; {name.format('emoji-wan')}")
    assert printed == "PixelWanPipeline"


def test_importing_a_model_imports_no_pipelines():
    code = "import sys, quantdit, diffusers.models.modeling_utils as m; print('quantdit.models.pixel_wan' in sys.modules)"
    assert started(code) == "False"
