"""What cannot be done in a script is said in one line, and what was there before stays as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import quantdit
from quantdit.checkpoints.checkpoint import quant_layers
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.rules import Recipe, Rule
from quantdit.system import files
from quantdit.system.files import CheckpointError

peft = pytest.importorskip("peft")


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return the bytes of every file below a folder, and None for every folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refusal(call: Callable[[], object], kind: type[Exception] = ValueError) -> str:
    """Return the message of the error, which must be one line."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600, message
    return message


# ---- save_pretrained


def with_adapter(model: nn.Module) -> nn.Module:
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False), model)
    return model


def fused(model: nn.Module) -> nn.Module:
    from diffusers.utils import recurse_remove_peft_layers

    for module in with_adapter(model).modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.merge()
    recurse_remove_peft_layers(model)
    return model


def offloaded(model: nn.Module) -> nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(model, torch.device("cpu"), offload_buffers=True)


REFUSED = {
    "adapter": (with_adapter, {}, "unload_lora_weights"),
    "fused": (fused, {}, "unfuse_lora"),
    "sequential offload": (offloaded, {}, "is not in memory"),
    "pickle": (lambda model: model, {"safe_serialization": False}, "safe_serialization"),
    "flashpack": (lambda model: model, {"use_flashpack": True}, "use_flashpack"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_save_leaves_the_folder_as_it_was(made, tmp_path: Path, case: str):
    change, options, words = REFUSED[case]
    good = Path(shutil.copytree(made.folder / "many", tmp_path / "good"))
    before = contents(tmp_path)
    model = change(made.cls.from_pretrained(good))
    for target in (good, tmp_path / "new"):
        assert words in refusal(lambda target=target: model.save_pretrained(target, **options))
        assert contents(tmp_path) == before
    assert quant_layers(quantdit.load(good))


@pytest.mark.parametrize("how", ["keyword", "position"])
def test_a_refused_save_of_a_pipeline_writes_no_part_of_it(plain_dit: Path, tmp_path: Path, how: str):
    pipeline, _ = load_pipeline(str(plain_dit))
    quantdit.quantize(pipeline.transformer, "w8a8")
    pipeline.save_pretrained(tmp_path / "good")
    before = contents(tmp_path)
    arguments, options = ((False,), {}) if how == "position" else ((), {"safe_serialization": False})
    for target in ("good", "new"):
        refusal(lambda target=target: pipeline.save_pretrained(tmp_path / target, *arguments, **options))
    with_adapter(pipeline.transformer)
    for target in ("good", "new"):
        assert "adapter" in refusal(lambda target=target: pipeline.save_pretrained(tmp_path / target))
    assert contents(tmp_path) == before


def test_a_pipeline_with_a_compiled_transformer_is_saved(plain_dit: Path, tmp_path: Path):
    """Its state dict has other names than the transformer in it, which diffusers saves."""
    pipeline, _ = load_pipeline(str(plain_dit))
    quantdit.quantize(pipeline.transformer, "w8a8")
    pipeline.save_pretrained(tmp_path / "plain")
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    pipeline.save_pretrained(tmp_path / "compiled")
    plain, compiled = (quantdit.load(tmp_path / name).transformer.state_dict() for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys() and all(torch.equal(t, compiled[key]) for key, t in plain.items())


def test_a_model_without_quantdit_is_saved_as_ever(tiny, tmp_path: Path):
    model, _ = tiny("DiTTransformer2DModel")
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with_adapter(model).save_pretrained(tmp_path / "adapted")
    assert (tmp_path / "pickled" / "diffusion_pytorch_model.bin").exists() and (tmp_path / "adapted" / "config.json").exists()


# ---- load


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_dtype_may_be_named(made, name: str):
    assert quantdit.load(made.folder / "one", dtype=name).dtype == getattr(torch, name)


@pytest.mark.parametrize("dtype", [torch.int8, "int8", "auto", None, 16], ids=str)
def test_another_dtype_is_refused(made, dtype: object):
    assert f"dtype {dtype!r}" in refusal(lambda: quantdit.load(made.folder / "one", dtype=dtype))


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", torch.device("cuda:99"), "meta", None], ids=str)
def test_a_device_that_is_not_there_is_refused(made, device: object):
    assert f"device {str(device)!r}" in refusal(lambda: quantdit.load(made.folder / "one", device=device))


def test_what_is_no_folder_is_refused(made, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    bare = Path(shutil.copytree(made.folder / "one", tmp_path / "bare"))
    next(bare.glob("*.safetensors")).unlink()
    full = Path(shutil.copytree(made.folder / "full", tmp_path / "full"))
    next(full.glob("*.safetensors")).unlink()
    for folder, words in (
        (tmp_path / "nowhere", "does not exist"),
        (str(tmp_path / "nowhere"), "no folder"),
        ("nowhere", "no folder"),
        ("no/where", "no folder no/where"),
        (tmp_path / "empty", "no diffusers model"),
        (tmp_path / "file", "is a file"),
        (bare, "is missing"),
        (full, "no safetensors weights"),
        ("", "folder is empty"),
        (None, "folder is a NoneType"),
    ):
        assert words in refusal(lambda folder=folder: quantdit.load(folder)), folder


def test_a_full_precision_folder_loads_as_it_is(made):
    model = quantdit.load(made.folder / "full")
    assert type(model) is made.cls and not quant_layers(model)


INDEX_ENTRIES = (
    {"transformer": []},
    {"transformer": ["diffusers"]},
    {"transformer": ["diffusers", 3]},
    {"transformer": "DiTTransformer2DModel"},
    {"transformer": {"diffusers": "x"}},
    {"transformer": [None, None]},
    {"vae": ["diffusers", "nowhere"]},
    {"vae": ["\0", "x"]},
    {"vae": ["transformers", "T5EncoderModel", 1]},
    {"vae": None},
    {"a/b": ["diffusers", "AutoencoderKL"]},
    {"_class_name": "AutoencoderKL"},
    {"_class_name": ["a", "b"]},
)


@pytest.mark.parametrize("entries", INDEX_ENTRIES, ids=str)
def test_an_index_of_another_shape_is_refused(plain_dit: Path, tmp_path: Path, entries: dict):
    folder = Path(shutil.copytree(plain_dit, tmp_path / "copy"))
    index = files.read_json(folder / "model_index.json")
    files.write_json(folder / "model_index.json", index | entries)
    refusal(lambda: quantdit.load(folder))


def test_a_component_that_lacks_a_tensor_is_refused(plain_dit: Path, tmp_path: Path):
    """Diffusers leaves it on the meta device, with a warning."""
    folder = Path(shutil.copytree(plain_dit, tmp_path / "copy"))
    path = folder / "vae" / files.WEIGHTS
    tensors = load_file(path)
    del tensors["decoder.conv_out.bias"]
    save_file(tensors, path, {"format": "pt"})
    assert "decoder.conv_out.bias" in refusal(lambda: quantdit.load(folder), CheckpointError)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("vae/config.json", {"layers_per_block": 2**31}),
        ("vae/config.json", {"sample_size": 10**30}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}),
        ("transformer/config.json", {"num_layers": 10**9}),
    ],
    ids=str,
)
def test_what_would_build_forever_is_refused(plain_dit: Path, tmp_path: Path, config: str, changes: dict):
    folder = Path(shutil.copytree(plain_dit, tmp_path / "copy"))
    files.write_json(folder / config, files.read_json(folder / config) | changes)
    assert "is not plausible" in refusal(lambda: quantdit.load(folder), CheckpointError)


@pytest.mark.parametrize(
    "quantization", [{"bits": "w4a8"}, {"layers": 3}, {"spec": 3, "recipe": [1], "layers": 2}, {"x": 1}], ids=str
)
def test_a_quantization_config_that_is_none_is_refused(made, tmp_path: Path, quantization: dict):
    folder = Path(shutil.copytree(made.folder / "one", tmp_path / "copy"))
    config = files.read_json(folder / "config.json") | {"quantization_config": {"quant_method": "quantdit", **quantization}}
    files.write_json(folder / "config.json", config)
    for read in (quantdit.load, made.cls.from_pretrained):
        refusal(lambda read=read: read(folder))


# ---- quantize


@pytest.fixture
def dit(tiny):
    return tiny("DiTTransformer2DModel")


def test_inputs_that_are_no_calls_are_refused(dit):
    model, calls = dit
    state = {key: t.clone() for key, t in model.state_dict().items()}
    wide = calls[0] | {"hidden_states": torch.zeros(1, 9, 8, 8)}
    for inputs, words in (
        ([1], "inputs[0] is a int"),
        ([calls[0], tuple(calls[0].values())], "inputs[1] is a tuple"),
        (calls[0], "got a dict"),
        (calls[0]["hidden_states"], "inputs[0] is a Tensor"),
        (3, "got a int"),
        ([], "got an empty one"),
        ((call for call in ()), "got an empty one"),
        ([calls[0], {"sample": calls[0]["hidden_states"]}], "inputs[1]: DiTTransformer2DModel.forward() got an unexpected"),
        ([{"hidden_states": calls[0]["hidden_states"]}], "inputs[0]"),
        ([wide], "inputs[0]: Given groups=1"),
        ([{key: t.bfloat16() if t.is_floating_point() else t for key, t in calls[0].items()}], "inputs[0]"),
        (lambda: None, "never called"),
    ):
        message = refusal(lambda inputs=inputs: quantdit.quantize(model, "w8a8", inputs))
        assert words in message
        assert "never called" in message or "hidden_states, timestep, class_labels" in message
    assert not quant_layers(model) and all(torch.equal(t, state[key]) for key, t in model.state_dict().items())


def test_inputs_that_need_arguments_are_refused(dit, plain_dit: Path):
    def sample(prompt: str, steps: int = 2) -> None: ...

    model, _ = dit
    for inputs, words in (
        (quantdit.load(plain_dit), "DiTPipeline is missing a required argument: 'class_labels'"),
        (model, "DiTTransformer2DModel is missing a required argument: 'hidden_states'"),
        (sample, "sample is missing a required argument: 'prompt'"),
    ):
        message = refusal(lambda inputs=inputs: quantdit.quantize(model, "w8a8", inputs=inputs))
        assert words in message and "inputs=lambda: pipeline(...)" in message
    assert not quant_layers(model)


@pytest.mark.parametrize("bits", ["auto", "autoa4"])
def test_widths_that_nothing_chooses_are_refused_in_terms_of_python(dit, bits: str):
    model, calls = dit
    for inputs in (None, calls):
        message = refusal(lambda inputs=inputs: quantdit.quantize(model, bits, inputs))
        assert f"recipe {bits}" in message and "quantdit.quantize" in message and "--samples" not in message


def test_what_needs_inputs_says_so_in_terms_of_python(dit):
    recipe = Recipe("static", (Rule("*", "int8", activation_bits=8, activation_scale="static"),))
    assert "inputs=" in refusal(lambda: quantdit.quantize(dit[0], recipe))
    message = refusal(lambda: quantdit.QuantDiTConfig(recipe=recipe))
    assert "inputs=" in message and "--samples" not in message


def test_steps_with_nothing_to_train_on_are_refused(dit):
    model, calls = dit
    assert "inputs=" in refusal(lambda: quantdit.quantize(model, "w2a16", finetune_steps=5))
    assert "int8" in refusal(lambda: quantdit.quantize(model, "w8a8", calls, finetune_steps=5))
    assert "finetune_steps is -1" in refusal(lambda: quantdit.quantize(model, "w2a16", calls, finetune_steps=-1))


@pytest.mark.parametrize("recipe", [None, 4, "w5a8", {"rule": []}], ids=str)
def test_what_is_no_recipe_is_refused(dit, recipe: object):
    refusal(lambda: quantdit.quantize(dit[0], recipe))


@pytest.mark.parametrize("name", ["nope.toml", "w4a8", "."])
@pytest.mark.parametrize("call", [quantdit.quantize, lambda _, recipe: quantdit.QuantDiTConfig(recipe=recipe)])
def test_a_recipe_file_that_cannot_be_read_is_named(dit, tmp_path: Path, call: Callable, name: str):
    for path in (tmp_path / name, *([str(tmp_path / name)] if name.endswith(".toml") else [])):
        message = refusal(lambda path=path: call(dit[0], path))
        assert f"recipe {path} " in message and "TOML file" in message


def test_weights_that_are_elsewhere_are_refused(dit):
    assert "is not in memory" in refusal(lambda: quantdit.quantize(dit[0].to("meta"), "w8a8"))


def test_an_unknown_weight_format_is_refused():
    assert "table, vq, ssvq" in refusal(lambda: quantdit.QuantDiTConfig(bits="w2a8", weight_format="tables"))


def test_a_checkpoint_without_its_config_is_no_folder_of_a_model(made, tmp_path: Path):
    folder = Path(shutil.copytree(made.folder / "one", tmp_path / "copy"))
    (folder / "config.json").write_text("{")
    assert "config.json" in refusal(lambda: quantdit.load(folder), CheckpointError)


class Settings:
    """Of a model: no mapping, and not diffusers'."""

    hidden_size = 4


@pytest.mark.parametrize("given", ["", "gptq"])
def test_a_module_whose_config_is_no_mapping_is_refused_in_one_line(given: str):
    module = nn.Sequential(nn.Linear(4, 4))
    module.config = Settings()
    if given:
        module.config.quantization_config = {"quant_method": given}
    text = refusal(lambda: quantdit.quantize(module, "w8a8", inputs=[{"input": torch.ones(1, 4)}]))
    assert "quantized by gptq, as its config says" in text if given else "Sequential" in text
