"""transformers loads, saves and dequantizes quantized text encoders: bit for bit, and as suspicious of them as our own reader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny_encoders
import tiny_pipelines
from quantdit import QuantDiTConfig
from quantdit.calibration.data_free import quantize_without_data
from quantdit.checkpoints import checkpoint
from quantdit.checkpoints.checkpoint import quant_layers
from quantdit.checkpoints.libraries import settings_of
from quantdit.integrations.attaching import attach
from quantdit.layers.quant_embedding import QuantEmbedding, put_layer, scale_of
from quantdit.layers.quant_linear import QuantLinear
from quantdit.recipes.resolve import resolve
from quantdit.recipes.rules import Layer, Recipe, Rule
from quantdit.system import files
from quantdit.system.files import ENCODER_WEIGHTS, CheckpointError

transformers = pytest.importorskip("transformers")

# Integers with groups, tables, vectors, fp8; 16-bit, 8-bit and fp8 activations; with and without a rotation.
RULES = (
    Rule("*", "int4", group_size=32, activation_bits=8, method="rtn"),
    Rule("*", "table3", rotation="none", method="rtn"),
    Rule("*", "vq256x4", method="rtn"),
    Rule("*", "fp8_e4m3", activation_bits=8, activation_format="fp8", method="rtn"),
)
TABLES = {"int8": Rule("*", "int8", rotation="none", method="rtn"), "int4": Rule("*", "int4", rotation="none", method="rtn")}
# Weights too many formats do not fit: the head has as many inputs, but is the table in some classes.
ALONE = Recipe("alone", (Rule("lm_head", "dense", optional=True), Rule("*", "int8", method="rtn")))


def same_tensors(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def put_quantized(model: nn.Module, name: str, rule: Rule) -> None:
    module: Any = model.get_submodule(name)
    out, width = module.weight.shape
    plan = resolve(Recipe("one", (rule,)), [Layer(name, "", out, width)])[name]
    made = quantize_without_data(module.weight, None, plan, seed=0)
    if isinstance(module, nn.Embedding):
        put_layer(model, name, QuantEmbedding.from_tensors(made.spec, made.tensors, scale_of(module)))
    else:
        put_layer(model, name, QuantLinear.from_tensors(made.spec, made.tensors, module.bias))


def quantized(name: str) -> Any:
    """A tiny encoder in memory with all of RULES, its table of words quantized, as `quantdit.quantize` leaves it."""
    model = tiny_encoders.encoder(name)
    tables = tiny_encoders.tables(model)
    tied = {id(model.get_submodule(table).weight) for table in tables}
    for number, (path, module) in enumerate([*model.named_modules()]):
        if isinstance(module, nn.Linear) and id(module.weight) not in tied:
            put_quantized(model, path, RULES[number % len(RULES)])
    for table in tables:
        put_quantized(model, table, TABLES["int4" if name.startswith("Qwen") else "int8"])
    return attach(model, checkpoint.describe(model, {"name": "encoders", "rules": []}, {}))


@dataclass(frozen=True)
class Made:
    """An encoder in full precision and quantized.

    Attributes:
        name: of its class.
        model: quantized, in memory. Read only.
        folder: with the full-precision one in `full`, the quantized one in `one` file, in `many`, and as quantdit calibrate
            writes it in `calibrated`.
    """

    name: str
    model: Any
    folder: Path

    @property
    def cls(self) -> Any:
        """The class in transformers."""
        return type(self.model)

    def run(self, model: nn.Module) -> list[Tensor]:
        """Return all that a model of the class returns."""
        return tiny_encoders.outputs(model, self.name)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    known: dict[str, Made] = {}

    def made_of(name: str) -> Made:
        if name not in known:
            folder, model = tmp_path_factory.mktemp(name), quantized(name)
            tiny_encoders.encoder(name).save_pretrained(folder / "full")
            model.save_pretrained(folder / "one")
            model.save_pretrained(folder / "many", max_shard_size="8KB")
            checkpoint.write_transformer(model, folder / "calibrated", {"name": "encoders"}, {})
            known[name] = Made(name, model, folder)
        return known[name]

    return made_of


@pytest.fixture(params=tiny_encoders.TINY)
def made(request: pytest.FixtureRequest, make: Callable[[str], Made]) -> Made:
    return make(request.param)


@pytest.fixture
def t5(make: Callable[[str], Made]) -> Made:
    return make("T5EncoderModel")


# ---- bit for bit


@pytest.mark.parametrize("layout", ["one", "many", "calibrated"])
def test_memory_and_from_pretrained_give_the_same_bits(made: Made, layout: str):
    folder = made.folder / layout
    assert len(list((made.folder / "many").glob("*.safetensors"))) > 2
    read = made.cls.from_pretrained(folder)
    assert same_tensors(read, made.model)
    assert any(isinstance(layer, QuantEmbedding) for layer in quant_layers(read).values())
    assert same(made.run(read), made.run(made.model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["one", "calibrated"])
def test_our_reader_and_from_pretrained_agree_in_every_dtype(made: Made, layout: str, dtype: torch.dtype):
    folder = made.folder / layout
    ours, read = checkpoint.read_transformer(folder, dtype), made.cls.from_pretrained(folder, dtype=dtype)
    assert same_tensors(ours, read)
    for layer in quant_layers(read).values():
        assert layer.scale.dtype == torch.float32
    assert same(made.run(ours), made.run(read))
    assert same_tensors(made.cls.from_pretrained(folder).to(dtype), read) or made.cls._keep_in_fp32_modules


def test_saving_again_changes_nothing(made: Made, tmp_path: Path):
    made.cls.from_pretrained(made.folder / "one").save_pretrained(tmp_path)
    folders = (tmp_path, made.folder / "one")
    configs, tensors = (
        [read(f / name) for f in folders] for read, name in ((files.read_json, "config.json"), (load_file, ENCODER_WEIGHTS))
    )
    assert settings_of(configs[0]) == settings_of(configs[1])
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert tensors[0].keys() == tensors[1].keys() and same([*tensors[0].values()], [*tensors[1].values()])
    headers = [files.open_weights(f / ENCODER_WEIGHTS).metadata() for f in folders]
    assert headers[0] == headers[1] and json.loads(headers[0]["quantdit"])["config"]["architectures"] == [made.name]


def test_a_cast_model_is_saved_as_it_runs(t5: Made, tmp_path: Path):
    narrow = t5.cls.from_pretrained(t5.folder / "one", dtype=torch.bfloat16)
    narrow.save_pretrained(tmp_path, max_shard_size="8KB")
    again = t5.cls.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16 and same(t5.run(again), t5.run(narrow))


@pytest.mark.parametrize(
    ("auto", "name"),
    [
        ("AutoModelForTextEncoding", "T5EncoderModel"),
        ("AutoModel", "CLIPTextModel"),
        ("AutoModel", "Gemma2Model"),
        ("AutoModelForCausalLM", "Qwen3ForCausalLM"),
    ],
)
def test_auto_classes_load_it(make: Callable[[str], Made], auto: str, name: str):
    made = make(name)
    read = getattr(transformers, auto).from_pretrained(made.folder / "many")
    assert type(read) is made.cls and same(made.run(read), made.run(made.model))


@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "Qwen2_5_VLForConditionalGeneration", "CLIPTextModelWithProjection"])
def test_the_part_without_a_head_loads_and_is_saved(make: Callable[[str], Made], name: str, tmp_path: Path):
    made = make(name)
    cls = type(made.model.base_model)
    read = cls.from_pretrained(made.folder / "one")
    assert same_tensors(read, made.model.base_model)
    read.save_pretrained(tmp_path)
    assert same_tensors(cls.from_pretrained(tmp_path), read)


def test_another_class_is_refused_by_name(t5: Made):
    with pytest.raises(CheckpointError, match=r"holds a quantized T5EncoderModel, not a T5Model; load it with"):
        transformers.AutoModel.from_pretrained(t5.folder / "one")


# ---- devices and dtypes


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_a_device_map_gives_the_same_bits(made: Made, device_map: object):
    read = made.cls.from_pretrained(made.folder / "many", device_map=device_map)
    assert same_tensors(read, made.model) and same(made.run(read), made.run(made.model))


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_blocks_on_the_disk_run_as_those_in_memory(t5: Made, tmp_path: Path, offload_buffers: bool):
    places = {"shared": "cpu", "encoder.embed_tokens": "cpu", "encoder.block.0": "cpu", "encoder.block.1": "disk"}
    places |= {"encoder.final_layer_norm": "cpu", "encoder.dropout": "cpu"}
    options = {"device_map": places, "offload_folder": tmp_path, "offload_buffers": offload_buffers}
    read = t5.cls.from_pretrained(t5.folder / "many", **options)
    layer = read.encoder.block[1].layer[0].SelfAttention.q
    assert (layer.data.device.type == "meta") == offload_buffers
    assert same(t5.run(read), t5.run(t5.model))
    with pytest.raises(ValueError, match="is not in memory"):
        read.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_hooks_that_offload_it_give_the_same_bits(made: Made):
    from accelerate import cpu_offload

    read = made.cls.from_pretrained(made.folder / "one")
    cpu_offload(read, torch.device("cpu"), offload_buffers=True)
    assert same(made.run(read), made.run(made.model))


def test_group_offloading_gives_the_same_bits(t5: Made):
    from diffusers.hooks import apply_group_offloading

    read = t5.cls.from_pretrained(t5.folder / "one")
    apply_group_offloading(read, torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    assert same(t5.run(read), t5.run(t5.model))


def test_casts_leave_scales_alone(made: Made):
    for cast in (lambda m: m.half().float(), lambda m: m.to(torch.bfloat16).to(torch.float32)):
        model = cast(made.cls.from_pretrained(made.folder / "one"))
        for name, layer in quant_layers(model).items():
            before = made.model.get_submodule(name).tensors()
            assert all(torch.equal(t, before[k]) and t.dtype == before[k].dtype for k, t in layer.tensors().items())


# ---- dequantize, and what else transformers does with a model


def test_dequantized_it_is_an_ordinary_model(made: Made, tmp_path: Path):
    model = made.cls.from_pretrained(made.folder / "one")
    words = {name: layer.weight.clone() for name, layer in quant_layers(model).items() if isinstance(layer, QuantEmbedding)}
    assert model.dequantize() is model
    assert not quant_layers(model) and not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")
    assert words and all(torch.equal(model.get_submodule(name).weight, table) for name, table in words.items())
    model.save_pretrained(tmp_path)
    again, info = made.cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert same_tensors(again, model) and same(made.run(again), made.run(model))


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_dequantized_weights_have_the_dtype_of_the_model(t5: Made, dtype: torch.dtype | None):
    model = t5.cls.from_pretrained(t5.folder / "one", dtype=torch.float16)
    assert model.dequantize(dtype).encoder.block[0].layer[0].SelfAttention.q.weight.dtype == (dtype or torch.float16)
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32  # as the class asks for


def test_weights_are_counted(made: Made):
    full, small = made.cls.from_pretrained(made.folder / "full"), made.cls.from_pretrained(made.folder / "one")
    assert small.num_parameters() == full.num_parameters()
    assert small.num_parameters(exclude_embeddings=True) == full.num_parameters(exclude_embeddings=True)


def test_loading_draws_no_random_numbers(made: Made):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    made.cls.from_pretrained(made.folder / "one")
    assert torch.equal(torch.rand(3), expected)


def test_nothing_of_a_loaded_model_lies_in_its_files(t5: Made, tmp_path: Path):
    """A mapped tensor keeps its file open, and lies where the file has it."""
    folder = Path(shutil.copytree(t5.folder / "one", tmp_path / "copy"))
    read = t5.cls.from_pretrained(folder)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in read.state_dict().values())
    with (folder / ENCODER_WEIGHTS).open("r+b") as file:  # in place
        file.write(bytes((folder / ENCODER_WEIGHTS).stat().st_size))
    assert same_tensors(read, t5.model)


def test_what_cannot_be_saved_leaves_the_folder_as_it_was(t5: Made, tmp_path: Path):
    model = t5.cls.from_pretrained(t5.folder / "one")
    model.encoder.block[0].layer[0].SelfAttention.q = nn.Linear(32, 32, bias=False)
    with pytest.raises(ValueError, match="put the quantized layer back"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_adapter_is_saved_alone(t5: Made, tmp_path: Path):
    peft = pytest.importorskip("peft")
    model = t5.cls.from_pretrained(t5.folder / "one")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / ENCODER_WEIGHTS).exists()
    again = t5.cls.from_pretrained(t5.folder / "one")
    again.load_adapter(str(tmp_path))
    assert same(t5.run(again), t5.run(model)) and not same(t5.run(again), t5.run(t5.model))


# ---- quantization while loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_quantized_while_it_loads(made: Made, tmp_path: Path, dtype: torch.dtype):
    config = QuantDiTConfig(recipe=ALONE, seed=3)
    made.cls.from_pretrained(made.folder / "full", dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    loaded = made.cls.from_pretrained(tmp_path / "source", dtype=dtype, quantization_config=config)
    layers = quant_layers(loaded)
    linears = [m for m in loaded.modules() if isinstance(m, nn.Linear) and not isinstance(m, QuantLinear)]
    assert len(layers) > 10 and [m for m in linears if m is not loaded.get_output_embeddings()] == []
    full = made.cls.from_pretrained(tmp_path / "source", dtype=dtype).requires_grad_(False)
    for name, layer in layers.items():
        weight = full.get_submodule(name).weight.float()
        assert layer.weight.dtype == full.get_submodule(name).weight.dtype
        assert float((layer.weight.float() - weight).norm() / weight.norm()) < 0.02
    loaded.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    again = made.cls.from_pretrained(tmp_path / "saved")
    assert again.dtype == dtype and same_tensors(again, loaded) and same(made.run(again), made.run(loaded))
    assert same_tensors(checkpoint.read_transformer(tmp_path / "saved", dtype), loaded)


def test_bits_and_layers_to_leave_alone_are_taken(t5: Made):
    config = QuantDiTConfig(bits="w4a16", modules_to_not_convert=["wo"])
    layers = quant_layers(t5.cls.from_pretrained(t5.folder / "full", quantization_config=config))
    assert layers and not [name for name in layers if "wo" in name]
    assert {layer.layer_spec.activation.bits for layer in layers.values()} == {16}


def test_a_quantized_folder_stays_as_it_is(t5: Made):
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        read = t5.cls.from_pretrained(t5.folder / "one", quantization_config=QuantDiTConfig(bits="w8a8"))
    assert same_tensors(read, t5.model)


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.write_tiny("PixArtSigmaPipeline", tmp_path_factory.mktemp("pixart"))


def test_a_pipeline_is_quantized_while_it_loads_and_saved(pixart: Path, tmp_path: Path):
    from diffusers import DiffusionPipeline, PipelineQuantizationConfig

    wanted = PipelineQuantizationConfig(
        quant_backend="quantdit", quant_kwargs={"bits": "w4a8"}, components_to_quantize=["transformer", "text_encoder"]
    )
    made = DiffusionPipeline.from_pretrained(pixart, quantization_config=wanted)
    assert quant_layers(made.transformer) and quant_layers(made.text_encoder)
    config = QuantDiTConfig(bits="w4a8")
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": config, "text_encoder": config})
    same_again = DiffusionPipeline.from_pretrained(pixart, quantization_config=mapping)
    made.save_pretrained(tmp_path / "out")
    read = DiffusionPipeline.from_pretrained(tmp_path / "out")
    for part in ("transformer", "text_encoder"):
        assert same_tensors(getattr(read, part), getattr(made, part)), part
        assert same_tensors(getattr(same_again, part), getattr(made, part)), part
    images = [sampled(pipeline) for pipeline in (made, read)]
    assert torch.equal(*images)
    narrow = DiffusionPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16)
    assert narrow.text_encoder.dtype == torch.bfloat16
    assert {layer.scale.dtype for layer in quant_layers(narrow.text_encoder).values()} == {torch.float32}
    sampled(narrow)


def sampled(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": 64, "width": 64, "use_resolution_binning": False, "num_inference_steps": 2, "output_type": "pt"}
    return pipeline("a fox", generator=torch.Generator().manual_seed(0), **options)[0]


def test_a_refused_save_of_a_pipeline_writes_no_part_of_it(pixart: Path, tmp_path: Path):
    from diffusers import DiffusionPipeline, PipelineQuantizationConfig

    wanted = PipelineQuantizationConfig(quant_mapping={"text_encoder": QuantDiTConfig(bits="w4a8")})
    made = DiffusionPipeline.from_pretrained(pixart, quantization_config=wanted)
    made.text_encoder.encoder.block[0].layer[0].SelfAttention.q = nn.Linear(48, 16, bias=False)
    with pytest.raises(ValueError, match="put the quantized layer back"):
        made.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- hostile folders


def test_weights_that_are_no_numbers_are_refused_while_loading(t5: Made, tmp_path: Path):
    folder = Path(shutil.copytree(t5.folder / "full", tmp_path / "full"))
    tensors = load_file(folder / ENCODER_WEIGHTS)
    tensors["encoder.block.1.layer.0.SelfAttention.q.weight"][0, 0] = torch.nan
    save_file(tensors, folder / ENCODER_WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"block.1.layer.0.SelfAttention.q"):
        t5.cls.from_pretrained(folder, quantization_config=QuantDiTConfig(bits="w4a16"))


def test_a_rule_that_a_weight_cannot_take_is_said_in_one_line(t5: Made, monkeypatch: pytest.MonkeyPatch):
    """Left to transformers it would be a failed conversion, with a traceback."""

    def refuse(*given: object) -> None:
        raise ValueError("this weight cannot be quantized so")

    monkeypatch.setattr("quantdit.integrations.quantizer.quantize_without_data", refuse)
    with pytest.raises(ValueError, match=r"^this weight cannot be quantized so$"):
        t5.cls.from_pretrained(t5.folder / "full", quantization_config=QuantDiTConfig(bits="w4a16"))


@pytest.mark.parametrize("case", ["missing", "codes", "scales"])
def test_a_source_that_is_not_whole_or_not_in_full_precision_is_refused(t5: Made, tmp_path: Path, case: str):
    folder, key = Path(shutil.copytree(t5.folder / "full", tmp_path / "full")), "encoder.block.1.layer.0.SelfAttention.q.weight"
    tensors = load_file(folder / ENCODER_WEIGHTS)
    weight = tensors.pop(key)
    if case == "codes":
        tensors[key] = weight.to(torch.int8)
    if case == "scales":
        tensors |= {key: weight.to(torch.float8_e4m3fn), key + "_scale": torch.ones((), dtype=torch.float32)}
    save_file(tensors, folder / ENCODER_WEIGHTS, {"format": "pt"})
    words = "no file holds the weight" if case == "missing" else "another tool quantized"
    with pytest.raises(CheckpointError, match=words):
        t5.cls.from_pretrained(folder, quantization_config=QuantDiTConfig(bits="w4a16"))


def test_what_would_go_to_the_disk_is_not_quantized(t5: Made):
    with pytest.raises(ValueError, match="calibrate the model first"):
        t5.cls.from_pretrained(t5.folder / "full", quantization_config=QuantDiTConfig(bits="w4a16"), device_map={"": "disk"})


def damaged(folder: Path, key: str, forged: bool) -> None:
    """Set a tensor's first entry to NaN or another code; `forged`: the digest in the header is made to fit."""
    header, tensors = files.open_weights(folder / ENCODER_WEIGHTS).metadata(), load_file(folder / ENCODER_WEIGHTS)
    flat = tensors[key].view(-1)
    flat[0] = float("nan") if flat.is_floating_point() else flat[0] ^ 1
    if forged:
        content = json.loads(header["quantdit"]) | {"tensors_sha256": checkpoint.tensors_digest(tensors.items())}
        header["quantdit"] = json.dumps(content)
    save_file(tensors, folder / ENCODER_WEIGHTS, header)


@pytest.mark.parametrize("key", ["shared.data", "shared.scale", "encoder.final_layer_norm.weight"])
def test_damage_to_a_saved_folder_is_found(t5: Made, tmp_path: Path, key: str):
    folder = Path(shutil.copytree(t5.folder / "one", tmp_path / "copy"))
    damaged(folder, key, forged=False)
    with pytest.raises(CheckpointError, match="sha256"):
        t5.cls.from_pretrained(folder)


@pytest.mark.parametrize("key", ["shared.scale", "encoder.final_layer_norm.weight"])
@pytest.mark.parametrize("offloaded", [False, True])
def test_values_no_calibration_writes_are_refused(t5: Made, tmp_path: Path, key: str, offloaded: bool):
    folder = Path(shutil.copytree(t5.folder / "one", tmp_path / "copy"))
    damaged(folder, key, forged=True)
    places = {"shared": "disk", "encoder.embed_tokens": "disk", "encoder.block": "cpu", "encoder.final_layer_norm": "cpu"}
    options = {"device_map": places | {"encoder.dropout": "cpu"}, "offload_folder": tmp_path, "offload_buffers": True}
    with pytest.raises(CheckpointError, match=rf"{key.removesuffix('.scale')}.*(NaN|not finite)"):
        t5.cls.from_pretrained(folder, **options if offloaded else {})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spec": 99, "news": [1]}, "upgrade quantdit"),
        ({"spec": None}, "checkpoint spec None"),
        ({"layers": {"nowhere.q": {}}}, "does not exist"),
        ({"layers": None}, "table of layers"),
        ({"sha256": "0" * 64}, "sha256"),
        ({"d_kv": 8}, "disagree|in the model"),
        ({"layer_norm_epsilon": 1e-3}, "when the model was quantized"),
        ({"architectures": ["UMT5EncoderModel"]}, "holds a quantized UMT5EncoderModel"),
        ({"architectures": ["Nothing"]}, "no model class 'Nothing'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(t5: Made, tmp_path: Path, changes: dict, words: str):
    folder = Path(shutil.copytree(t5.folder / "one", tmp_path / "copy"))
    content = files.read_json(folder / "config.json")
    for key, value in changes.items():
        (content if key in content or key == "architectures" else content["quantization_config"])[key] = value
    files.write_json(folder / "config.json", content)
    with pytest.raises(CheckpointError, match=words):
        t5.cls.from_pretrained(folder)


def test_a_missing_tensor_and_pickled_weights_are_refused(t5: Made, tmp_path: Path):
    folder = Path(shutil.copytree(t5.folder / "one", tmp_path / "copy"))
    tensors, header = load_file(folder / ENCODER_WEIGHTS), files.open_weights(folder / ENCODER_WEIGHTS).metadata()
    del tensors["shared.scale"]
    save_file(tensors, folder / ENCODER_WEIGHTS, header)
    with pytest.raises(CheckpointError, match=r"shared.scale is missing"):
        t5.cls.from_pretrained(folder)
    (folder / ENCODER_WEIGHTS).unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="reads safetensors files"):
        t5.cls.from_pretrained(folder)


def test_a_folder_of_another_tool_is_not_taken_for_ours(t5: Made, tmp_path: Path):
    folder = Path(shutil.copytree(t5.folder / "full", tmp_path / "copy"))
    content = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", content | {"quantization_config": {"quant_method": "quantdit"}})
    with pytest.raises(ValueError, match="one of the two"):
        t5.cls.from_pretrained(folder)
    files.write_json(folder / "config.json", content | {"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(ValueError, match="FineGrainedFP8Config"):
        t5.cls.from_pretrained(folder, quantization_config=QuantDiTConfig(bits="w4a16"))
