"""A model larger than memory: what is loaded when, what a damaged source says, and a budget that is kept or refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantdit.checkpoints import streaming
from quantdit.checkpoints.checkpoint import CheckpointError
from quantdit.checkpoints.streaming import GRAM_COPIES, PROCESS_BYTES, Stream, need_of, skeleton, stream_of, whole
from quantdit.compiling.report import REPORT
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.system import files
from quantdit.system.files import WEIGHTS, tensor_files
from quantdit.system.memory import in_gib

BLOCKS = ("transformer_blocks.0", "transformer_blocks.1")
SHARED = "transformer_blocks.0.norm1.emb"
INPUTS = {"timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}


@pytest.fixture
def stream(pixel_dit: Path) -> Stream:
    """`pixel_dit`'s transformer with its blocks on the disk."""
    folder = pixel_dit / "transformer"
    transformer = skeleton(folder, torch.float32)
    return stream_of(transformer, folder)


def in_memory(stream: Stream) -> set[str]:
    """The blocks that are in memory as a whole; what is shared does not count."""
    named = [(n, p) for n, p in stream.transformer.named_parameters() if not n.startswith(SHARED)]
    there = {b: {p.device.type != "meta" for n, p in named if n.startswith(f"{b}.")} for b in BLOCKS}
    assert all(len(found) == 1 for found in there.values()), "a block is in memory in part"
    return {b for b, found in there.items() if found == {True}}


def forward(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.ones(1, 1, 8, 8), **INPUTS).sample


def damaged(tmp_path: Path, model: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a model's transformer with changed weights."""
    folder = Path(shutil.copytree(model / "transformer", tmp_path / "damaged"))
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


# ---- what is in memory


def test_skeleton_has_all_but_the_blocks(stream: Stream, pixel_dit: Path):
    assert in_memory(stream) == set() and streaming.is_streamed(stream.transformer)
    stored = load_file(pixel_dit / "transformer" / WEIGHTS)
    for name, tensor in stream.transformer.state_dict().items():
        if not name.startswith("transformer_blocks.") or name.startswith(f"{SHARED}."):
            assert torch.equal(tensor, stored[name])
    assert not stream.transformer.training and not any(p.requires_grad for p in stream.transformer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_is_what_diffusers_loads(pixel_dit: Path, dtype: torch.dtype):
    from diffusers import DiTTransformer2DModel

    ours, theirs = whole(pixel_dit / "transformer", dtype), DiTTransformer2DModel.from_pretrained(pixel_dit / "transformer")
    state = theirs.to(dtype).state_dict()
    assert ours.state_dict().keys() == state.keys()
    assert all(t.dtype == state[n].dtype and torch.equal(t, state[n]) for n, t in ours.state_dict().items())
    assert not streaming.is_streamed(ours)


def test_block_is_in_memory_inside_loaded_alone(stream: Stream):
    with stream.loaded(BLOCKS[1]) as block:
        assert block is stream.transformer.get_submodule(BLOCKS[1]) and in_memory(stream) == {BLOCKS[1]}
        with stream.loaded(BLOCKS[0]):
            assert in_memory(stream) == set(BLOCKS)
        assert in_memory(stream) == {BLOCKS[1]}
    assert in_memory(stream) == set()


def test_one_block_at_a_time_while_following(stream: Stream, pixel_dit: Path):
    seen = []
    for path in BLOCKS:
        block = stream.transformer.get_submodule(path)
        block.register_forward_pre_hook(lambda m, a: seen.append(in_memory(stream)))
        block.register_forward_hook(lambda m, a, o: seen.append(in_memory(stream)))
    with stream.following(BLOCKS):
        first = forward(stream.transformer)
        assert in_memory(stream) == set()
        assert torch.equal(forward(stream.transformer), first)
    assert seen == [{BLOCKS[0]}, {BLOCKS[0]}, {BLOCKS[1]}, {BLOCKS[1]}] * 2
    torch.testing.assert_close(first, forward(whole(pixel_dit / "transformer", torch.float32)))
    assert len(stream.transformer.get_submodule(BLOCKS[0])._forward_pre_hooks) == 1


def test_nested_use_drops_a_block_when_the_outermost_ends(stream: Stream):
    with stream.loaded(BLOCKS[0]):
        with stream.loaded(BLOCKS[0]):
            pass
        assert in_memory(stream) == {BLOCKS[0]}
        with stream.following(BLOCKS):
            forward(stream.transformer)
            assert in_memory(stream) == {BLOCKS[0]}
        assert in_memory(stream) == {BLOCKS[0]}
    assert in_memory(stream) == set()
    with stream.following(BLOCKS):
        with stream.following(BLOCKS):
            forward(stream.transformer)
        forward(stream.transformer)
        assert in_memory(stream) == set()
        with stream.loaded(BLOCKS[1]):
            forward(stream.transformer)
            assert in_memory(stream) == {BLOCKS[1]}
        assert in_memory(stream) == set()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["loaded", "following"])
def test_nothing_stays_in_memory_after_an_exception(stream: Stream, error: type[BaseException], where: str):
    def fail(*args: object) -> None:
        raise error

    handle = stream.transformer.get_submodule(f"{BLOCKS[1]}.attn1").register_forward_pre_hook(fail)
    with pytest.raises(error):
        if where == "following":
            with stream.following(BLOCKS):
                forward(stream.transformer)
        else:
            with stream.loaded(BLOCKS[1]):
                fail()
    assert in_memory(stream) == set()
    handle.remove()
    with stream.following(BLOCKS):
        forward(stream.transformer)
    assert in_memory(stream) == set()


def test_block_that_cannot_be_read_does_not_stay_in_part(pixel_dit: Path, tmp_path: Path):
    folder = damaged(tmp_path, pixel_dit, lambda t: t[f"{BLOCKS[1]}.ff.net.2.bias"].fill_(math.nan))
    stream = Stream(skeleton(folder, torch.float32), tensor_files(folder), shared=(SHARED,))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"ff\.net\.2"), stream.loaded(BLOCKS[1]):
            pass
        assert in_memory(stream) == set()
        with pytest.raises(CheckpointError, match=r"ff\.net\.2"), stream.following(BLOCKS):
            forward(stream.transformer)
        assert in_memory(stream) == set()


def test_what_was_changed_in_memory_is_read_anew(stream: Stream, pixel_dit: Path):
    name = f"{BLOCKS[1]}.attn1.to_q.weight"
    with stream.loaded(BLOCKS[1]) as block:
        block.attn1.to_q.weight.data.zero_()
    with stream.loaded(BLOCKS[1]) as block:
        assert torch.equal(block.attn1.to_q.weight, load_file(pixel_dit / "transformer" / WEIGHTS)[name])


def test_adopted_tensors_come_from_their_new_file(stream: Stream, tmp_path: Path):
    name = f"{BLOCKS[1]}.attn1.to_q.weight"
    save_file({name: torch.full((64, 64), 2.0)}, tmp_path / "new")
    stream.adopt(tmp_path / "new", [name])
    with stream.loaded(BLOCKS[1]) as block:
        assert bool((block.attn1.to_q.weight == 2).all()) and not bool((block.attn1.to_k.weight == 2).all())


# ---- damaged sources

NAME = f"{BLOCKS[1]}.attn1.to_v.weight"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [NAME, "proj_out_1.weight"])
def test_value_that_is_not_finite_names_its_layer(pixel_dit: Path, tmp_path: Path, name: str, value: float):
    folder = damaged(tmp_path, pixel_dit, lambda t: t[name].view(-1)[:3].fill_(value))
    with pytest.raises(CheckpointError, match=rf"layer {name.removesuffix('.weight')}: 3 values of its weight are NaN or inf"):
        whole(folder, torch.float32)


def test_value_too_large_for_the_dtype_names_its_layer(pixel_dit: Path, tmp_path: Path):
    folder = damaged(tmp_path, pixel_dit, lambda t: t[NAME].view(-1)[:1].fill_(1e6))
    whole(folder, torch.float32)
    with pytest.raises(CheckpointError, match=r"attn1\.to_v: 1 values"):
        whole(folder, torch.float16)


def test_missing_tensor_is_named(pixel_dit: Path, tmp_path: Path):
    folder = damaged(tmp_path, pixel_dit, lambda t: [t.pop(NAME), t.pop(NAME.replace("weight", "bias"))])
    with pytest.raises(CheckpointError, match=r"tensor .*attn1.to_v.bias is missing \(and 1 more\)"):
        skeleton(folder, torch.float32)


def test_wrong_shape_names_tensor_and_both_shapes(pixel_dit: Path, tmp_path: Path):
    folder = damaged(tmp_path, pixel_dit, lambda t: t.update({NAME: torch.ones(64, 63)}))
    with pytest.raises(CheckpointError, match=r"tensor .*to_v.weight is \(64, 63\), expected \(64, 64\)"):
        whole(folder, torch.float32)


# ---- the budget


def test_need_is_what_is_there(pixel_dit: Path, stream: Stream):
    folder = pixel_dit / "transformer"
    need = need_of(folder, torch.float32)
    model = whole(folder, torch.float32)
    sizes = {n: p.nbytes for n, p in model.named_parameters()}
    blocks = [sum(s for n, s in sizes.items() if n.startswith(f"{b}.")) for b in BLOCKS]
    work = PROCESS_BYTES + GRAM_COPIES * 4 * 256**2
    assert need.resident == sum(sizes.values()) + work
    assert need.streamed == sum(sizes.values()) - sum(blocks) + 2 * max(blocks) + work
    half = need_of(folder, torch.bfloat16)
    assert half.resident - work == (need.resident - work) / 2 and half.streamed - work == (need.streamed - work) / 2


@pytest.fixture
def calibrate(cli, tmp_path: Path):
    def run(model: Path, *more: object, output: str = "out"):
        where = ("--model", model, "--bits", "w8a8", "--output", tmp_path / output)
        return cli("calibrate", *where, "--samples", "1", "--steps", "2", *more)

    return run


@pytest.fixture
def heavy(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Let a model take so much memory as a whole and block by block."""

    def set_need(resident: int, streamed: int) -> None:
        monkeypatch.setattr(streaming, "need_of", lambda *a: streaming.Need(resident, streamed))

    return set_need


@pytest.mark.parametrize("bare", [False, True])
def test_budget_that_is_too_small_names_one_that_would_do(calibrate, heavy, pixel_dit: Path, tmp_path: Path, bare: bool):
    heavy(9 * 2**30, 2 * 2**30 + 12345)
    model = pixel_dit / "transformer" if bare else pixel_dit
    ran = calibrate(model, "--memory-budget", "1.5GiB")
    assert ran.code == 1 and "1.5GiB is too small" in ran.error and "--memory-budget 2.1GiB" in ran.error
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert calibrate(model, "--memory-budget", "2.1GiB").code == 0
    memory = files.read_json(tmp_path / "out" / REPORT)["memory"]
    assert memory["streamed"] and memory["budget_bytes"] == int(2.1 * 2**30) and memory["peak_bytes"] > 2**27


def test_streamed_and_resident_give_the_same_bytes(calibrate, heavy, pixel_dit: Path, tmp_path: Path):
    assert calibrate(pixel_dit, output="resident").code == 0
    heavy(9 * 2**30, 2**20)
    assert calibrate(pixel_dit, "--memory-budget", "2MB", output="streamed").code == 0
    folders = [tmp_path / name for name in ("resident", "streamed")]
    assert [files.read_json(f / REPORT)["memory"]["streamed"] for f in folders] == [False, True]
    assert files.digest(folders[0] / "transformer") == files.digest(folders[1] / "transformer")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("500MB", 500_000_000),
        ("2G", 2_000_000_000),
        ("1TiB", 2**40),
        ("64KiB", 2**16),
        ("100B", 100),
        ("12345", 12345),
    ],
)
def test_sizes(heavy, pixel_dit: Path, cli, tmp_path: Path, text: str, size: int):
    """A budget of the size just does; of a byte less it would not."""
    where = ("--model", pixel_dit, "--recipe", tmp_path / "missing.toml", "--output", tmp_path / "out")
    from quantdit.cli import command_line

    args = command_line.command_parser().parse_args(["calibrate", *map(str, where), "--memory-budget", text])
    assert args.memory_budget == size
    heavy(size, size)
    load_pipeline(str(pixel_dit), memory_budget=size)
    with pytest.raises(ValueError, match="too small"):
        load_pipeline(str(pixel_dit), memory_budget=size - 1)


@pytest.mark.parametrize("text", ["", "GiB", "8 gigabytes", "-1GiB", "0", "0GiB", "nan", "inf", "1.2.3GiB", ".", "8XB", "1e9"])
def test_nonsense_sizes_are_wrong_usage(calibrate, pixel_dit: Path, text: str):
    ran = calibrate(pixel_dit, f"--memory-budget={text}")
    assert ran.code == 2 and "such as 8GiB or 500MB" in ran.err


@pytest.mark.parametrize("size", [1, 2**30, 2**30 + 1, 3 * 2**30 + 5, 123456789012])
def test_advised_size_is_enough_and_not_much_more(size: int):
    text = in_gib(size)
    unit = 2**30 if size >= 2**30 / 10 else 2**20
    assert text.endswith("GiB" if unit == 2**30 else "MiB")
    assert size <= math.floor(float(text[:-3]) * unit) <= size + unit / 10 + 1


def test_two_transformers_share_one_budget(monkeypatch: pytest.MonkeyPatch, pixel_dit: Path, tmp_path: Path):
    """Both experts of Wan 2.2 are in memory at a time."""
    for part in ("transformer", "transformer_2"):
        shutil.copytree(pixel_dit / "transformer", tmp_path / "two" / part)
    monkeypatch.setattr(streaming, "need_of", lambda *a: streaming.Need(resident=100, streamed=30, work=10))
    with pytest.raises(ValueError, match="too small for two"):
        load_pipeline(str(tmp_path / "two"), memory_budget=49)
    for budget, streamed in ((190, False), (189, True), (50, True)):
        bare, source = load_pipeline(str(tmp_path / "two"), memory_budget=budget)
        assert source.components == ("transformer", "transformer_2") and source.memory_budget == budget
        assert any(streaming.is_streamed(getattr(bare, part)) for part in source.components) == streamed


def test_config_of_another_model_names_what_is_missing(pixel_dit: Path, tmp_path: Path):
    folder = Path(shutil.copytree(pixel_dit / "transformer", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.2\..* is missing"):
        skeleton(folder, torch.float32)
