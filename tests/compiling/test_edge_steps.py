"""Wider activations on the first and the last sampling steps: there the layers are those of the wider model, to the bit."""

from __future__ import annotations

import copy
import json
import re
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quantdit
import tiny_models
from quantdit import Recipe, Rule
from quantdit.calibration.observe.capture import transformer_calls
from quantdit.checkpoints.checkpoint import quant_layers, read_transformer
from quantdit.compiling import quantize_blocks
from quantdit.exporters.to_comfyui import express
from quantdit.exporters.to_onnx import graph_of
from quantdit.kernels.triton_ops import dispatch
from quantdit.models.adapter import adapter_for
from quantdit.models.prediction import prediction_of
from quantdit.models.synthetic import latent_of, moved_inputs, synthetic_inputs
from quantdit.tensors.layer_spec import ActivationSpec

EDGE = 2
TIMES = (1000, 900, 800, 500, 300, 200, 100)
STEPS = len(TIMES)
OUTSIDE = Rule("role:outside", "dense", optional=True)
# Weights that no data decides, so that models of different activations have the same.
FIXED = {"rotation": "hadamard", "method": "rtn", "bias_correction": False}
A4 = {"activation_bits": 4, "activation_format": "affine", "activation_group_size": 32}
A8 = {"activation_bits": 8}
WIDE = {"edge_activation_bits": 16, "edge_steps": EDGE}


def recipe_of(**fields: object) -> Recipe:
    return Recipe("edges", (OUTSIDE, Rule("*", "int8", **(FIXED | fields))))


@dataclass(frozen=True)
class Steps:
    """A quantized tiny model, the calls of a trajectory, and what it returned at each."""

    model: nn.Module
    calls: list[dict[str, object]]
    outputs: list[Tensor]


def run(model: nn.Module, call: dict[str, object]) -> Tensor:
    with torch.no_grad():
        return prediction_of(model(**call))


def moved(name: str, times: Sequence[float]) -> tuple[nn.Module, list[dict[str, object]]]:
    model, size = tiny_models.tiny(name)
    adapter = adapter_for(model)
    inputs = synthetic_inputs(model, adapter, size, torch.Generator().manual_seed(3))
    latent = latent_of(adapter, inputs)
    return model, [moved_inputs(model, adapter, inputs, latent, t) for t in times]


@cache
def steps(name: str = "WanTransformer3DModel", **fields: object) -> Steps:
    """Read only."""
    model, calls = moved(name, TIMES)
    quantdit.quantize(model, recipe_of(**fields), calls)
    return Steps(model, calls, [run(model, call) for call in calls])


def stated(model: nn.Module) -> dict:
    return model.hf_quantizer.quantization_config.state


def at_edge(i: int) -> bool:
    return not EDGE <= i < STEPS - EDGE


CASES = {
    "a8, a16": (A8, WIDE, {}),
    "a8 static, a16": (A8 | {"activation_scale": "static"}, WIDE, {}),
    "a4, a8": (A4, WIDE | {"edge_activation_bits": 8}, {"activation_bits": 8, "activation_format": "affine"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_edges_are_those_of_the_wider_model_and_the_rest_those_of_the_narrower(case: str):
    narrow, edges, wide = CASES[case]
    found, wider, narrower = steps(**narrow, **edges), steps(**wide), steps(**narrow)
    for i in range(STEPS):
        expected, other = (wider, narrower) if at_edge(i) else (narrower, wider)
        if case != "a8 static, a16" or at_edge(i):  # between, the buckets of its scales are others
            assert torch.equal(found.outputs[i], expected.outputs[i]), i
        assert not torch.equal(found.outputs[i], other.outputs[i]), i


def test_times_may_rise_and_have_any_unit():
    name = "MochiTransformer3DModel"
    found, wider, narrower = steps(name, **A8, **WIDE), steps(name), steps(name, **A8)
    for i in range(STEPS):
        assert torch.equal(found.outputs[i], (wider if at_edge(i) else narrower).outputs[i]), i


def test_the_noise_tells_and_not_the_number_of_calls():
    """Half-way between two sampled steps; any number of steps, in any order."""
    model = steps(**A8, **WIDE).model
    edges = model.timestep_edges
    assert (edges[0], edges[-2]) == (850.0, 250.0) and list(edges) == sorted(edges, reverse=True)
    _, calls = moved("WanTransformer3DModel", times := [100, 851, 849, 251, 400, 249, 1000, 0])
    for time, call in zip(times, calls, strict=True):
        run(model, call)
        bits = {layer.activation.bits for layer in quant_layers(model).values()}
        assert bits == {16 if time > 850 or time < 250 else 8}, time


def test_saved_and_loaded_it_is_the_same(tmp_path: Path):
    made = steps(**A4, **WIDE)
    made.model.save_pretrained(tmp_path)
    for loaded in (quantdit.load(tmp_path), type(made.model).from_pretrained(tmp_path)):
        assert loaded.timestep_edges == made.model.timestep_edges
        specs = [{n: m.layer_spec for n, m in quant_layers(of).items()} for of in (loaded, made.model)]
        assert specs[0] == specs[1]
        assert all(torch.equal(run(loaded, call), out) for call, out in zip(made.calls, made.outputs, strict=True))


def test_copies_have_steps_of_their_own():
    made = steps(**A8, **WIDE)
    twin = copy.deepcopy(made.model)
    layers = [next(iter(quant_layers(of).values())) for of in (made.model, twin)]
    run(made.model, made.calls[0])
    assert torch.equal(run(twin, made.calls[3]), made.outputs[3])
    assert [layer.activation.bits for layer in layers] == [16, 8]


def test_threads_have_steps_of_their_own():
    made = steps(**A8, **WIDE)
    wrong: list[int] = []

    def sample(order: list[int]) -> None:
        for i in order:
            if not torch.equal(run(made.model, made.calls[i]), made.outputs[i]):
                wrong.append(i)

    threads = [threading.Thread(target=sample, args=(order,)) for order in ([0, 3, 6] * 4, [3, 0, 4] * 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_compiled_block_has_two_graphs_and_no_break():
    """One for the edges, one for what lies between, however many buckets there are."""
    made = steps(**A8, **WIDE)
    model = copy.deepcopy(made.model)
    torch.compiler.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list) -> object:
        graphs.append(graph)
        return graph.forward

    block = model.blocks[0]
    block.compile(fullgraph=True, backend=backend)
    for call, expected in zip(made.calls, made.outputs, strict=True):
        torch.testing.assert_close(run(model, call), expected, atol=1e-4, rtol=1e-4)
    assert len(graphs) == 2
    torch.compiler.reset()


@pytest.mark.parametrize("call", [0, 3])
def test_the_gradient_is_that_of_the_dequantized_layer_at_every_step(call: int):
    made = steps(**A8, **WIDE)
    run(made.model, made.calls[call])
    for layer in quant_layers(made.model).values():
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        y.sum().backward()
        torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, -1), atol=1e-4, rtol=1e-3)
        assert torch.equal(y, layer(x.detach()))


def test_the_way_of_a_gpu_follows_the_steps(monkeypatch: pytest.MonkeyPatch):
    """The same table of ways, run by the definitions of the ops."""
    made = steps(**A4, **WIDE)
    layer = next(iter(quant_layers(made.model).values()))
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(1))
    expected = []
    for bucket in (0, 4, 9):
        layer.bucket = bucket
        expected.append(layer(x))
    monkeypatch.setattr(dispatch, "on_gpu", lambda tokens: True)
    monkeypatch.setattr(dispatch, "capability_of", lambda device: 90)
    for bucket, y in zip((0, 4, 9), expected, strict=True):
        layer.bucket = bucket
        torch.testing.assert_close(layer(x), y, atol=1e-4, rtol=1e-4)
    assert not torch.equal(expected[0], expected[1]) and torch.equal(expected[0], expected[2])


def test_reports_measure_each_row_with_the_bits_of_its_step():
    found, wider, narrower = (stated(steps(**fields).model)["provenance"]["layers"] for fields in (A4 | WIDE, {}, A4))
    for name, entry in found.items():
        assert wider[name]["rel_rmse"] < entry["rel_rmse"] < narrower[name]["rel_rmse"], name


def test_without_edges_the_file_says_nothing_of_them():
    state = stated(steps(**A8).model)
    assert all(of["activation"].keys() == {"bits", "format", "group_size", "buckets"} for of in state["layers"].values())
    assert not any("edge" in key for rule in state["recipe"]["rule"] for key in rule)
    assert state["timestep_edges"] == []


# ---- what is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"edge_steps": 3, **A8}, "edge_steps = 3 needs edge_activation_bits, such as 16"),
        ({"edge_activation_bits": 16, **A8}, "edge_activation_bits = 16 needs edge_steps, such as 3"),
        ({"edge_activation_bits": 8, "edge_steps": 1, **A8}, "not wider than the 8 bits between them; wider: 16"),
        ({"edge_activation_bits": 4, "edge_steps": 1, **A8}, "not wider"),
        ({"edge_activation_bits": 16, "edge_steps": 1}, "wider: none"),
        ({"edge_activation_bits": 12, "edge_steps": 1, **A8}, "edge_activation_bits = 12 is unknown"),
        ({"edge_activation_bits": 16, "edge_steps": -1, **A8}, "edge_steps = -1 must be a whole number"),
        ({"edge_activation_bits": 16, "edge_steps": 1.0, **A8}, "edge_steps = 1.0 must be a whole number"),
        ({"edge_activation_bits": 8, "edge_steps": 1, "activation_bits": 4, "activation_scale": "static"}, "stay 16 bits"),
    ],
)
def test_a_rule_that_makes_no_sense(fields: dict, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        Rule("*", "int8", **fields)


def test_all_rules_have_edges_of_one_length():
    rules = [Rule(match, "int8", **A8, edge_activation_bits=16, edge_steps=n) for match, n in (("a*", 1), ("b*", 2))]
    with pytest.raises(ValueError, match="edge_steps = 1 of rule 'a\\*' and 2 of rule 'b\\*'"):
        Recipe("two", tuple(rules))
    assert Recipe("one", (rules[0], Rule("*", "int8"))).edge_steps == 1


def test_too_few_steps():
    model, calls = moved("WanTransformer3DModel", TIMES[:4])
    with pytest.raises(ValueError, match=r"edge_steps = 2 needs at least 5 sampling steps.*got 4"):
        quantdit.quantize(model, recipe_of(**A8, **WIDE), calls)
    assert not quant_layers(model)


def test_without_inputs_no_times_are_known():
    model, _ = moved("WanTransformer3DModel", [])
    with pytest.raises(ValueError, match=r"edge_steps = 2 needs calibration data; give quantdit.quantize some inputs="):
        quantdit.quantize(model, recipe_of(**A8, **WIDE))


def test_a_graph_for_onnx():
    pytest.importorskip("onnx_ir")
    made = steps(**A8, **WIDE)
    with pytest.raises(ValueError, match=r"a8, edges a16.*calibrate with edge_steps = 0, or export --to dense"):
        graph_of(made.model, made.calls[0])


def test_comfyui_has_no_such_format():
    name, layer = next(iter(quant_layers(steps(**A8, **WIDE).model).items()))
    with pytest.raises(ValueError, match=r"activations a8, edges a16, which .* calibrate with edge_steps = 0"):
        express(name, layer)


@pytest.mark.parametrize(
    "content", [{"bits": 8, "last_bucket": 2}, {"bits": 8, "edge_bits": 16}, {"bits": 8, "edge_bits": 8, "last_bucket": 2}]
)
def test_specs_that_are_not_possible(content: dict):
    with pytest.raises(ValueError, match=r"edges|last_bucket"):
        ActivationSpec(**content)


# ---- the command line

TOML = """
[[rule]]
match = "*.attn1.*"
weight = "int8"
activation_bits = 8
edge_activation_bits = 16
edge_steps = 1
rotation = "none"
[[rule]]
match = "*"
weight = "dense"
"""


@pytest.fixture
def calibrate(cli, pixel_dit: Path, tmp_path: Path):
    (tmp_path / "r.toml").write_text(TOML)

    def go(*more: object):
        given = ("--model", pixel_dit, "--recipe", tmp_path / "r.toml", "--output", tmp_path / "out", "--samples", 1)
        return cli("calibrate", *given, *more)

    return go


def levels(folder: Path) -> tuple[float, float]:
    edges = read_transformer(folder / "transformer").timestep_edges
    return edges[0], edges[-2]


def test_calibrated_with_data_or_without_the_levels_are_the_same(calibrate, cli, tmp_path: Path):
    """Without data the times are those of the pipeline's scheduler."""
    assert calibrate("--steps", 4).code == 0
    found = levels(tmp_path / "out")
    ran = cli("inspect", tmp_path / "out")
    assert "a8, edges a16" in ran.out
    assert f"down to {found[0]:g}, and from beyond {found[1]:g}" not in ran.out  # wrapped, so by its parts
    assert f"{found[0]:g}" in ran.out and f"{found[1]:g}" in ran.out
    assert json.loads(cli("inspect", tmp_path / "out", "--json").out)["edges"] == {"transformer": list(found)}
    assert calibrate("--steps", 4, "--samples", 0, "--overwrite").code == 0
    assert levels(tmp_path / "out") == pytest.approx(found, rel=1e-5)


def test_kept_timesteps_do_not_move_the_levels(calibrate, tmp_path: Path):
    assert calibrate("--steps", 7).code == 0
    found = levels(tmp_path / "out")
    for more in (("--timesteps", 3), ("--timesteps", 3, "--timestep-choice", "salience")):
        assert calibrate("--steps", 7, "--overwrite", *more).code == 0
        assert levels(tmp_path / "out") == found


def test_killed_and_resumed_the_levels_are_the_same(calibrate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert calibrate("--steps", 4).code == 0
    config = tmp_path / "out" / "transformer" / "config.json"
    whole = config.read_bytes()
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(quantize_blocks, "quantize", lambda *args: (_ for _ in ()).throw(OSError("killed")))
        assert calibrate("--steps", 4).code == 1
    monkeypatch.setattr("quantdit.compiling.compile.sample", lambda *args: pytest.fail("sampled again"))
    assert calibrate("--steps", 4, "--resume").code == 0
    assert config.read_bytes() == whole


@pytest.mark.parametrize("samples", [0, 1])
def test_too_few_steps_are_refused_before_anything_is_sampled(calibrate, tmp_path: Path, samples: int):
    ran = calibrate("--steps", 2, "--samples", samples)
    assert ran.code == 1 and "edge_steps = 1 needs at least 3 sampling steps" in ran.error
    assert not (tmp_path / "out").exists()


def test_a_config_of_another_last_bucket_is_refused(calibrate, cli, tmp_path: Path):
    assert calibrate("--steps", 4).code == 0
    path = tmp_path / "out" / "transformer" / "config.json"
    content = json.loads(path.read_text())
    for layer in content["quantization_config"]["layers"].values():
        layer["activation"]["last_bucket"] = 5
    path.write_text(json.dumps(content))
    ran = cli("inspect", tmp_path / "out")
    assert ran.code == 1 and "timestep bucket 5 as its last, but there are 10 timestep_edges" in ran.error


# ---- two transformers of one trajectory


class Named(nn.Module):
    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return hidden_states


def test_transformers_that_share_a_trajectory_have_its_edges_and_not_their_own(tmp_path: Path):
    noisy, clean = Named(), Named()

    def sample() -> None:
        for t in (900, 800, 700, 600, 500, 400, 300, 200):
            (noisy if t > 550 else clean)(torch.zeros(1, 2), timestep=torch.tensor(t))

    found = transformer_calls(sample, {"noisy": noisy, "clean": clean}, 8, 10, tmp_path, edge_steps=2)
    buckets = {name: [call.bucket for call in calls] for name, calls in found.items()}
    assert buckets == {"noisy": [0, 0, 1, 3], "clean": [5, 7, 9, 9]}
    assert found["noisy"].levels == found["clean"].levels == ((750.0, 0), (350.0, 8))
