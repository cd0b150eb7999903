"""A model that is not what its class builds from its config: quantized inside where that can be, else refused by name."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

import quantdit
from quantdit.checkpoints.checkpoint import quant_layers
from quantdit.recipes.rules import Recipe, Rule

peft = pytest.importorskip("peft")
EVERY = Recipe("every layer", (Rule("*", "int8", activation_bits=8, method="rtn"),))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def wan(tiny):
    return tiny("WanTransformer3DModel")


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: t.clone() for key, t in model.state_dict().items()}


def refused(quantize, model: nn.Module, words: str) -> None:
    """One line, and nothing has changed."""
    before = state_of(model)
    with pytest.raises(ValueError, match=words) as caught:
        quantize()
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert after.keys() == before.keys() and not quant_layers(model)
    assert all(torch.equal(t.float(), before[key].float()) for key, t in after.items())


# ---- compiled


@pytest.mark.parametrize(("how", "with_inputs"), [("wrapped", True), ("wrapped", False), ("in place", True), ("blocks", True)])
def test_a_compiled_model_is_quantized_inside(tiny, run, tmp_path: Path, how: str, with_inputs: bool):
    expected, calls = tiny("WanTransformer3DModel")
    quantdit.quantize(expected, "w8a8", calls if with_inputs else None)
    model, _ = tiny("WanTransformer3DModel")
    compiled = torch.compile(model, backend="eager") if how == "wrapped" else model
    if how == "in place":
        model.compile(backend="eager")
    elif how == "blocks":
        model.compile_repeated_blocks(backend="eager")
    with torch.no_grad():
        compiled(**calls[0])  # compiled in full precision first
    function = lambda: [compiled(**call) for call in calls]  # noqa: E731
    assert quantdit.quantize(compiled, "w8a8", function if with_inputs else None) is compiled
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True))
    with torch.no_grad():
        y = compiled(**calls[0])[0]
    torch.testing.assert_close(y, run(expected, calls[0]), atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(run(quantdit.load(tmp_path / "saved"), calls[0]), run(expected, calls[0]))


def test_blocks_that_torch_compile_wrapped_are_refused(wan):
    model, _ = wan
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    refused(lambda: quantdit.quantize(model, "w8a8"), model, r"blocks\.1\._orig_mod.*compile_repeated_blocks")


# ---- adapters and fused projections


def test_a_loaded_adapter_is_refused(wan):
    model, _ = wan
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    refused(lambda: quantdit.quantize(model, "w8a8"), model, r"base_layer.*is of a layer with an adapter; unload_lora_weights")
    model.fuse_lora()
    model.unload_lora()
    assert quant_layers(quantdit.quantize(model, "w8a8"))


def test_projections_fused_before_are_refused(wan):
    model, _ = wan
    model.fuse_qkv_projections()
    refused(lambda: quantdit.quantize(model, "w8a8"), model, r"to_qkv.*unfuse_qkv_projections\(\) first")
    model.unfuse_qkv_projections()
    assert quant_layers(quantdit.quantize(model, "w8a8"))


def test_projections_fused_afterwards_are_not_saved_and_unfused_are(wan, run, tmp_path: Path):
    model, calls = wan
    quantdit.quantize(model, "w8a8")
    expected = run(model, calls[0])
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"would not load again: .*to_.*kv.* unfuse_qkv_projections\(\) first"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.unfuse_qkv_projections()
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(run(quantdit.load(tmp_path / "out"), calls[0]), expected)


def test_a_layer_that_was_replaced_is_not_saved(wan, tmp_path: Path):
    model, _ = wan
    quantdit.quantize(model, "w8a8")
    model.blocks[0].attn1.to_q = nn.Linear(64, 64)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn1\.to_q is quantized by the config, but in the model it is a Linear"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_that_are_not_the_configs_are_refused(wan):
    model, _ = wan
    model.blocks = model.blocks[:1]
    refused(lambda: quantdit.quantize(model, "w8a8"), model, r"blocks\.1\..*missing")


@pytest.fixture
def flux(tiny):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    transformer, calls = tiny("FluxTransformer2DModel")
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), transformer=transformer, **nothing), calls


def control(transformer: nn.Module) -> dict[str, Tensor]:
    """A control LoRA: twice the inputs of the first layer."""
    first = transformer.x_embedder
    shapes = {"lora_A": (4, 2 * first.in_features), "lora_B": (first.out_features, 4)}
    return {f"transformer.x_embedder.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}


def test_a_layer_that_a_control_lora_widened_is_refused(flux):
    pipeline, _ = flux
    pipeline.load_lora_weights(control(pipeline.transformer))
    pipeline.unload_lora_weights()
    refused(lambda: quantdit.quantize(pipeline.transformer, "w8a8"), pipeline.transformer, "x_embedder.*control LoRA")


def test_after_a_control_lora_is_unloaded_the_quantized_layer_is_there_again(flux, run, tmp_path: Path):
    pipeline, calls = flux
    model = quantdit.quantize(pipeline.transformer, EVERY)
    before, expected = state_of(model), run(model, calls[0])
    pipeline.load_lora_weights(control(model))
    with pytest.raises(ValueError, match="unload_lora_weights"):
        model.save_pretrained(tmp_path / "out")
    pipeline.unload_lora_weights(reset_to_overwritten_params=True)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(t, before[key]) for key, t in after.items())
    assert torch.equal(run(model, calls[0]), expected)
    model.save_pretrained(tmp_path / "out")


# ---- quantized by another tool


class Codes(torch.Tensor):
    """A weight as torchao's: a tensor of another class."""


def as_bitsandbytes(model: nn.Module) -> None:
    linear = type("Linear8bitLt", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    layer = model.blocks[0].attn1.to_q
    layer.__class__ = linear
    layer.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)


def as_torchao(model: nn.Module) -> None:
    Codes.__module__ = "torchao.dtypes"
    layer = model.blocks[0].attn1.to_q
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Codes), requires_grad=False)


def as_config(model: nn.Module) -> None:
    model.register_to_config(quantization_config={"quant_method": "gguf"})


def as_scaled_float8(model: nn.Module) -> None:
    layer = model.blocks[0].attn1.to_q
    layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    layer.register_buffer("weight_scale", torch.ones(1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (as_bitsandbytes, r"quantized by bitsandbytes: blocks\.0\.attn1\.to_q\.weight is int8"),
        (as_torchao, r"quantized by torchao: .* is a Codes"),
        (as_config, "quantized by gguf, as its config says"),
        (as_scaled_float8, r"to_q\.weight_scale is not of a WanTransformer3DModel"),
    ],
)
def test_what_another_tool_quantized_is_refused_by_its_name(wan, change, words: str):
    model, _ = wan
    change(model)
    refused(lambda: quantdit.quantize(model, "w8a8"), model, words)


def test_plain_float8_weights_are_cast_up(tiny):
    models = [tiny("WanTransformer3DModel")[0] for _ in range(2)]
    for model in models:
        for name, p in model.named_parameters():
            if name.endswith("to_q.weight"):
                p.data = p.data.to(torch.float8_e4m3fn)
                p.data = p.data if model is models[0] else p.data.float()
        quantdit.quantize(model, "w8a8")
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


# ---- what diffusers and others ask a quantized layer


def test_num_parameters_counts_quantized_weights(tiny):
    model, _ = tiny("WanTransformer3DModel")
    counts = model.num_parameters(), model.num_parameters(exclude_embeddings=True)
    quantdit.quantize(model, "w4a8")
    assert (model.num_parameters(), model.num_parameters(exclude_embeddings=True)) == counts
    assert model.num_parameters(only_trainable=True) == 0


@pytest.fixture(scope="module")
def aura(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class whose linears have no bias."""
    folder, (model, _) = tmp_path_factory.mktemp("aura"), tiny("AuraFlowTransformer2DModel")
    model.save_pretrained(folder / "full")
    quantdit.quantize(model, "w8a8").save_pretrained(folder / "quantized")
    return folder


def dtypes_of(model: nn.Module) -> set[torch.dtype]:
    without = {layer.weight.dtype for layer in quant_layers(model).values() if layer.bias is None}
    assert without
    return without | {layer.weight.dtype for layer in quant_layers(model).values()}


def test_a_weight_without_a_bias_has_the_dtype_of_the_model(aura: Path):
    import copy

    import diffusers

    cls = diffusers.AuraFlowTransformer2DModel
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        on_load = quantdit.QuantDiTConfig(bits="w8a8")
        for model in (
            quantdit.load(aura / "quantized", dtype=dtype),
            cls.from_pretrained(aura / "quantized", torch_dtype=dtype),
            cls.from_pretrained(aura / "quantized", torch_dtype=dtype, device_map={"": "cpu"}),
            cls.from_pretrained(aura / "full", torch_dtype=dtype, quantization_config=on_load),
            quantdit.quantize(cls.from_pretrained(aura / "full", torch_dtype=dtype), "w8a8"),
        ):
            assert dtypes_of(model) == {dtype}
    assert dtypes_of(model.half()) == {torch.float16}
    model.to(torch.bfloat16)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (model, copy.deepcopy(model), torch.load(file, weights_only=False), model.to("cpu")):
        assert dtypes_of(again) == {torch.bfloat16}
    assert dtypes_of(model.float()) == {torch.float32}


def test_a_model_that_was_made_by_position_is_what_its_class_builds(tmp_path: Path):
    """Diffusers counts arguments given by position among the defaults."""
    model = Placed(24, 3)
    quantdit.quantize(model, EVERY)
    model.save_pretrained(tmp_path / "saved")
    assert (model.config.width, len(model.blocks)) == (24, 3)


class Placed(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = 8, layers: int = 1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(width, width)) for _ in range(layers)])

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return (hidden_states,)
