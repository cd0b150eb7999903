"""The checkpoint: bit-exact round trips, and a reader that trusts nothing it reads."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors import safe_open
from safetensors.torch import save_file

import quantdit
from quantdit.checkpoints import checkpoint
from quantdit.checkpoints.checkpoint import CheckpointError, quant_layers, read_transformer, write_transformer
from quantdit.formats import FORMATS
from quantdit.system import files
from quantdit.tensors import transform
from quantdit.tensors.layer_spec import ACTIVATION_FORMATS

WEIGHTS = files.WEIGHTS
VALUES = "transformer_blocks.1.attn1.to_k"  # int4, one group per channel, rotated
# int4 in groups of 128, smoothed, DuQuant's rotation in blocks of 128, a branch of rank 4, six-bit activations of static scales.
RICH = "transformer_blocks.1.ff.net.2"
WEIGHT_KEYS = ("format", "out_features", "in_features", "group_size", "codebook_rows")
ACTIVATION_KEYS = ("bits", "activation_format", "activation_group_size", "buckets")


@pytest.fixture(scope="module")
def sample() -> dict:
    """Two calls' worth of inputs for the tiny transformers."""
    generator = torch.Generator().manual_seed(5)
    return {
        "hidden_states": torch.randn(2, 1, 8, 8, generator=generator),
        "timestep": torch.tensor([900, 17]),
        "class_labels": torch.tensor([0, 2]),
    }


def output(model: torch.nn.Module, sample: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**{k: v.to(model.dtype) if v.is_floating_point() else v for k, v in sample.items()}).sample


# ---- round trips


def test_fixture_holds_every_format(everything):
    layers = quant_layers(everything.transformer)
    others = {"vq256x2", "vq256x8", *(name for name, f in FORMATS.items() if f.state_bits)}  # tests/test_trellis.py has those
    assert {layer.spec.format for layer in layers.values()} == set(FORMATS) - others
    specs = [layer.layer_spec for layer in layers.values()]
    assert {spec.activation.bits for spec in specs} == {4, 6, 8, 16}
    assert {spec.activation.format for spec in specs} == set(ACTIVATION_FORMATS)
    assert {spec.activation.group_size for spec in specs} == {0, 32}
    assert {spec.activation.buckets for spec in specs} == {0, 10}
    assert {spec.rotation for spec in specs} == set(transform.KINDS)
    assert {spec.block for spec in specs} == {1, 64, 128}
    assert {spec.smoothed for spec in specs} == {False, True}
    assert {spec.rank for spec in specs} == {0, 4}
    assert {layer.spec.codebook_rows for layer in layers.values()} == {1, 384}
    rich = layers[RICH].layer_spec
    assert (rich.rotation, rich.smoothed, rich.rank, rich.activation.buckets) == ("outlier", True, 4, 10)
    assert "proj_out_1" in layers and "proj_out_2" in layers
    assert "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1" not in layers


def test_output_after_loading_is_the_output_in_memory(everything, sample):
    loaded = read_transformer(everything.folder / "transformer")
    y = output(loaded, sample)
    assert bool(torch.isfinite(y).all()) and float(y.abs().max()) > 0
    assert torch.equal(y, output(everything.transformer, sample))
    assert torch.equal(y, output(loaded, sample)), "decoded weights are kept between calls"


def test_every_layer_comes_back_bit_for_bit(everything):
    loaded = quant_layers(read_transformer(everything.folder / "transformer"))
    kept = quant_layers(everything.transformer)
    assert list(loaded) == list(kept)
    for name, layer in kept.items():
        other = loaded[name]
        assert other.layer_spec == layer.layer_spec
        for field, tensor in layer.named_buffers(recurse=False):
            stored = other.get_buffer(field)
            assert stored.dtype == tensor.dtype and torch.equal(stored.view(torch.uint8), tensor.view(torch.uint8)), field
        assert torch.equal(other.weight, layer.weight)


def test_scales_beside_codebooks_of_vectors_take_16_bits_in_the_file(everything):
    layers = quant_layers(everything.transformer)
    with safe_open(everything.folder / "transformer" / WEIGHTS, framework="pt") as file:
        for name, layer in layers.items():
            width = file.get_slice(f"{name}.scale").get_dtype()
            assert width == "F16" or FORMATS[layer.spec.format].dim == 1, name
            assert layer.scale.dtype == torch.float32
            if FORMATS[layer.spec.format].dim > 1:
                assert torch.equal(file.get_tensor(f"{name}.scale").float(), layer.scale)


def test_save_load_save_gives_the_same_bytes(everything, tmp_path: Path):
    first = everything.folder / "transformer"
    made_from = everything.report["recipe"], everything.report["provenance"]
    scheduler = checkpoint.scheduler_of(everything.folder)
    digest = write_transformer(read_transformer(first), tmp_path / "again", *made_from, scheduler=scheduler)
    assert digest == everything.report["sha256"] == hashlib.sha256((first / WEIGHTS).read_bytes()).hexdigest()
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (first / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["config.json", WEIGHTS]


def test_loading_in_bfloat16_leaves_quantized_weights_alone(everything, sample):
    plain, narrow = (read_transformer(everything.folder / "transformer", dtype) for dtype in (torch.float32, torch.bfloat16))
    assert narrow.dtype == torch.bfloat16
    for name, layer in quant_layers(narrow).items():
        other = quant_layers(plain)[name]
        assert layer.scale.dtype == torch.float32
        assert torch.equal(layer.qtensor.dequantize(), other.qtensor.dequantize())
    y, reference = output(narrow, sample).float(), output(plain, sample)
    assert y.dtype == torch.float32 and float((y - reference).norm()) < 0.1 * float(reference.norm())


def test_file_can_be_read_by_safetensors_alone(everything):
    """The promise of the format: names, fields and shapes as documented, `I * scale` from the stored bytes."""
    with safe_open(everything.folder / "transformer" / WEIGHTS, framework="pt") as file:
        data, scale = (file.get_tensor(f"transformer_blocks.1.attn1.to_out.0.{f}") for f in ("data", "scale"))
        header = json.loads(file.metadata()["quantdit"])
    layer = quant_layers(everything.transformer)["transformer_blocks.1.attn1.to_out.0"]
    assert torch.equal(data.float() * scale[:, None], layer.qtensor.dequantize())
    assert header["spec"] == checkpoint.FORMAT_VERSION == 4 and header["recipe"] == everything.report["recipe"]


def test_quantized_folder_is_told_from_a_plain_one(everything, pixel_dit: Path):
    assert checkpoint.is_quantized(everything.folder / "transformer")
    assert not checkpoint.is_quantized(pixel_dit / "transformer")
    with pytest.raises(CheckpointError, match="quantdit"):
        read_transformer(pixel_dit / "transformer")


# ---- hostile weights files


def split(path: Path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def forgive_digest(folder: Path) -> None:
    """Write the sha256 of the damaged file into the config, as an attacker would."""
    change_config(folder, lambda c: c["quantization_config"].update(sha256=files.sha256(folder / "transformer" / WEIGHTS)))


def change_config(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "transformer" / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refusal(folder: Path, file: str = WEIGHTS) -> str:
    """Return the one line with which the folder is refused; it names the file."""
    with pytest.raises(CheckpointError) as caught:
        read_transformer(folder / "transformer")
    message = str(caught.value)
    assert str(folder / "transformer" / file) in message, message
    assert "\n" not in message.strip(), message
    return message


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 1000, -4096, -1])
def test_truncated_file(copied: Path, length: int):
    weights = copied / "transformer" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:length])
    assert "copy it again" in refusal(copied)


@pytest.mark.parametrize("extra", [b"\0", b"\0" * 4096])
def test_appended_bytes(copied: Path, extra: bytes):
    with (copied / "transformer" / WEIGHTS).open("ab") as file:
        file.write(extra)
    refusal(copied)


def test_any_flipped_bit_is_noticed(copied: Path):
    weights = copied / "transformer" / WEIGHTS
    good = weights.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    generator = random.Random(0)
    places = [generator.randrange(8, 8 + length) for _ in range(12)] + [
        generator.randrange(8 + length, len(good)) for _ in range(12)
    ]
    for place in [0, 3, 7, 8, len(good) - 1, *places]:
        bad = bytearray(good)
        bad[place] ^= 1 << generator.randrange(8)
        weights.write_bytes(bad)
        refusal(copied)
    weights.write_bytes(good)
    read_transformer(copied / "transformer")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**47, 2**31, 0])
def test_header_of_absurd_length(copied: Path, length: int):
    weights = copied / "transformer" / WEIGHTS
    weights.write_bytes(struct.pack("<Q", length) + weights.read_bytes()[8:])
    refusal(copied)


def test_tensor_of_absurd_size(copied: Path):
    weights = copied / "transformer" / WEIGHTS
    header, data = split(weights)
    header[f"{VALUES}.scale"]["shape"] = [2**60]
    join(weights, header, data)
    refusal(copied)


def test_missing_file_and_folder_in_its_place(copied: Path):
    weights = copied / "transformer" / WEIGHTS
    weights.unlink()
    assert "missing" in refusal(copied)
    weights.mkdir()
    refusal(copied)


@pytest.mark.parametrize("digest_fixed", [False, True])
def test_renamed_tensor_is_named(copied: Path, digest_fixed: bool):
    weights = copied / "transformer" / WEIGHTS
    header, data = split(weights)
    header[f"{VALUES}.scalf"] = header.pop(f"{VALUES}.scale")
    join(weights, header, data)
    if digest_fixed:
        forgive_digest(copied)
    assert f"{VALUES}.scale is missing" in refusal(copied)


def test_surplus_tensor_is_named(copied: Path):
    weights = copied / "transformer" / WEIGHTS
    header, data = split(weights)
    header["zzz.surplus"] = {"dtype": "U8", "shape": [16], "data_offsets": [len(data), len(data) + 16]}
    join(weights, header, data + bytes(16))
    forgive_digest(copied)
    assert "zzz.surplus" in refusal(copied)


@pytest.mark.parametrize(
    ("key", "dtype"),
    [
        (f"{VALUES}.data", "I8"),
        (f"{VALUES}.offset", "U8"),
        (f"{VALUES}.scale", "I32"),
        (f"{VALUES}.premultiplier", "U8"),
        (f"{RICH}.premultiplier", "F8_E4M3"),
        (f"{RICH}.permutation", "I8"),
        (f"{RICH}.steps1", "I8"),
        (f"{RICH}.up", "I16"),
        (f"{RICH}.static_scale", "I32"),
        ("transformer_blocks.0.ff.net.2.data", "F8_E5M2"),
        ("transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight", "I16"),
    ],
)
def test_changed_dtype_is_named(copied: Path, key: str, dtype: str):
    weights = copied / "transformer" / WEIGHTS
    header, data = split(weights)
    width = {"F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
    if width.get(dtype, 1) != width.get(header[key]["dtype"], 1):  # keep the file well-formed
        dtype = {4: "I32", 2: "I16"}[width[header[key]["dtype"]]]
    header[key]["dtype"] = dtype
    join(weights, header, data)
    forgive_digest(copied)
    message = refusal(copied)
    assert key in message and dtype in message


def test_changed_shape_is_named(copied: Path):
    weights = copied / "transformer" / WEIGHTS
    header, data = split(weights)
    key = f"{VALUES}.data"
    rows, columns = header[key]["shape"]
    header[key]["shape"] = [rows // 2, columns * 2]
    join(weights, header, data)
    forgive_digest(copied)
    message = refusal(copied)
    assert key in message and str((rows // 2, columns * 2)) in message and str((rows, columns)) in message


def test_tensors_that_share_bytes(copied: Path):
    weights = copied / "transformer" / WEIGHTS
    header, data = split(weights)
    header[f"{VALUES}.offset"]["data_offsets"] = header[f"{VALUES}.multiplier"]["data_offsets"]
    join(weights, header, data)
    forgive_digest(copied)
    refusal(copied)


def poke(folder: Path, key: str, values: bytes) -> None:
    """Overwrite the first bytes of a tensor and make the sha256 fit."""
    weights = folder / "transformer" / WEIGHTS
    header, data = split(weights)
    start, end = header[key]["data_offsets"]
    assert len(values) <= end - start
    join(weights, header, data[:start] + values + data[start + len(values) :])
    forgive_digest(folder)


@pytest.mark.parametrize(
    ("field", "values", "word"),
    [
        ("scale", struct.pack("<f", float("nan")), "scale"),
        ("scale", struct.pack("<f", float("inf")), "scale"),
        ("scale", struct.pack("<f", -0.5), "scale"),
        ("multiplier", b"\xff", "multiplier"),
        ("offset", b"\x7f", "offset"),
        ("premultiplier", b"\x00", "premultiplier"),
        ("premultiplier", b"\x7f", "premultiplier"),
    ],
)
def test_values_no_calibration_writes_are_refused_despite_their_sha256(copied: Path, field: str, values: bytes, word: str):
    poke(copied, f"{VALUES}.{field}", values)
    message = refusal(copied)
    assert VALUES in message and word in message


@pytest.mark.parametrize("code", [b"\x7f", b"\xff"])
def test_fp8_nan_is_refused_despite_its_sha256(copied: Path, code: bytes):
    name = "transformer_blocks.0.ff.net.0.proj"
    poke(copied, f"{name}.data", code)
    message = refusal(copied)
    assert name in message and "NaN" in message


def test_dense_nan_is_refused_despite_its_sha256(copied: Path):
    poke(
        copied, "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight", b"\xff" * 4
    )  # NaN in float16, bfloat16 and float32
    assert "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight" in refusal(copied)


def test_changed_weights_name_both_digests(copied: Path):
    weights = copied / "transformer" / WEIGHTS
    good = files.sha256(weights)
    poke(copied, f"{VALUES}.data", b"\x00\x01")
    read_transformer(copied / "transformer")  # any code of int4 is a legal one: with its sha256 the file is right
    change_config(copied, lambda c: c["quantization_config"].update(sha256=good))
    message = refusal(copied)
    assert "sha256" in message and good[:12] in message


@pytest.mark.parametrize("digest", [None, "", 5, "0" * 64])
def test_config_without_the_right_digest(copied: Path, digest: object):
    change_config(copied, lambda c: c["quantization_config"].update(sha256=digest))
    assert "sha256" in refusal(copied)


# ---- hostile configs


@pytest.mark.parametrize("spec", [5, 10**30, "2", 2.0, None, True, [2], 0, -1])
def test_spec_that_is_newer_or_no_number(copied: Path, spec: object):
    change_config(copied, lambda c: c["quantization_config"].update(spec=spec))
    message = refusal(copied, "config.json")
    assert f"spec {spec!r}" in message and "upgrade" in message


def test_spec_of_an_older_quantdit_says_to_calibrate_again(copied: Path):
    change_config(copied, lambda c: c["quantization_config"].update(spec=1))
    message = refusal(copied, "config.json")
    assert "spec 1" in message and "calibrate the model again" in message


def test_missing_spec(copied: Path):
    change_config(copied, lambda c: c["quantization_config"].pop("spec"))
    assert "spec" in refusal(copied, "config.json")


@pytest.mark.parametrize(
    "content", ["", "{", "[1, 2]", "3", "null", "\x00\x01", '"' + "x" * 100, "[" * 100_000, '{"a":' * 100_000]
)
def test_config_that_is_no_json_object(copied: Path, content: str):
    (copied / "transformer" / "config.json").write_text(content)
    refusal(copied, "config.json")


def test_config_of_bytes_that_are_no_text(copied: Path):
    (copied / "transformer" / "config.json").write_bytes(b'{"a": "\xff\xfe"}')
    refusal(copied, "config.json")


def test_missing_config(copied: Path):
    (copied / "transformer" / "config.json").unlink()
    assert "missing" in refusal(copied, "config.json")


@pytest.mark.parametrize("quantization", [None, [], "quantdit", {}, {"quant_method": "bitsandbytes"}])
def test_config_without_our_quantization(copied: Path, quantization: object):
    change_config(copied, lambda c: c.update(quantization_config=quantization))
    refusal(copied, "config.json")


@pytest.mark.parametrize("layers", [None, [], "x", {"": {}}, {VALUES: None}, {VALUES: []}, {VALUES: {}}])
def test_config_with_an_unusable_layer_table(copied: Path, layers: object):
    change_config(copied, lambda c: c["quantization_config"].update(layers=layers))
    refusal(copied, "config.json")


@pytest.mark.parametrize(
    "name",
    ["transformer_blocks.7.attn1.to_q", "transformer_blocks.0", "pos_embed.proj", "x", "..", "a.b", "forward", "__class__"],
)
def test_layer_that_the_model_lacks_is_named(copied: Path, name: str):
    change_config(copied, lambda c: c["quantization_config"]["layers"].update({name: c["quantization_config"]["layers"][VALUES]}))
    assert repr(name) in refusal(copied, "config.json")


def test_layer_missing_from_the_table_is_noticed(copied: Path):
    change_config(copied, lambda c: c["quantization_config"]["layers"].pop(VALUES))
    assert VALUES in refusal(copied)


def set_layer(folder: Path, values: dict[str, object], name: str = VALUES) -> None:
    """Change fields of a layer's entry: those of its weight and activation by their names, `activation_` where both have one."""

    def change(config: dict) -> None:
        entry = config["quantization_config"]["layers"][name]
        for key, value in values.items():
            part = entry["weight"] if key in WEIGHT_KEYS else entry["activation"] if key in ACTIVATION_KEYS else entry
            part[key.removeprefix("activation_") if part is entry["activation"] else key] = value

    change_config(folder, change)


def change_layer(folder: Path, name: str = VALUES, **values: object) -> str:
    set_layer(folder, values, name)
    message = refusal(folder, "config.json")
    # Buckets are compared with the edges of all layers before the layers are looked at.
    assert name in message or "timestep_edges" in message
    return message


@pytest.mark.parametrize("format", ["int5", "", None, 4, ["int4"], {}, "table4\n"])
def test_unknown_format_is_named(copied: Path, format: object):
    assert repr(format)[1:-1] in change_layer(copied, format=format)


def in_turn(keys: tuple[str, ...], values: tuple[object, ...], each: int) -> list[tuple[str, object]]:
    """Pair each key with some of the values, so that each value comes as often."""
    return [(key, values[(i + each * j) % len(values)]) for i, key in enumerate(keys) for j in range(each)]


SIZES = ("out_features", "group_size", "in_features", "codebook_rows")
SIZES += ("bits", "block", "activation_group_size", "buckets", "rank")
NO_SIZES = (0, -1, 2**62, "64", 2**70, True, 64.0, None, [64])


@pytest.mark.parametrize(("key", "value"), in_turn(SIZES, NO_SIZES, 4))
def test_impossible_size_is_refused(copied: Path, key: str, value: object):
    if key == "buckets" and isinstance(value, list):
        pytest.skip("test_buckets_of_another_type")
    if value == 0 and key in ("activation_group_size", "buckets", "rank"):
        pytest.skip("0 is none of it, which is possible")
    message = change_layer(copied, **{key: value})
    assert len(message) < 1000


WORDS = ("rotation", "activation_format", "smoothed", "weight", "activation")


@pytest.mark.parametrize(("key", "value"), in_turn(WORDS, (-1, 0, None, [], {}, "", "x", "hadamard\n", "NONE", 1.0, 1), 4))
def test_impossible_words_are_refused(copied: Path, key: str, value: object):
    change_layer(copied, **{key: value})


@pytest.mark.parametrize("part", [None, "weight", "activation"])
def test_missing_and_surplus_keys_are_refused(copied: Path, part: str | None):
    config = json.loads((copied / "transformer" / "config.json").read_text())
    entry = config["quantization_config"]["layers"][VALUES]
    for key in [*(entry[part] if part else entry), "surplus"]:
        changed = json.loads(json.dumps(entry))
        inner = changed[part] if part else changed
        if key == "surplus":
            inner[key] = 1
        else:
            del inner[key]
        change_config(copied, lambda c, changed=changed: c["quantization_config"]["layers"].update({VALUES: changed}))
        message = refusal(copied, "config.json")
        assert VALUES in message or key in ("buckets", "steps")


@pytest.mark.parametrize(
    "values",
    [
        {"out_features": 32},
        {"in_features": 128},
        {"group_size": 48},
        {"group_size": 128},
        {"codebook_rows": 2},
        {"block": 24},
        {"block": 128},
        {"block": 1},
        {"bits": 5},
        {"extra": 1},
        {"rotation": "none"},
        {"rotation": "ars"},
        {"rotation": "auto"},
        {"activation_format": "fp8"},
        {"bits": 4, "activation_group_size": 48},
        {"bits": 4, "activation_group_size": 128},
        {"activation_group_size": 32},
        {"bits": 16, "activation_format": "affine"},
        {"buckets": 3},
        {"buckets": 1001},
        {"rank": 65},
        {"steps": 1},
    ],
)
def test_possible_size_of_another_layer_is_refused(copied: Path, values: dict):
    change_layer(copied, **values)


@pytest.mark.parametrize(
    "values",
    [
        {"format": "int3"},
        {"group_size": 32},
        {"rotation": "none", "block": 1},
        {"rotation": "outlier"},
        {"format": "int8"},
        {"smoothed": True},
        {"rank": 1},
        {"rank": 64},
        {"buckets": 10},
    ],
)
def test_config_that_disagrees_with_the_tensors_names_one(copied: Path, values: dict):
    set_layer(copied, values)
    assert VALUES in refusal(copied)


@pytest.mark.parametrize(
    "values", [{"rank": 3}, {"block": 64}, {"smoothed": False}, {"buckets": 0}, {"rotation": "hadamard", "steps": 0}]
)
def test_config_that_disagrees_with_a_rich_layer_names_it(copied: Path, values: dict):
    set_layer(copied, values, RICH)
    assert RICH in refusal(copied)


@pytest.mark.parametrize("steps", [0, 1, 32])
def test_other_steps_than_the_file_has_are_refused(copied: Path, steps: int):
    set_layer(copied, {"steps": steps}, RICH)
    message = refusal(copied)
    assert RICH in message and ("rotation1" if steps == 0 else "steps1") in message


@pytest.mark.parametrize("steps", [-1, 33, 10**9, True, 2.0])
def test_steps_that_no_rotation_has_are_refused(copied: Path, steps: object):
    change_layer(copied, RICH, steps=steps)


NAN, NEGATIVE, HALF = struct.pack("<f", float("nan")), struct.pack("<f", -0.5), struct.pack("<f", 0.5)


@pytest.mark.parametrize(
    ("field", "values", "word"),
    [
        ("premultiplier", b"\x00", "premultiplier"),  # of float8_e5m2: zero, NaN, infinity
        ("premultiplier", b"\xff", "premultiplier"),
        ("premultiplier", b"\x7c", "premultiplier"),
        ("permutation", b"\x05\x05", "permutation"),
        ("steps1", b"\x80", "steps1"),  # a channel beyond a block of 128
        ("steps2", b"\x00\xfe", "steps2"),
        ("up", b"\xff\xff", "up"),
        ("up", b"\x80\x7f", "up"),  # infinity
        ("down", b"\xc0\x7f", "down"),
        ("static_scale", NAN, "static_scale"),
        ("static_scale", struct.pack("<f", float("inf")), "static_scale"),
        ("static_scale", NEGATIVE, "static_scale"),
        ("static_scale", struct.pack("<f", 0.0), "static_scale"),
    ],
)
def test_a_transform_no_calibration_writes_is_refused_despite_its_sha256(copied: Path, field: str, values: bytes, word: str):
    poke(copied, f"{RICH}.{field}", values)
    message = refusal(copied)
    assert RICH in message and word in message


@pytest.fixture
def dense(copied: Path) -> Path:
    """The folder as spec 3 has it: rotations and permutations as they are computed with, no steps."""
    layers = quant_layers(read_transformer(copied / "transformer"))
    with safe_open(copied / "transformer" / WEIGHTS, framework="pt") as file:
        ours = json.loads(file.metadata()["quantdit"]) | {"spec": 3}
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    entries = json.loads((copied / "transformer" / "config.json").read_text())["quantization_config"]
    for name, entry in entries["layers"].items():
        if entry.pop("steps"):
            t = layers[name].transform
            stored |= {f"{name}.{field}": getattr(t, field) for field in ("rotation1", "permutation", "rotation2")}
            del stored[f"{name}.steps1"], stored[f"{name}.steps2"]
    ours["layers_sha256"] = checkpoint.layers_digest(entries)
    save_file(stored, copied / "transformer" / WEIGHTS, metadata={"quantdit": json.dumps(ours)})
    change_config(copied, lambda c: c["quantization_config"].update(layers=entries["layers"], spec=3))
    forgive_digest(copied)
    return copied


def test_dense_rotations_of_spec_3_give_the_same_bits(dense: Path, everything, sample, tmp_path: Path):
    assert transform.STEPS[0] not in quant_layers(read_transformer(dense / "transformer"))[RICH].tensors()
    for number, read in enumerate((quantdit.load, DiTTransformer2DModel.from_pretrained)):
        model = read(dense / "transformer")
        assert torch.equal(output(model, sample), output(everything.transformer, sample))
        model.save_pretrained(tmp_path / str(number))
        assert torch.equal(output(read_transformer(tmp_path / str(number)), sample), output(model, sample))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("permutation", struct.pack("<2i", 5, 5)),
        ("permutation", struct.pack("<i", -1)),
        ("permutation", struct.pack("<i", 256)),
        ("permutation", struct.pack("<i", 2**31 - 1)),
        ("rotation1", struct.pack("<f", 3.0)),
        ("rotation1", NAN),
        ("rotation1", bytes(4 * 128)),  # a row of zeros
        ("rotation2", HALF * 3),
        ("rotation2", struct.pack("<f", float("-inf"))),
    ],
)
def test_a_dense_rotation_that_is_none_is_refused(dense: Path, field: str, values: bytes):
    poke(dense, f"{RICH}.{field}", values)
    message = refusal(dense)
    assert RICH in message and field in message


def test_another_permutation_is_a_legal_one(copied: Path):
    """With its sha256 the file is right: nothing tells it from one that calibration wrote."""
    with safe_open(copied / "transformer" / WEIGHTS, framework="pt") as file:
        first, second, *_ = file.get_tensor(f"{RICH}.permutation").tolist()
    poke(copied, f"{RICH}.permutation", bytes([second, first]))
    read_transformer(copied / "transformer")


@pytest.mark.parametrize(
    "edges",
    [
        None,
        "x",
        {},
        3,
        [],
        [1.0] * 9,
        [float(i) for i in range(10)],
        [*range(10, 1, -1)],
        [*range(11, 0, -1)],
        [float("nan")] * 10,
        [float("inf"), *range(9, 0, -1)],
        [True] * 10,
        ["1"] * 10,
        [[1.0]] * 10,
    ],
    ids=str,
)
def test_timestep_edges_that_make_no_sense(copied: Path, edges: object):
    change_config(copied, lambda c: c["quantization_config"].update(timestep_edges=edges))
    message = refusal(copied, "config.json")
    assert "timestep_edges" in message


def test_timestep_edges_beyond_float(copied: Path):
    change_config(copied, lambda c: c["quantization_config"].update(timestep_edges=[10**400] * 10))
    refusal(copied, "config.json")


def test_missing_timestep_edges(copied: Path):
    change_config(copied, lambda c: c["quantization_config"].pop("timestep_edges"))
    assert "timestep_edges" in refusal(copied, "config.json")


@pytest.mark.parametrize(
    "buckets",
    [[], {}, "10", 10.5, None],
)
def test_buckets_of_another_type(copied: Path, buckets: object):
    """Whatever they are compared with before the layers are looked at."""
    set_layer(copied, {"buckets": buckets}, RICH)
    refusal(copied, "config.json")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        (VALUES, {"rank": 2**40}),
        (VALUES, {"buckets": 2**40}),
        (VALUES, {"block": 2**40}),
        (VALUES, {"rotation": "outlier", "block": 2**20}),
        (RICH, {"rank": 257}),
        (RICH, {"block": 256, "in_features": 2**40}),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_allocated(copied: Path, name: str, values: dict):
    set_layer(copied, values, name)
    tracemalloc.start()
    refusal(copied, "config.json")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**26


def test_static_scales_survive_with_their_edges(everything, sample):
    """The loaded model chooses the same bucket for every timestep, and the buckets matter."""
    edges = everything.transformer.timestep_edges
    loaded = read_transformer(everything.folder / "transformer")
    assert loaded.timestep_edges == edges and len(edges) == 10
    assert list(edges) == sorted(edges, reverse=True)
    layer = quant_layers(loaded)[RICH]
    assert torch.equal(layer.static_scale, quant_layers(everything.transformer)[RICH].static_scale)
    chosen = []
    for timestep in (1000, *edges, 0):
        call = sample | {"timestep": torch.tensor([timestep, 0.0])}
        assert torch.equal(output(loaded, call), output(everything.transformer, call))
        chosen.append(layer.bucket)
        assert layer.bucket == quant_layers(everything.transformer)[RICH].bucket
    assert chosen[0] == 0 and chosen[-1] == 9
    assert chosen == sorted(chosen)


# ---- what the config and the scheduler's were when the model was quantized


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_eps": 0.1}, "norm_eps is 0.1, was 1e-05 when the model was quantized"),
        ({"num_attention_heads": 1, "attention_head_dim": 64}, r"attention_head_dim is 64, was 32 .*\(and 1 more differ\)"),
        ({"surplus": 1}, "surplus is 1, was not there"),
        ({"upcast_attention": None}, "upcast_attention is null, was false"),
    ],
    ids=str,
)
def test_a_config_that_was_changed_names_what_differs(copied: Path, changes: dict, words: str):
    change_config(copied, lambda c: c.update(changes))
    assert re.search(words, refusal(copied, "config.json"))
    with pytest.raises(CheckpointError, match=words):
        quantdit.load(copied)
    with pytest.raises(CheckpointError, match=words):
        DiTTransformer2DModel.from_pretrained(copied / "transformer")
    assert quant_layers(quantdit.load(copied, accept_config=True).transformer)


def test_a_key_that_was_removed_from_the_config_is_named(copied: Path):
    change_config(copied, lambda c: c.pop("norm_eps"))
    assert "norm_eps is not there, was 1e-05" in refusal(copied, "config.json")


def test_notes_of_diffusers_in_the_config_count_for_nothing(copied: Path):
    change_config(copied, lambda c: c.update(_diffusers_version="0.99.0", _name_or_path="x"))
    read_transformer(copied / "transformer")


def test_what_save_pretrained_wrote_has_its_config_too(everything, tmp_path: Path):
    quantdit.load(everything.folder).save_pretrained(tmp_path)
    quantdit.load(tmp_path)
    change_config(tmp_path, lambda c: c.update(norm_eps=0.1))
    assert "norm_eps is 0.1" in refusal(tmp_path, "config.json")
    with pytest.raises(CheckpointError, match=r"norm_eps is 0\.1"):
        DiTTransformer2DModel.from_pretrained(tmp_path / "transformer")


def change_scheduler(folder: Path, **values: object) -> None:
    path = folder / checkpoint.SCHEDULER
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_scheduler_that_was_changed_names_what_differs(copied: Path, tmp_path: Path, cli):
    change_scheduler(copied, shift=9.0)
    with pytest.raises(CheckpointError, match=r"scheduler_config.json: shift is 9.0, was 1.0 .*accept_config=True"):
        quantdit.load(copied)
    assert "shift is 9.0" in cli("generate", copied, "--count", 1, "--steps", 1, "--output", tmp_path / "x.png").error
    pipeline = quantdit.load(copied, accept_config=True)
    assert pipeline.scheduler.config.shift == 9
    pipeline.save_pretrained(tmp_path / "saved")
    assert quantdit.load(tmp_path / "saved").scheduler.config.shift == 9


def test_a_scheduler_of_senseless_numbers_is_refused_in_a_source_too(pixel_dit: Path, tmp_path: Path):
    folder = Path(shutil.copytree(pixel_dit, tmp_path / "source"))
    for value, words in ((10**9, "not plausible"), (float("nan"), "is not a number")):
        change_scheduler(folder, num_train_timesteps=value)
        with pytest.raises(CheckpointError, match=words):
            quantdit.load(folder)


def test_a_folder_of_spec_2_is_read_and_saved_as_the_latest(copied: Path, tmp_path: Path):
    """It has no config in its header."""
    weights = copied / "transformer" / WEIGHTS
    header, data = split(weights)
    ours = json.loads(header["__metadata__"]["quantdit"])
    ours = {key: value for key, value in ours.items() if key not in ("config", "scheduler")} | {"spec": 2}
    header["__metadata__"]["quantdit"] = json.dumps(ours)
    join(weights, header, data)
    forgive_digest(copied)
    assert "says spec 4" in refusal(copied, "config.json")
    change_config(copied, lambda c: c["quantization_config"].update(spec=2))
    for number, read in enumerate((quantdit.load, DiTTransformer2DModel.from_pretrained)):
        read(copied / "transformer").save_pretrained(tmp_path / str(number))
        assert files.read_json(tmp_path / str(number) / "config.json")["quantization_config"]["spec"] == checkpoint.FORMAT_VERSION
        read_transformer(tmp_path / str(number))


def rewrite(folder: Path, spec: int, tensors: dict[str, torch.Tensor]) -> None:
    """Write a folder's weights anew as those of a spec, with some tensors exchanged."""
    weights = folder / "transformer" / WEIGHTS
    with safe_open(weights, framework="pt") as file:
        ours = json.loads(file.metadata()["quantdit"]) | {"spec": spec}
        stored = {key: file.get_tensor(key) for key in file.keys()} | tensors  # noqa: SIM118 - not a mapping
    save_file(stored, weights, metadata={"quantdit": json.dumps(ours)})
    change_config(folder, lambda c: c["quantization_config"].update(spec=spec))
    forgive_digest(folder)


def test_smoothing_takes_a_byte_a_channel_in_a_file(copied: Path):
    with safe_open(copied / "transformer" / WEIGHTS, framework="pt") as file:
        assert file.get_tensor(f"{RICH}.premultiplier").dtype == torch.float8_e5m2
    assert quant_layers(read_transformer(copied / "transformer"))[RICH].premultiplier.dtype == torch.float32


@pytest.mark.parametrize("spec", [3, 4])
def test_a_float32_premultiplier_of_spec_3_is_kept_to_the_bit(copied: Path, tmp_path: Path, spec: int):
    wide = quant_layers(read_transformer(copied / "transformer"))[RICH].premultiplier * 1.1
    rewrite(copied, spec, {f"{RICH}.premultiplier": wide})
    for number, read in enumerate((quantdit.load, DiTTransformer2DModel.from_pretrained)):
        read(copied / "transformer").save_pretrained(tmp_path / str(number))
        assert torch.equal(quant_layers(read_transformer(tmp_path / str(number)))[RICH].premultiplier, wide)


def test_a_config_that_says_an_older_spec_is_refused(copied: Path):
    """Spec 2 would not be compared with the config."""
    change_config(copied, lambda c: c["quantization_config"].update(spec=2))
    assert "says spec 2" in refusal(copied, "config.json")


@pytest.mark.parametrize(("key", "value"), [("recipe", []), ("provenance", None), ("self", 1), ("bits", "w4a8")])
def test_a_quantization_config_of_other_keys_is_refused(copied: Path, key: str, value: object):
    change_config(copied, lambda c: c["quantization_config"].update({key: value}))
    assert key in refusal(copied, "config.json")


def test_digests_are_shown_to_where_they_differ(copied: Path):
    stated = files.sha256(copied / "transformer" / WEIGHTS)
    forged = f"{stated[:40]}{'0' if stated[40] != '0' else '1'}{stated[41:]}"
    change_config(copied, lambda c: c["quantization_config"].update(sha256=forged))
    message = refusal(copied)
    assert stated[:41] in message and forged[:41] in message


def test_other_architecture_than_the_tensors(copied: Path):
    change_config(copied, lambda c: c.update(num_embeds_ada_norm=c["num_embeds_ada_norm"] + 1))
    assert "class_embedder" in refusal(copied)


@pytest.mark.parametrize(
    "name",
    [None, "", "DiTTransformer3DModel", "DiTPipeline", "ModelMixin", "ConfigMixin", "logging", "__name__", "AutoencoderKL", 5],
)
def test_class_that_is_no_transformer(copied: Path, name: object):
    change_config(copied, lambda c: c.update(_class_name=name))
    refusal(copied, "config.json")


# Every key of the model's config but num_layers, whose huge values only cost time.
@pytest.mark.parametrize("value", [None, "x", -1, 0, 2**56, 2**70, 1e308, [], {}, [1], True], ids=repr)
def test_senseless_model_config_never_escapes_as_another_error(copied: Path, value: object):
    path = copied / "transformer" / "config.json"
    good = path.read_text()
    escaped = {}
    for key in json.loads(good):
        if key in ("quantization_config", "num_layers"):
            continue
        change_config(copied, lambda c, key=key: c.update({key: value}))
        try:
            read_transformer(copied / "transformer")
        except CheckpointError as error:
            assert str(copied / "transformer") in str(error)
        except Exception as error:
            escaped[key] = f"{type(error).__name__}: {error}"
        path.write_text(good)
    assert not escaped


def test_position_table_beyond_any_memory(copied: Path):
    change_config(copied, lambda c: c.update(sample_size=2**25))  # 2^48 positions
    refusal(copied, "config.json")


def test_nothing_but_the_checkpoint_is_touched(copied: Path):
    before = {p.relative_to(copied): p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    read_transformer(copied / "transformer")
    assert before == {p.relative_to(copied): p.read_bytes() for p in copied.rglob("*") if p.is_file()}


def test_pickle_is_never_read(copied: Path, tmp_path: Path):
    """A `.bin` in place of the safetensors must not be looked at."""
    trap = tmp_path / "opened"

    class Trap:
        def __reduce__(self):
            return (trap.write_text, ("x",))

    weights = copied / "transformer" / WEIGHTS
    torch.save(Trap(), copied / "transformer" / "diffusion_pytorch_model.bin")
    shutil.move(weights, tmp_path / "away.safetensors")
    refusal(copied)
    shutil.copy(copied / "transformer" / "diffusion_pytorch_model.bin", weights)
    refusal(copied)
    assert not trap.exists()


@pytest.mark.parametrize("command", ["generate", "evaluate", "export", "inspect"])
def test_the_command_line_takes_a_changed_config_if_told_to(copied: Path, tmp_path: Path, cli, command: str):
    place = copied / "transformer" / "config.json"
    config = files.read_json(place)
    files.write_json(place, config | {"norm_eps": 0.1})
    arguments = {
        "generate": (copied, "--count", "1", "--steps", "1", "--output", tmp_path / "x.png"),
        "evaluate": (copied, copied, "--samples", "4", "--steps", "1", "--output", tmp_path / "drift"),
        "export": (copied, "--to", "dense", "--output", tmp_path / "dense"),
        "inspect": (copied,),
    }[command]
    ran = cli(command, *arguments)
    assert ran.code == 1 and "norm_eps is 0.1, was" in ran.error and "--accept-config" in ran.error
    ran = cli(command, *arguments, "--accept-config")
    # The tiny model's pictures are smaller than SSIM's window: evaluate got as far as that.
    if command == "evaluate":
        assert ran.code == 1 and "SSIM needs" in ran.error
    else:
        assert ran.code == 0, ran.err


def test_a_pipeline_that_lost_its_index_is_not_taken_for_a_transformer_alone(copied: Path):
    index = copied / "model_index.json"
    index.unlink()
    with pytest.raises(ValueError, match=r"no model_index.json .* transformer alone"):
        quantdit.load(copied)
    index.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="is missing"):
        quantdit.load(copied)
    assert type(quantdit.load(copied / "transformer")).__name__ == "DiTTransformer2DModel"
