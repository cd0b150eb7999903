"""Text encoders of transformers: written, read, streamed and refused as transformers of diffusers are."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantdit.calibration.data_free import quantize_table
from quantdit.calibration.quantize import quantize_weight
from quantdit.checkpoints import checkpoint, class_tree, streaming
from quantdit.checkpoints.checkpoint import CheckpointError, read_transformer, write_transformer
from quantdit.layers.quant_embedding import QuantEmbedding, put_layer, scale_of
from quantdit.layers.quant_linear import QuantLinear
from quantdit.models.adapter import adapter_for
from quantdit.system import files
from quantdit.system.files import Advice
from quantdit.tensors.layer_spec import ActivationSpec, LayerSpec
from tiny_encoders import TINY, encoder, outputs, tables

WEIGHTS = files.ENCODER_WEIGHTS
LAYER = "encoder.block.1.layer.0.SelfAttention.q"


def quantized(name: str, **changes: Any) -> Any:
    """An encoder with its tables as int8, its linears as int4 with activations of 8 bits."""
    model = encoder(name, **changes)
    for path in tables(model):
        table = model.get_submodule(path)
        made = quantize_table(table.weight.split(64), *table.weight.shape, "int8", table.weight.shape[1])
        put_layer(model, path, QuantEmbedding.from_tensors(made.spec, made.tensors, scale_of(table)))
    for path, linear in [*model.named_modules()]:
        if type(linear) is nn.Linear and path != "lm_head":
            q = quantize_weight(linear.weight, torch.eye(linear.in_features), "int4", 16, "rtn")
            put_layer(model, path, QuantLinear.from_tensors(LayerSpec(q.spec, ActivationSpec(8)), q.tensors(), linear.bias))
    return model


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized T5. Read only; `copied` copies it."""
    folder = tmp_path_factory.mktemp("t5") / "text_encoder"
    write_transformer(quantized("T5EncoderModel"), folder, {"name": "test"}, {})
    return folder


@pytest.fixture
def copied(t5: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(t5, tmp_path / "copied"))


def saved(name: str, folder: Path, **changes: Any) -> Path:
    """The folder of a full-precision encoder as transformers writes it."""
    encoder(name, **changes).save_pretrained(folder)
    return folder


def change(folder: Path, **entries: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


# ---- written and read


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("name", TINY)
def test_outputs_after_reading_are_those_before_writing(name: str, shards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if shards:
        monkeypatch.setitem(files.write_tensors.__kwdefaults__, "weights", WEIGHTS)
        monkeypatch.setattr(files.write_tensors, "__defaults__", (8_000,))
    model = quantized(name)
    write_transformer(model, tmp_path / "a", {"name": "test"}, {"by": "hand"})
    written = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert (f"{WEIGHTS}.index.json" in written and len(written) > 3) if shards else written == ["config.json", WEIGHTS]
    read = read_transformer(tmp_path / "a")
    assert type(read) is type(model)
    assert same(outputs(read, name), outputs(model, name))
    assert class_tree.difference(read) is None
    write_transformer(read, tmp_path / "b", {"name": "test"}, {"by": "hand"})
    assert all((tmp_path / "b" / each).read_bytes() == (tmp_path / "a" / each).read_bytes() for each in written)


def test_what_is_tied_is_stored_once(t5: Path):
    keys = load_file(t5 / WEIGHTS).keys()
    assert "shared.data" in keys and not any("embed_tokens" in key for key in keys)
    model: Any = read_transformer(t5)
    assert isinstance(model.shared, QuantEmbedding) and model.shared is model.encoder.embed_tokens


def test_dense_tied_weights_are_one_parameter_after_reading(tmp_path: Path):
    model = encoder("Qwen3ForCausalLM")
    write_transformer(model, tmp_path, {}, {})
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    read: Any = read_transformer(tmp_path)
    assert read.lm_head.weight is read.model.embed_tokens.weight
    assert same(outputs(read, "Qwen3ForCausalLM"), outputs(model, "Qwen3ForCausalLM"))


def test_names_that_transformers_saves_are_read(tmp_path: Path):
    """Its save_pretrained gives tensors their names of earlier versions: `visual.` instead of `model.visual.`."""
    name = "Qwen2_5_VLForConditionalGeneration"
    model = quantized(name)
    write_transformer(model, tmp_path, {}, {})
    stored = load_file(tmp_path / WEIGHTS)
    from safetensors import safe_open
    from transformers.core_model_loading import revert_weight_conversion

    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        header = file.metadata()
    renamed = revert_weight_conversion(model, stored)
    assert any(key.startswith("visual.") for key in renamed)
    save_file(renamed, tmp_path / WEIGHTS, metadata=header)
    content = json.loads((tmp_path / "config.json").read_text())
    content["quantization_config"]["sha256"] = files.sha256(tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert same(outputs(read_transformer(tmp_path), name), outputs(model, name))


def test_t5_keeps_its_last_linear_in_float32_beside_float16(t5: Path):
    model: Any = read_transformer(t5, torch.float16)
    dense = model.encoder.block[0].layer[1].DenseReluDense
    assert (dense.wo.weight.dtype, dense.wi_0.weight.dtype) == (torch.float32, torch.float16)
    assert model.shared(torch.tensor([1])).dtype == torch.float16
    assert read_transformer(t5, torch.bfloat16).encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.bfloat16


# ---- refused


def nested(depth: int) -> dict:
    content: dict = {}
    for _ in range(depth):
        content = {"a": content}
    return content


def bad_layers(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        edit(content["quantization_config"]["layers"])
        (folder / "config.json").write_text(json.dumps(content))

    return damage


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no class": (lambda f: change(f, architectures=["Nothing"]), "has no model class 'Nothing'"),
    "not a class of models": (lambda f: change(f, architectures=["AutoTokenizer"]), "has no model class 'AutoTokenizer'"),
    "a module of transformers": (lambda f: change(f, architectures=["models"]), "has no model class 'models'"),
    "no text": (lambda f: change(f, architectures=[[1]]), r"has no model class \[1\]"),
    "no architectures": (lambda f: change(f, architectures=[]), "has no model class None"),
    "another class": (lambda f: change(f, architectures=["UMT5EncoderModel"]), "missing|does not exist|is not|architectures"),
    "negative": (lambda f: change(f, d_ff=-64), "d_ff = -64 is not plausible"),
    "layers without end": (lambda f: change(f, num_layers=10**6), "num_layers = 1000000 is not plausible"),
    "layers in a part": (lambda f: change(f, text_config={"num_hidden_layers": 10**6}), "num_hidden_layers = 1000000 is not"),
    "text": (lambda f: change(f, d_model="wide"), "cannot be built"),
    "no kind": (lambda f: change(f, model_type=[]), "model_type must be text"),
    "a deep config": (lambda f: change(f, deep=nested(300)), "nested more than 32 deep"),
    "another number": (lambda f: change(f, layer_norm_epsilon=1e-5), "layer_norm_epsilon is 1e-05, was 1e-06"),
    "another width": (lambda f: change(f, d_ff=128), "64 x 32 in quantization_config, but 128 x 32 in the model"),
    "wrong layer": (bad_layers(lambda of: of.update(nothing=of["shared"])), "layer 'nothing' does not exist in T5EncoderModel"),
    "no linear": (
        bad_layers(lambda of: of.update({"encoder.dropout": of["shared"]})),
        "layer 'encoder.dropout' is a Dropout, expected a Linear or an Embedding",
    ),
    "tied": (bad_layers(lambda of: of.update({"encoder.embed_tokens": of["shared"]})), "'encoder.embed_tokens' is tied"),
    "a rotated table": (bad_layers(lambda of: of["shared"].update(rotation="hadamard", block=16)), "has no rotation"),
    "a table with inputs": (
        bad_layers(lambda of: of["shared"]["activation"].update(bits=8)),
        "a table of embeddings has no quantized input",
    ),
    "a table of fewer rows": (
        bad_layers(lambda of: of["shared"]["weight"].update(out_features=199)),
        "199 x 32 in quantization_config, but 200 x 32 in the model",
    ),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]), "copy it again"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "is missing"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folders_are_refused(copied: Path, case: str):
    damage, words = HOSTILE[case]
    damage(copied)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_transformer(copied)
    assert str(copied) in str(caught.value) and "\n" not in str(caught.value)


def test_code_and_files_that_a_config_names_are_left_alone(copied: Path):
    change(copied, auto_map={"AutoModel": "evil.Model"}, _attn_implementation="evil/kernel", attn_implementation="evil/kernel")
    model: Any = read_transformer(copied)
    assert type(model).__name__ == "T5EncoderModel" and model.config._attn_implementation == "sdpa"


def test_any_flipped_bit_is_noticed(copied: Path):
    weights, size = copied / WEIGHTS, (copied / WEIGHTS).stat().st_size
    good = weights.read_bytes()
    for place in range(0, size, size // 23):
        weights.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(CheckpointError):
            read_transformer(copied)


def test_an_encoder_of_another_tool_is_refused_by_its_name(tmp_path: Path):
    folder = saved("T5EncoderModel", tmp_path)
    change(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    for read in (streaming.whole, streaming.skeleton, streaming.need_of):
        with pytest.raises(CheckpointError, match="quantized by bitsandbytes, whose codes quantdit does not read"):
            read(folder, torch.float32)


def test_pickled_weights_are_refused(tmp_path: Path):
    folder = saved("T5EncoderModel", tmp_path)
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"pickled ones \(.bin\) are not read"):
        streaming.whole(folder, torch.float32)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is missing"):
        files.stored_tensors(files.weight_files(folder))


# ---- full precision, whole and streamed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TINY)
def test_whole_is_what_transformers_loads(name: str, dtype: torch.dtype, tmp_path: Path):
    import transformers

    folder = saved(name, tmp_path)
    ours = streaming.whole(folder, dtype)
    theirs = getattr(transformers, name).from_pretrained(folder, dtype=dtype).state_dict()
    found = ours.state_dict()
    assert found.keys() == theirs.keys()
    assert all(found[key].dtype == t.dtype and torch.equal(found[key], t) for key, t in theirs.items())


@pytest.mark.parametrize("name", TINY)
def test_streamed_is_whole(name: str, tmp_path: Path):
    folder = saved(name, tmp_path)
    model, whole = streaming.skeleton(folder, torch.float32), streaming.whole(folder, torch.float32)
    adapter = adapter_for(model)
    stream = streaming.stream_of(model, folder)
    assert not any("forward" in vars(module) for module in whole.modules()), "what is in memory is not read from the disk"
    blocks = [f"{path}.{i}" for path in adapter.blocks for i in range(len(model.get_submodule(path)))]
    assert streaming.is_streamed(model) and len(blocks) >= 2
    with stream.following(blocks):
        assert same(outputs(model, name), outputs(whole, name))
    assert all(p.device.type == "meta" for path in blocks for p in model.get_submodule(path).parameters())
    need = streaming.need_of(folder, torch.float32)
    assert need.resident - need.work == sum(p.numel() * 4 for p in whole.parameters())


def test_a_table_may_stay_on_the_disk_and_is_read_by_rows(tmp_path: Path):
    folder = saved("T5EncoderModel", tmp_path)
    whole: Any = streaming.whole(folder, torch.float32)
    model: Any = streaming.skeleton(folder, torch.float32)
    assert model.shared.weight.device.type == "meta" and model.encoder.final_layer_norm.weight.device.type == "cpu"
    stream = streaming.stream_of(model, folder)
    parts = [*stream.rows("shared.weight", 64)]
    assert [len(part) for part in parts] == [64, 64, 64, 8] and torch.equal(torch.cat(parts), whole.shared.weight)
    with pytest.raises(CheckpointError, match="no file holds tensor nothing"):
        next(stream.rows("nothing", 64))


def test_another_class_than_the_config_names_as_pipelines_do(tmp_path: Path):
    """Z-Image's text encoder is saved as a Qwen3ForCausalLM and loaded as a Qwen3Model."""
    import transformers

    folder = saved("Qwen3ForCausalLM", tmp_path, tie_word_embeddings=False)
    with pytest.warns(Advice, match="Qwen3Model has no such tensors: lm_head.weight"):
        model = streaming.whole(folder, torch.float32, "Qwen3Model")
    assert type(model).__name__ == "Qwen3Model"
    assert same(outputs(model, "Qwen3Model"), outputs(transformers.Qwen3Model.from_pretrained(folder), "Qwen3Model"))


def test_a_tied_table_is_read_under_either_name(tmp_path: Path):
    folder = saved("T5EncoderModel", tmp_path)
    expected = outputs(streaming.whole(folder, torch.float32), "T5EncoderModel")
    tensors = load_file(folder / WEIGHTS)
    table = tensors.pop("shared.weight")
    save_file(tensors | {"encoder.embed_tokens.weight": table}, folder / WEIGHTS, metadata={"format": "pt"})
    assert same(outputs(streaming.whole(folder, torch.float32), "T5EncoderModel"), expected)
    both = {"encoder.embed_tokens.weight": table, "shared.weight": table + 1}
    save_file(tensors | both, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=re.escape("encoder.embed_tokens.weight is tied to shared.weight")):
        streaming.whole(folder, torch.float32)


def test_a_missing_tensor_is_named(tmp_path: Path):
    folder = saved("CLIPTextModel", tmp_path)
    tensors = load_file(folder / WEIGHTS)
    gone = next(key for key in tensors if key.endswith("layers.1.mlp.fc2.weight"))
    del tensors[gone]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"tensor encoder\.layers\.1\.mlp\.fc2\.weight is missing"):
        streaming.whole(folder, torch.float32)


def test_names_of_earlier_versions_are_read(tmp_path: Path):
    """CLIP's encoders on the hub have `text_model.` before their names, and a table of positions that the class computes."""
    folder = saved("CLIPTextModel", tmp_path)
    expected = outputs(streaming.whole(folder, torch.float32), "CLIPTextModel")
    tensors = {f"text_model.{key.removeprefix('text_model.')}": t for key, t in load_file(folder / WEIGHTS).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    assert same(outputs(streaming.whole(folder, torch.float32), "CLIPTextModel"), expected)


def test_what_a_model_is_changed_to_is_told(t5: Path):
    model: Any = read_transformer(t5)
    model.encoder.block[1].layer[0].SelfAttention.lora_A = nn.Linear(4, 4)
    assert "lora_A.bias is of an adapter" in str(class_tree.difference(model))
    assert checkpoint.is_quantized(t5)
