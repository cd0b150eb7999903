"""What scripts do with a loaded model: compile it, offload it, move and cast it, load it in other processes, copy it."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantdit
from quantdit.checkpoints.checkpoint import quant_layers


@pytest.fixture
def model(made) -> torch.nn.Module:
    return made.cls.from_pretrained(made.folder / "one")


# ---- torch.compile


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_every_kind_of_layer_compiles_without_a_graph_break(made):
    """fullgraph=True raises at the first one; aot_eager traces through every op's fake kernel as inductor would."""
    seen = set()
    for layer in quant_layers(made.model).values():
        kind = (layer.layer_spec.rotation, layer.layer_spec.activation, layer.spec.format, layer.layer_spec.rank > 0)
        if kind in seen:
            continue
        seen.add(kind)
        x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), layer(x), atol=1e-5, rtol=1e-5)
    assert len(seen) >= 5


def test_the_repeated_blocks_of_a_model_compile_whole(made, model, run):
    """Regional compilation, as diffusers' documentation recommends for transformers."""
    expected = run(model, made.inputs[0])
    blocks = [m for m in model.modules() if type(m).__name__ in (model._repeated_blocks or ("BasicTransformerBlock",))]
    assert blocks
    for block in blocks:
        block.compile(fullgraph=True, backend="eager")
    actual = run(model, made.inputs[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    torch.testing.assert_close(actual, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


# ---- offloading


@pytest.fixture
def offloadable(model) -> torch.nn.Module:
    if not model._supports_group_offloading:
        pytest.skip("diffusers offers this class no group offloading; accelerate's hooks, below, are for every class")
    return model


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading_changes_no_bit(made, offloadable, run, kind: str):
    model = offloadable
    expected = run(model, made.inputs[0])
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=kind, **options)
    for inputs in (made.inputs[0], made.inputs[0]):
        assert torch.equal(run(model, inputs), expected)


def test_group_offloading_to_the_disk_changes_no_bit(made, offloadable, run, tmp_path: Path):
    model = offloadable
    expected = run(model, made.inputs[0])
    options = {"offload_type": "block_level", "num_blocks_per_group": 1, "offload_to_disk_path": str(tmp_path)}
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **options)
    assert torch.equal(run(model, made.inputs[0]), expected)
    assert list(tmp_path.glob("*.safetensors"))


def test_accelerates_hooks_change_no_bit(made, model, run):
    """What enable_sequential_cpu_offload and enable_model_cpu_offload put on modules, with the CPU for the accelerator."""
    from accelerate import cpu_offload, cpu_offload_with_hook

    expected = run(model, made.inputs[0])
    sequential = made.cls.from_pretrained(made.folder / "one")
    cpu_offload(sequential, torch.device("cpu"), offload_buffers=True)
    assert torch.equal(run(sequential, made.inputs[0]), expected)
    whole, hook = cpu_offload_with_hook(model, torch.device("cpu"))
    assert torch.equal(run(whole, made.inputs[0]), expected)
    hook.offload()
    assert torch.equal(run(whole, made.inputs[0]), expected)


def test_a_device_map_places_every_tensor(made, run):
    placed = made.cls.from_pretrained(made.folder / "one", device_map={"": "cpu"})
    assert torch.equal(run(placed, made.inputs[0]), run(made.model, made.inputs[0]))


# ---- moving and casting


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cast_model_is_one_loaded_in_that_dtype(made, model, run, dtype: torch.dtype):
    cast = model.to(dtype)
    assert cast.dtype == dtype
    loaded = quantdit.load(made.folder / "one", dtype=dtype)
    kept = set(getattr(made.cls, "_keep_in_fp32_modules", None) or ())
    for (key, a), b in zip(cast.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b) or (kept & set(key.split(".")) and torch.equal(a, b.to(dtype)))
    assert bool(torch.isfinite(run(cast, made.inputs[0])).all())


def test_moving_keeps_every_bit(made, model, run):
    expected = run(model, made.inputs[0])
    moved = model.to("cpu").to("meta")
    assert {t.device.type for t in moved.state_dict().values()} == {"meta"}
    again = made.cls.from_pretrained(made.folder / "one").to(device="cpu")
    assert torch.equal(run(again, made.inputs[0]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_outputs_are_finite_and_of_the_dtype_asked_for(made, run, dtype: torch.dtype):
    found = run(made.cls.from_pretrained(made.folder / "one", torch_dtype=dtype), made.inputs[1])
    assert found.dtype == dtype and bool(torch.isfinite(found).all())


def test_float16_is_finite_where_the_dequantized_layer_is(made):
    """Tokens that a rotation adds up in one place, beyond float16's range: 20000 sqrt(block)."""
    for name, layer in quant_layers(made.model).items():
        t = layer.transform
        signs = torch.ones(layer.in_features) if t.premultiplier is None else t.premultiplier.sign().float()
        x = torch.stack([20000 * signs, torch.full_like(signs, 20000)]).half()
        exact = torch.nn.functional.linear(x.float(), layer.weight, layer.bias)
        y = layer(x)
        assert bool(torch.isfinite(y)[exact.abs() < 60000].all()), name


def test_attention_backends_can_be_chosen(made, model, run):
    if not hasattr(model, "set_attention_backend"):
        pytest.skip("this class of diffusers has one attention")
    expected = run(model, made.inputs[0])
    for backend in ("_native_math", "native"):  # the last one stays, for other models too
        model.set_attention_backend(backend)
        torch.testing.assert_close(run(model, made.inputs[0]), expected, atol=0.05 * float(expected.abs().max()), rtol=0)


def test_a_layer_that_lacks_a_tensor_raises(made):
    """Each of its tensors alone on the meta device, where ops return memory that nobody wrote to."""
    for name, layer in quant_layers(made.model).items():
        x = torch.randn(2, layer.in_features)
        layer(x)
        for field in (*layer._buffers, *(() if layer.bias is None else ("bias",))):
            part = copy.deepcopy(layer)
            tensors = part._parameters if field == "bias" else part._buffers
            tensors[field] = torch.nn.Parameter(layer.bias.to("meta"), False) if field == "bias" else tensors[field].to("meta")
            with pytest.raises(RuntimeError, match="not loaded whole"):
                part(x)
                pytest.fail(f"{name}.{field}")


# ---- copies and other processes


def test_a_deep_copy_follows_its_own_timesteps(made, model, run):
    """Its layers with static scales, not those of the model it was copied from."""
    expected = [run(model, inputs) for inputs in made.inputs]
    copied = copy.deepcopy(model)
    for inputs, y in zip(made.inputs, expected, strict=True):
        run(model, made.inputs[-1])
        assert torch.equal(run(copied, inputs), y)


def test_a_model_survives_torch_save(made, model, run):
    """As a script of one's own may keep it; files of ours never hold pickles."""
    expected = run(model, made.inputs[0])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(run(again, made.inputs[0]), expected)
    assert repr(again.config.quantization_config).startswith("QuantDiTConfig('downstream'")


CHILD = """
import sys, torch, diffusers, quantdit
from safetensors.torch import load_file, save_file
folder, name, inputs, output = sys.argv[1:]
model = getattr(diffusers, name).from_pretrained(folder)
with torch.no_grad():
    save_file({"y": model(**load_file(inputs), return_dict=False)[0]}, output)
"""


def test_other_processes_load_the_folder_themselves(made, run, tmp_path: Path):
    """A worker is given a path, never an object; it imports quantdit and calls from_pretrained."""
    if made.name != "WanTransformer3DModel":
        pytest.skip("one class will do: a process takes seconds to begin")
    save_file(made.inputs[0], tmp_path / "inputs")
    arguments = [made.folder / "many", made.name, tmp_path / "inputs", tmp_path / "output"]
    done = subprocess.run([sys.executable, "-P", "-c", CHILD, *map(str, arguments)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "output")["y"], run(made.model, made.inputs[0]))
