"""ComfyUI export: what its loader would compute from the file, by its published definitions, is what our layers compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import quantdit
import tiny_models
from quantdit.checkpoints import checkpoint
from quantdit.exporters import to_comfyui as exporter
from quantdit.exporters.to_comfyui import express, to_comfyui
from quantdit.layers import quant_attention
from quantdit.recipes.attention import AttentionSpec
from quantdit.recipes.rules import Recipe, Rule
from quantdit.step_plans.following import carry
from quantdit.step_plans.step_plan import StepPlan
from quantdit.system.files import Advice, CheckpointError
from quantdit.tensors import hadamard

PLAN = Recipe(
    "comfyui",
    (
        Rule("role:outside", "dense"),
        Rule("*to_q", "int8", activation_bits=8, rotation="regular", method="rtn"),
        Rule("*to_k", "table4", activation_bits=8, rotation="regular", table="gaussian", method="rtn"),
        Rule("*to_v", "table4", activation_bits=16, rotation="regular", method="rtn"),
        Rule("*net.2", "int3", activation_bits=8, rotation="none", method="rtn"),
        Rule("*", "vq256x4", activation_bits=16, rotation="none", method="rtn"),
    ),
)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan's transformer folder, in every form that ComfyUI takes."""
    folder = tmp_path_factory.mktemp("comfyui") / "wan"
    model, _ = tiny_models.tiny("WanTransformer3DModel")
    quantdit.quantize(model, PLAN).save_pretrained(folder)
    return folder


def kron(size: int) -> Tensor:
    four = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    h = four
    while len(h) < size:
        h = torch.kron(h, four)
    return h / size**0.5


def comfy_linear(x: Tensor, tensors: dict[str, Tensor], marker: dict) -> Tensor:
    """As comfy-kitchen defines its layouts: decode, rotate tokens, round them row by row, multiply."""
    if marker["format"] == "asym_w4a8_int8":
        packed = tensors["weight"].to(torch.int32) & 0xFF
        codes = torch.stack([packed & 0xF, packed >> 4], dim=2).flatten(1)
        values = tensors["weight_codebook"][codes] * tensors["weight_s_rel"].float().repeat_interleave(16, dim=1)
        integers, scale = values.round().clamp(-127, 127), tensors["weight_s_channel"]
    else:
        integers, scale = tensors["weight"].float(), tensors["weight_scale"][:, 0]
    if marker.get("convrot") or marker["format"] == "asym_w4a8_int8":
        block = marker["convrot_groupsize"]
        x = (x.unflatten(-1, (-1, block)) @ kron(block)).flatten(-2)
    if not marker.get("full_precision_matrix_mult"):
        row = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
        x = (x / row).round().clamp(-128, 127) * row
    y = x @ (integers * scale[:, None]).T
    return y + tensors["bias"].float() if "bias" in tensors else y


def ours(place: str) -> str:
    """Return the name in diffusers of a layer of the original Wan."""
    renamed = {"self_attn": "attn1", "cross_attn": "attn2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
    renamed |= {f".{theirs}": f".{name}" for theirs, name in (("o", "to_out.0"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"))}
    for theirs, name in renamed.items():
        place = place.removesuffix(theirs) + name if place.endswith(theirs) else place.replace(f"{theirs}.", f"{name}.")
    return place


def stored(file: Path) -> dict[str, tuple[dict[str, Tensor], dict]]:
    """Return tensors and marker of each quantized layer of a file."""
    tensors = load_file(file)
    names = sorted(key.removesuffix(".comfy_quant") for key in tensors if key.endswith(".comfy_quant"))
    return {
        name: (
            {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")},
            json.loads(tensors[f"{name}.comfy_quant"].numpy().tobytes()),
        )
        for name in names
    }


def test_every_layer_computes_the_same(wan: Path, tmp_path: Path):
    counts = to_comfyui(wan, tmp_path / "wan.safetensors")
    layers, found = checkpoint.quant_layers(checkpoint.read_transformer(wan)), stored(tmp_path / "wan.safetensors")
    assert sum(counts.values()) == len(layers) == len(found)
    assert counts == {"asym_w4a8_int8": 4, "int8_tensorwise": len(layers) - 4}
    forms = set()
    for place, (tensors, marker) in found.items():
        name = ours(place)
        layer = layers.pop(name)
        forms.add((marker["format"], bool(marker.get("convrot")), bool(marker.get("full_precision_matrix_mult"))))
        x = torch.randn(7, layer.in_features, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = layer(x)
        # Sums in another order; a rounded token may fall on the other side of a tie, by one part in 127 of its largest entry.
        error = (comfy_linear(x, tensors, marker) - expected).norm() / expected.norm()
        assert float(error) < (1e-5 if layer.layer_spec.activation.bits == 16 else 1e-3), name
    assert not layers
    assert forms == {
        ("asym_w4a8_int8", False, False),
        ("int8_tensorwise", True, False),
        ("int8_tensorwise", True, True),
        ("int8_tensorwise", False, False),
        ("int8_tensorwise", False, True),
    }


def test_comfy_kitchen_itself_computes_the_same(wan: Path, tmp_path: Path):
    """The library that ComfyUI runs these formats with, on its eager backend, which defines the others."""
    kitchen = pytest.importorskip("comfy_kitchen.tensor", reason="pip install comfy-kitchen")
    to_comfyui(wan, tmp_path / "wan.safetensors")
    layers = checkpoint.quant_layers(checkpoint.read_transformer(wan))
    for place, (tensors, marker) in stored(tmp_path / "wan.safetensors").items():
        layer = layers[ours(place)]
        options = {key: marker[key] for key in ("convrot", "convrot_groupsize", "group_size") if key in marker}
        if marker["format"] == "asym_w4a8_int8":
            layout, options["scale"] = "AsymW4A8Int8Layout", tensors["weight_s_rel"]
            options |= {"s_channel": tensors["weight_s_channel"], "codebook": tensors["weight_codebook"]}
        else:
            layout, options["scale"] = "TensorWiseINT8Layout", tensors["weight_scale"]
        shape = (layer.out_features, layer.in_features)
        parameters = kitchen.get_layout_class(layout).Params(**options, orig_dtype=torch.float32, orig_shape=shape)
        weight = kitchen.QuantizedTensor(tensors["weight"], layout, parameters)
        weight = weight.dequantize() if marker.get("full_precision_matrix_mult") else weight
        x = torch.randn(33, layer.in_features, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            expected, y = layer(x), torch.nn.functional.linear(x, weight, tensors["bias"].float())
        assert float((y - expected).norm() / expected.norm()) < 1e-5


def test_dense_tensors_have_the_names_that_diffusers_converts_from(wan: Path, tmp_path: Path):
    """Its converter from original checkpoints is an independent account of their names."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    to_comfyui(wan, tmp_path / "wan.safetensors")
    back = convert_wan_transformer_to_diffusers(load_file(tmp_path / "wan.safetensors"))
    model, _ = tiny_models.tiny("WanTransformer3DModel")
    plain = model.state_dict()
    extra = {key for key in back if key.rpartition(".")[2] in ("comfy_quant",) or ".weight_" in key}
    assert back.keys() - extra == plain.keys()
    layers = checkpoint.quant_layers(checkpoint.read_transformer(wan))
    for key in plain.keys() - {f"{name}.weight" for name in layers}:
        assert torch.equal(back[key].float(), plain[key]), key


def test_the_regular_rotation_is_convrots_up_to_order_and_sign():
    for block in (4, 16, 64):
        ours = hadamard.regular_sign(block, block)[:, None] * hadamard.hadamard(block)
        change = ours.T.double() @ kron(block).double()
        assert torch.allclose(change.abs().sort(dim=0).values[-1], torch.ones(block, dtype=torch.float64))
        assert torch.allclose(change @ change.T, torch.eye(block, dtype=torch.float64), atol=1e-6)
        assert torch.allclose(hadamard.regular(block), kron(block).double())
        assert len(set(hadamard.regular(block).sum(0).tolist())) == 1
    assert [hadamard.regular_block_size(width) for width in (3, 6, 44, 96, 192, 1536)] == [1, 1, 4, 16, 64, 64]
    with pytest.raises(ValueError, match="power of four"):
        hadamard.regular_sign(64, 32)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Rule("*", "table4", activation_bits=8), 'rotation = "regular"'),
        (Rule("*", "int4", activation_bits=4, activation_format="affine", rotation="none"), "activation_bits = 8 or 16"),
        (Rule("*", "fp8_e4m3", activation_bits=8, activation_format="fp8", rotation="none"), "activations a8 fp8"),
        (Rule("*", "table4_e4m3", rotation="none"), "decodes to int8"),
    ],
)
def test_what_cannot_be_expressed_is_refused_with_what_to_change(tmp_path: Path, rule: Rule, words: str):
    model, _ = tiny_models.tiny("WanTransformer3DModel")
    quantdit.quantize(model, Recipe("x", (Rule("role:outside", "dense"), rule)))
    name, layer = next(iter(checkpoint.quant_layers(model).items()))
    with pytest.raises(ValueError, match=words):
        express(name, layer)


def test_a_low_rank_branch_is_refused(wan: Path):
    name, layer = next(iter(checkpoint.quant_layers(checkpoint.read_transformer(wan)).items()))
    layer.extend_branch(torch.ones(layer.out_features, 1), torch.ones(1, layer.in_features))
    with pytest.raises(ValueError, match="low_rank = 0"):
        express(name, layer)


@pytest.mark.filterwarnings("error")
def test_what_comfyui_does_not_do_is_said(wan: Path, tmp_path: Path) -> None:
    to_comfyui(wan, tmp_path / "plain.safetensors")
    model = quantdit.load(wan)
    carry(model, StepPlan("reuse", (900.0, 500.0, 100.0), ((), (1.0,), ())))
    quant_attention.put(model, {"blocks.0.attn1": AttentionSpec("int8")})
    switched = tmp_path / "switched"
    model.save_pretrained(switched)
    with pytest.warns(Advice, match="ComfyUI has no 8-bit attention and a step plan: its file computes every step"):
        to_comfyui(switched, tmp_path / "switched.safetensors")
    assert load_file(tmp_path / "plain.safetensors").keys() == load_file(tmp_path / "switched.safetensors").keys()


def test_by_the_command_line(wan: Path, pixel_dit: Path, everything, tmp_path: Path, cli):
    file = tmp_path / "wan.safetensors"
    ran = cli("export", wan, "--to", "comfyui", "--output", file)
    assert ran.code == 0 and "4 layers as asym_w4a8_int8" in ran.out and file.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["wan.safetensors"]
    assert "exists" in cli("export", wan, "--to", "comfyui", "--output", file).error
    assert "does not end in .safetensors" in cli("export", wan, "--to", "comfyui", "--output", tmp_path / "x").error
    refused = cli("export", pixel_dit, "--to", "comfyui", "--output", tmp_path / "y.safetensors")
    assert refused.code == 1 and "no quantization_config" in refused.error
    unknown = cli("export", everything.folder, "--to", "comfyui", "--output", tmp_path / "y.safetensors")
    assert unknown.code == 1 and "DiTTransformer2DModel in ComfyUI are not known" in unknown.error
    assert not (tmp_path / "y.safetensors").exists()
    with pytest.raises(CheckpointError):
        to_comfyui(tmp_path, tmp_path / "z.safetensors")


def test_a_full_disk_and_a_layer_without_a_name_are_one_line(wan: Path, tmp_path: Path, cli, monkeypatch):
    def full(tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    arguments = ("export", wan, "--to", "comfyui", "--output", tmp_path / "x.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(exporter, "save_file", full)
        assert "No space left on device" in cli(*arguments).error
    rules = tuple(rule for rule in exporter.NAMES["WanTransformer3DModel"] if "ffn" not in rule[0])
    monkeypatch.setitem(exporter.NAMES, "WanTransformer3DModel", rules)
    assert "has no name in ComfyUI that quantdit knows" in cli(*arguments).error
    assert not list(tmp_path.iterdir())
