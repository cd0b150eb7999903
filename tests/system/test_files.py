"""Weights in one file or in shards: what is written is read back by us and by diffusers, and hostile folders are refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantdit.checkpoints import checkpoint
from quantdit.checkpoints.checkpoint import quant_layers, read_transformer
from quantdit.system import files
from quantdit.system.files import INDEX, WEIGHTS, CheckpointError, digest, tensor_files, weight_files, write_tensors

SHARD = 100


def tensors() -> dict[str, Tensor]:
    """Of 40, 80, 4, 200 (more than a shard), 0 and 60 bytes, in the order of their names."""
    sizes = {"a.weight": 10, "b.weight": 20, "c": 1, "d.weight": 50, "e": 0, "f": 15}
    return {name: torch.arange(size, dtype=torch.float32) + len(name) for name, size in sizes.items()}


def write(folder: Path, content: dict[str, Tensor], shard_bytes: int = SHARD) -> list[Path]:
    folder.mkdir(exist_ok=True)
    return write_tensors(folder, reversed(content), content.__getitem__, {"format": "pt"}, shard_bytes)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write(tmp_path / "sharded", tensors())
    return tmp_path / "sharded"


def everything_in(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in weight_files(folder):
        found |= load_file(path)
    return found


def test_shards_are_filled_in_the_order_of_names(sharded: Path):
    names = [f"diffusion_pytorch_model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert {p.name for p in sharded.iterdir()} == {INDEX, *names}
    assert [p.name for p in weight_files(sharded)] == names
    held = [sorted(load_file(sharded / name)) for name in names]
    assert held == [["a.weight"], ["b.weight", "c"], ["d.weight"], ["e", "f"]]
    assert {name: path.name for name, path in tensor_files(sharded).items()} == {
        name: shard for shard, inside in zip(names, held, strict=True) for name in inside
    }
    for name, value in tensors().items():
        assert torch.equal(everything_in(sharded)[name], value)


def test_index_is_the_one_of_diffusers(sharded: Path):
    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"] == {"total_size": 4 * 96, "format": "pt"}
    assert list(index["weight_map"]) == sorted(tensors())
    for name, shard in index["weight_map"].items():
        with safe_open(sharded / shard, framework="pt") as file:
            assert name in file.keys() and file.metadata() == {"format": "pt"}  # noqa: SIM118 - not a mapping


@pytest.mark.parametrize("shard_bytes", [4 * 96, 10**9])
def test_one_shard_is_a_plain_file_without_index(tmp_path: Path, shard_bytes: int):
    assert write(tmp_path / "one", tensors(), shard_bytes) == [tmp_path / "one" / WEIGHTS]
    assert [p.name for p in (tmp_path / "one").iterdir()] == [WEIGHTS]
    assert everything_in(tmp_path / "one").keys() == tensors().keys()


def test_earlier_weights_are_removed_and_nothing_else(sharded: Path):
    (sharded / "7.part").write_text("x")
    (sharded / "config.json").write_text("{}")
    (sharded / "other.safetensors").write_text("x")
    write(sharded, {"z": torch.ones(3)})
    assert {p.name for p in sharded.iterdir()} == {WEIGHTS, "config.json", "other.safetensors"}
    assert everything_in(sharded).keys() == {"z"}
    write(sharded, tensors())
    assert not (sharded / WEIGHTS).exists() and everything_in(sharded).keys() == tensors().keys()


def test_files_may_be_read_by_others_and_views_are_written_alone(tmp_path: Path):
    whole = torch.arange(1000.0)
    (path,) = write(tmp_path / "x", {"a": whole[10:12], "b": whole[:4].view(2, 2).t()}, 10**6)
    assert path.stat().st_mode & 0o444 == 0o444 and path.stat().st_size < 400
    assert torch.equal(load_file(path)["b"], torch.tensor([[0.0, 2.0], [1.0, 3.0]]))


def test_no_more_than_a_shard_is_read_ahead(tmp_path: Path):
    """When a tensor is asked for, the shards before it lie on the disk."""
    (tmp_path / "x").mkdir()
    on_disk = {}

    def read(name: str) -> Tensor:
        on_disk[name] = len(list((tmp_path / "x").iterdir()))
        return tensors()[name]

    write_tensors(tmp_path / "x", tensors(), read, {}, SHARD)
    assert on_disk == {"a.weight": 0, "b.weight": 0, "c": 1, "d.weight": 1, "e": 2, "f": 3}


def test_interrupted_write_leaves_no_name_of_a_weight_file(tmp_path: Path):
    def read(name: str) -> Tensor:
        if name == "f":
            raise OSError("gone")
        return tensors()[name]

    (tmp_path / "x").mkdir()
    with pytest.raises(OSError, match="gone"):
        write_tensors(tmp_path / "x", tensors(), read, {}, SHARD)
    assert all(p.suffix == ".part" for p in (tmp_path / "x").iterdir())
    write(tmp_path / "x", tensors())
    assert not list((tmp_path / "x").glob("*.part"))


def test_digest_of_a_file_and_of_shards(sharded: Path, tmp_path: Path):
    (path,) = write(tmp_path / "one", tensors(), 10**6)
    assert digest(tmp_path / "one") == hashlib.sha256(path.read_bytes()).hexdigest()
    parts = [hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(sharded.glob("*.safetensors"))]
    assert digest(sharded) == hashlib.sha256("".join(parts).encode()).hexdigest()
    before = digest(sharded)
    write(sharded, tensors() | {"f": torch.zeros(15)})
    assert digest(sharded) != before


# ---- hostile folders


def change_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/hosts.safetensors",
        "sub/x.safetensors",
        "..",
        ".",
        "",
        "pickled.bin",
        "./diffusion_pytorch_model-00001-of-00004.safetensors",
        7,
        None,
        ["x.safetensors"],
        {},
        "a\0.safetensors",
        "a" * 300 + ".safetensors",
    ],
)
def test_index_that_leaves_its_folder_is_refused(sharded: Path, name: object):
    save_file({"c": torch.ones(1)}, sharded.parent / "outside.safetensors")
    change_index(sharded, lambda index: index["weight_map"].update(c=name))
    for read in (weight_files, tensor_files, digest):
        with pytest.raises(CheckpointError, match="weight_map must name a safetensors file of this folder"):
            read(sharded)


@pytest.mark.parametrize("table", [None, [], "x", {}, 5, [["a", "b"]]])
def test_index_whose_weight_map_is_no_table(sharded: Path, table: object):
    change_index(sharded, lambda index: index.update(weight_map=table))
    with pytest.raises(CheckpointError, match=f"{INDEX}: weight_map"):
        weight_files(sharded)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"x"', "\0"])
def test_index_that_is_no_json_object(sharded: Path, content: str):
    (sharded / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX):
        weight_files(sharded)


def test_missing_shard_is_named(sharded: Path):
    (sharded / "diffusion_pytorch_model-00002-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00004.safetensors is missing"):
        tensor_files(sharded)


def test_damaged_shard_is_named(sharded: Path):
    path = sharded / "diffusion_pytorch_model-00003-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"00003-of-00004.safetensors: not a whole safetensors file"):
        tensor_files(sharded)


def test_tensor_in_two_shards_is_named_with_both(sharded: Path):
    save_file({"c": torch.ones(1), "f": torch.ones(1)}, sharded / "diffusion_pytorch_model-00004-of-00004.safetensors")
    with pytest.raises(CheckpointError, match=r"00004-of-00004.*tensor c is in .*00002-of-00004"):
        tensor_files(sharded)


def test_shards_that_the_index_does_not_name_are_not_read(sharded: Path):
    save_file({"stray": torch.ones(1)}, sharded / "stray.safetensors")
    assert "stray" not in tensor_files(sharded)


# ---- models


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_diffusers_own_loader_reads_dense_shards(pixel_dit: Path, tmp_path: Path, shard_bytes: int):
    from diffusers import DiTTransformer2DModel

    expected = load_file(pixel_dit / "transformer" / WEIGHTS)
    paths = write(tmp_path / "dense", expected, shard_bytes)
    assert (len(paths) > 3) == (shard_bytes == 20_000)
    shutil.copy(pixel_dit / "transformer" / "config.json", tmp_path / "dense")
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "dense", local_files_only=True, use_safetensors=True)
    state = model.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], t) for name, t in expected.items())


@pytest.fixture(scope="module")
def quantized_shards(everything, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`everything`'s transformer again, in shards."""
    folder = tmp_path_factory.mktemp("shards") / "transformer"
    config = json.loads((everything.folder / "transformer" / "config.json").read_text())["quantization_config"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write_tensors, "__defaults__", (15_000,))
        made = checkpoint.write_transformer(everything.transformer, folder, config["recipe"], config["provenance"])
    assert made == digest(folder) and len(weight_files(folder)) > 3
    return folder


def output(model: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    inputs = {"timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}
    with torch.no_grad():
        return model(torch.randn(1, 1, 8, 8, generator=generator), **inputs).sample


def test_quantized_shards_load_as_the_single_file_does(everything, quantized_shards: Path):
    one, several = read_transformer(everything.folder / "transformer"), read_transformer(quantized_shards)
    assert quant_layers(several).keys() == quant_layers(one).keys()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), several.state_dict().values(), strict=True))
    # To the bit: tensors left mapped would lie at other addresses, and products of floats are summed by alignment.
    assert torch.equal(output(several), output(one))


def test_quantized_shards_go_through_every_command(cli, everything, quantized_shards: Path, tmp_path: Path):
    out = Path(shutil.copytree(everything.folder, tmp_path / "out", ignore=shutil.ignore_patterns("transformer")))
    shutil.copytree(quantized_shards, out / "transformer")
    one, several = (json.loads(cli("inspect", folder, "--json").out) for folder in (everything.folder, out))
    # The index and a header for each shard make the files a little larger.
    assert several["size"].pop("file_bytes") > one["size"].pop("file_bytes")
    assert (several["size"], several["layers"]) == (one["size"], one["layers"])
    assert cli("export", out, "--to", "dense", "--output", tmp_path / "dense").code == 0
    assert cli("generate", out, "--count", "1", "--steps", "1", "--output", tmp_path / "x.png").code == 0


@pytest.mark.parametrize("damage", ["swapped", "flipped", "dropped", "single file beside"])
def test_damaged_quantized_shards_are_refused(quantized_shards: Path, tmp_path: Path, everything, damage: str):
    folder = Path(shutil.copytree(quantized_shards, tmp_path / "transformer"))
    first, second, *_ = weight_files(folder)
    if damage == "swapped":
        a, b = first.read_bytes(), second.read_bytes()
        first.write_bytes(b)
        second.write_bytes(a)
    elif damage == "flipped":
        raw = bytearray(second.read_bytes())
        raw[-3] ^= 1
        second.write_bytes(raw)
    elif damage == "dropped":
        gone = weight_files(folder)[1].name
        change_index(folder, lambda i: i.update(weight_map={k: v for k, v in i["weight_map"].items() if v != gone}))
    else:
        shutil.copy(everything.folder / "transformer" / WEIGHTS, folder / WEIGHTS)
        assert len(tensor_files(folder)) == len(everything.transformer.state_dict())
        read_transformer(folder)
        return
    with pytest.raises(CheckpointError, match=r"missing" if damage == "dropped" else r"sha256"):
        read_transformer(folder)


# ---- variants


@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_lone_variant_is_read(pixel_dit: Path, everything, tmp_path: Path, max_shard_size: str, quantized: bool):
    import quantdit

    model = quantdit.load((everything.folder if quantized else pixel_dit) / "transformer")
    model.save_pretrained(tmp_path / "x", variant="fp16", max_shard_size=max_shard_size)
    assert not (tmp_path / "x" / WEIGHTS).exists() and not (tmp_path / "x" / INDEX).exists()
    state = quantdit.load(tmp_path / "x").state_dict()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_several_variants_are_named(cli, pixel_dit: Path, tmp_path: Path):
    import quantdit

    model = quantdit.load(pixel_dit / "transformer")
    for variant in ("fp16", "ema"):
        model.save_pretrained(tmp_path / "x", variant=variant)
    ran = cli("calibrate", "--model", tmp_path / "x", "--bits", "w8a8", "--samples", 0, "--output", tmp_path / "out")
    assert ran.code == 1 and "variants ema, fp16" in ran.error
    model.save_pretrained(tmp_path / "x")
    quantdit.load(tmp_path / "x")


def test_a_pipeline_of_a_variant_is_read(cli, plain_dit: Path, tmp_path: Path):
    """The autoencoder too, which diffusers reads."""
    from quantdit.pipelines.pipeline import load_pipeline

    load_pipeline(str(plain_dit))[0].save_pretrained(tmp_path / "x", variant="fp16")
    ran = cli("calibrate", "--model", tmp_path / "x", "--bits", "w8a8", "--samples", 0, "--output", tmp_path / "out")
    assert ran.code == 0, ran.err
    vae, expected = (load_pipeline(str(folder))[0].vae.state_dict() for folder in (tmp_path / "out", plain_dit))
    assert all(torch.equal(t, expected[name]) for name, t in vae.items())


# ---- JSON


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": NaN}', "NaN is no finite number"),
        (b'{"a": -Infinity}', "-Infinity is no finite number"),
        (b'{"a": 1e999}', "1e999 is no finite number"),
        (b'{"a": {"b": 1, "b": 2}}', "key 'b' is there twice"),
        (b'{"a": "\xff\xfe"}', "no readable JSON"),
        (b'{"a":' * 100_000, "no readable JSON"),
    ],
)
def test_json_is_read_strictly(tmp_path: Path, content: bytes, words: str):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        files.read_json(tmp_path / "x.json")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop of links", "device", "link to nothing"])
def test_what_is_no_regular_file_is_refused_at_once(pixel_dit: Path, tmp_path: Path, name: str, kind: str):
    import quantdit

    folder = Path(shutil.copytree(pixel_dit / "transformer", tmp_path / "x"))
    path = folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"loop of links": path, "device": "/dev/zero", "link to nothing": "nowhere"}[kind])
    with pytest.raises(ValueError, match=r"no regular file|cannot be read|is missing|no diffusers model|no safetensors weights"):
        quantdit.load(folder)


def test_json_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "x.json", {"a": object()})
    assert files.read_json(tmp_path / "x.json") == {"a": 1}
    assert (tmp_path / "x.json").read_text().endswith("}\n")
