"""Full-precision sources: codes of other tools are refused, scaled float8 is read, by every way of loading one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantdit
from quantdit import QuantDiTConfig
from quantdit.checkpoints import streaming
from quantdit.checkpoints.checkpoint import quant_layers
from quantdit.system import files
from quantdit.system.files import WEIGHTS, Advice, CheckpointError
from tiny_models import TINY

LAYER = "blocks.0.attn1.to_q"
SIZES = TINY["WanTransformer3DModel"][0]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan transformer in full precision. Read only."""
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("sources") / "full"
    WanTransformer3DModel(**SIZES).save_pretrained(folder)
    return folder


@pytest.fixture
def stored_as(full: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a copy of `full` whose tensors, and config.json, were changed."""

    def make(change: Callable[[dict[str, Tensor]], object], shards: int = 1, **config: object) -> Path:
        folder = Path(shutil.copytree(full, tmp_path / "source"))
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        if shards > 1:
            (folder / WEIGHTS).unlink()
            names = {key: f"part-{number % shards}.safetensors" for number, key in enumerate(sorted(tensors))}
            for name in set(names.values()):
                save_file({key: t for key, t in tensors.items() if names[key] == name}, folder / name, {"format": "pt"})
            files.write_json(folder / files.INDEX, {"metadata": {}, "weight_map": names})
        else:
            save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        files.write_json(folder / "config.json", files.read_json(folder / "config.json") | config)
        return folder

    return make


def linears(tensors: dict[str, Tensor]) -> list[str]:
    return [key for key in tensors if key.startswith("blocks.") and key.endswith(".weight") and tensors[key].ndim == 2]


def to_float8(tensors: dict[str, Tensor]) -> None:
    for key in linears(tensors):
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    tensors["blocks.1.norm2.bias"] = tensors["blocks.1.norm2.bias"].to(torch.float8_e5m2)


def to_scaled(spelling: str, per_output: bool) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for key in linears(tensors):
            weight = tensors[key]
            scale = (weight.abs().amax(dim=1, keepdim=True) if per_output else weight.abs().max()) / 448
            tensors[key] = (weight / scale).to(torch.float8_e4m3fn)
            tensors[f"{key.removesuffix('weight')}{spelling}"] = scale
        tensors["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)

    return change


def by_load(folder: Path) -> nn.Module:
    return quantdit.load(folder)


def by_from_pretrained(folder: Path) -> nn.Module:
    return WanTransformer3DModel.from_pretrained(folder, quantization_config=QuantDiTConfig(bits="w8a16"))


def by_single_file(folder: Path) -> nn.Module:
    path = folder.with_suffix(".safetensors")
    tensors = {}
    for part in files.weight_files(folder):
        tensors |= load_file(part)
    save_file(tensors, path, {"format": "pt"})
    config = QuantDiTConfig(bits="w8a16")
    return WanTransformer3DModel.from_single_file(str(path), config=str(folder), quantization_config=config)


WAYS = {"load": by_load, "from_pretrained": by_from_pretrained, "from_single_file": by_single_file}


def weight_of(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).weight.detach()


# ---- float8


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["plain", "weight_scale", "scale_weight"])
def test_float8_is_read_by_every_way(full: Path, stored_as, way: str, kind: str):
    change = to_float8 if kind == "plain" else to_scaled(kind, per_output=kind == "weight_scale")
    model = WAYS[way](stored_as(change, shards=1 if way == "from_single_file" else 3))
    expected = load_file(full / WEIGHTS)
    assert all(t.dtype != torch.float8_e4m3fn for t in model.state_dict().values())
    for name in (LAYER, "blocks.1.ffn.net.2"):
        weight, wanted = weight_of(model, name), expected[f"{name}.weight"]
        # Float8 has three bits after the leading one; int8 per channel loses less than that.
        assert float((weight - wanted).norm() / wanted.norm()) < 0.04
    if kind == "plain":
        bias = model.blocks[1].norm2.bias
        assert torch.equal(bias, expected["blocks.1.norm2.bias"].to(torch.float8_e5m2).float())


def test_scaled_float8_is_the_product_to_the_bit(stored_as):
    folder = stored_as(to_scaled("weight_scale", per_output=True))
    stored = load_file(folder / WEIGHTS)
    wanted = stored[f"{LAYER}.weight"].float() * stored[f"{LAYER}.weight_scale"]
    assert torch.equal(weight_of(quantdit.load(folder), LAYER), wanted)
    assert torch.equal(weight_of(quantdit.load(folder, dtype=torch.bfloat16), LAYER), wanted.bfloat16())


def test_the_command_line_and_diffusers_make_the_same_of_scaled_float8(cli, stored_as, tmp_path: Path):
    folder = stored_as(to_scaled("scale_weight", per_output=False), shards=2)
    ran = cli("calibrate", "--model", folder, "--bits", "w8a16", "--samples", 0, "--output", tmp_path / "out")
    assert ran.code == 0, ran.err
    ours, theirs = quantdit.load(tmp_path / "out" / "transformer"), by_from_pretrained(folder)
    assert all(torch.equal(a.data, theirs.get_submodule(n).data) for n, a in quant_layers(ours).items())


def test_streamed_blocks_have_their_scales(stored_as):
    folder = stored_as(to_scaled("weight_scale", per_output=False))
    paths = {name: t.path for name, t in files.stored_tensors(files.weight_files(folder)).items()}
    stream = streaming.Stream(streaming.skeleton(folder, torch.float32), paths)
    with stream.loaded("blocks.0"):
        streamed = weight_of(stream.transformer, LAYER).clone()
    assert torch.equal(streamed, weight_of(quantdit.load(folder), LAYER))


def test_scales_of_inputs_are_ignored_with_a_note(stored_as):
    def change(tensors: dict[str, Tensor]) -> None:
        to_scaled("weight_scale", per_output=False)(tensors)
        tensors[f"{LAYER}.input_scale"] = torch.tensor(3.0)

    with pytest.warns(Advice, match=rf"scales of inputs are ignored.*{LAYER}.input_scale"):
        quantdit.load(stored_as(change))


# ---- what another tool wrote


def block_scales(tensors: dict[str, Tensor]) -> None:
    to_float8(tensors)
    tensors[f"{LAYER}.weight_scale_inv"] = torch.ones(1, 1)


def scales_in_groups(tensors: dict[str, Tensor]) -> None:
    to_float8(tensors)
    tensors[f"{LAYER}.weight_scale"] = torch.ones(64, 2)


REFUSED = {
    "int8": (
        lambda t: t.update({f"{LAYER}.weight": torch.ones(64, 64, dtype=torch.int8)}),
        rf"{LAYER}.weight is (I8|torch.int8)",
    ),
    "bool": (lambda t: t.update({f"{LAYER}.bias": torch.ones(64, dtype=torch.bool)}), rf"{LAYER}.bias is (BOOL|torch.bool)"),
    "complex": (
        lambda t: t.update({f"{LAYER}.weight": torch.ones(64, 64, dtype=torch.complex64)}),
        rf"{LAYER}.weight is (C64|torch.complex64)",
    ),
    "SCB": (lambda t: t.update({f"{LAYER}.SCB": torch.ones(64)}), rf"tensor {LAYER}.SCB is neither weight nor bias"),
    "scale alone": (lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(())}), rf"{LAYER}.weight_scale has no float8 weight"),
    "blocks of scales": (block_scales, rf"{LAYER}.weight_scale_inv says how its float8 weight is read"),
    "scales in groups": (scales_in_groups, rf"{LAYER}.weight_scale is F32 \(64, 2\)"),
    "block beyond": (lambda t: t.update({"blocks.2.ffn.net.2.bias": torch.ones(64)}), r"blocks.2.ffn.net.2.bias is of a block"),
    "no bias": (lambda t: t.pop(f"{LAYER}.bias"), rf"tensor {LAYER}.bias is missing"),
    "NaN in a bias": (lambda t: t[f"{LAYER}.bias"].fill_(torch.nan), rf"layer {LAYER}: 64 values of its bias are NaN"),
    "NaN in a norm": (lambda t: t["blocks.1.norm2.weight"].fill_(torch.nan), r"layer blocks.1.norm2: 64 values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_are_no_weights_is_refused_by_every_way(stored_as, case: str):
    change, words = REFUSED[case]
    folder = stored_as(change)
    for name, way in WAYS.items():
        # Of other names than the model's from_single_file converts all, and something else is then missing.
        renamed = name == "from_single_file" and case in ("SCB", "block beyond")
        with pytest.raises(CheckpointError, match="is missing" if renamed else words) as caught:
            way(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "sdnq", None])
def test_another_tool_is_named(cli, stored_as, tmp_path: Path, method: str | None):
    quantization = {"quant_method": method} if method else {"load_in_8bit": True}
    folder = stored_as(lambda t: None, quantization_config=quantization)
    ran = cli("calibrate", "--model", folder, "--bits", "w8a8", "--samples", 0, "--output", tmp_path / "out")
    assert ran.code == 1 and f"quantized by {method or 'an unknown tool'}" in ran.error
    with pytest.raises(CheckpointError, match=method or "an unknown tool"):
        quantdit.load(folder)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_other_superfluous_tensors_are_noted_and_ignored(stored_as):
    """`norm_added_q` the class itself says to ignore."""
    more = {"ema.decay": torch.ones(1), "blocks.0.attn2.norm_added_q.weight": torch.ones(64)}
    with pytest.warns(Advice, match=r"no such tensors: ema.decay$"):
        quantdit.load(stored_as(lambda t: t.update(more)))


# ---- one file


def test_what_from_single_file_quantized_is_saved_as_what_it_is(full: Path, tmp_path: Path):
    model = by_single_file(Path(shutil.copytree(full, tmp_path / "source")))
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]["quant_method"] == "quantdit"
    for again in (quantdit.load(tmp_path / "saved"), WanTransformer3DModel.from_pretrained(tmp_path / "saved")):
        assert quant_layers(again).keys() == quant_layers(model).keys()
        assert all(torch.equal(t, again.state_dict()[key]) for key, t in model.state_dict().items())


# ---- configs


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"eps": float("nan")}, "NaN is no finite number"),
        ({"eps": "0.1"}, "eps = '0.1' must be a number"),
        ({"cross_attn_norm": "false"}, "must be true or false"),
        ({"num_layers": 1e9}, "num_layers = 1000000000.0 is not plausible"),
        ({"ffn_dim": -1}, "ffn_dim = -1 is not plausible"),
        ({"patch_size": [1, 2, 2**40]}, "patch_size = .* is not plausible"),
        (
            {"rope_max_seq_len": 2**20, "num_attention_heads": 1, "attention_head_dim": 64},
            "tables of .* numbers are not plausible",
        ),
        ({"_class_name": "AutoPipelineForText2Image"}, "no model class"),
    ],
    ids=str,
)
def test_a_senseless_config_is_refused_before_anything_is_built(stored_as, config: dict, words: str):
    with pytest.raises(CheckpointError, match=words):
        quantdit.load(stored_as(lambda t: None, **config))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(full: Path, dtype: torch.dtype):
    expected = quantdit.load(full)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = quantdit.load(full)
    finally:
        torch.set_default_dtype(before)
    one, other = ({**dict(m.named_buffers()), **dict(m.named_parameters())} for m in (expected, model))
    assert all(t.dtype == other[name].dtype and torch.equal(t, other[name]) for name, t in one.items())
