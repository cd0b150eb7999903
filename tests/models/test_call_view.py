"""Which argument is the sample and which the time: every class of diffusers that quantdit knows, by keyword and by position."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor, nn

import quantdit
import tiny_models
from quantdit import Recipe, Rule
from quantdit.checkpoints.checkpoint import quant_layers
from quantdit.models.adapter import ADAPTERS, adapter_for
from quantdit.models.call_view import CallView, time_argument, times_rise, view
from quantdit.models.synthetic import TRAIN_STEPS, latent_of, moved_inputs, synthetic_inputs
from quantdit.tensors.timesteps import bucket_of, edges_of, rising

STEPS = 10
RISING = {"Lumina2Transformer2DModel", "MochiTransformer3DModel", "ZImageTransformer2DModel"}
STATIC = Recipe(
    "static",
    (
        Rule("role:outside", "dense", optional=True),
        Rule("*", "int8", activation_bits=8, activation_scale="static", rotation="none", method="rtn"),
    ),
)
HIDREAM = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "caption_channels": [32, 16],
    "text_emb_dim": 16,
    "num_routed_experts": 2,
    "num_activated_experts": 2,
    "axes_dims_rope": (16, 8, 8),
    "max_resolution": (32, 32),
    "llama_layers": (0, 1),
}


def calls_of(name: str) -> tuple[nn.Module, list[dict[str, object]]]:
    """A tiny model, and its calls in the order of sampling, from noise."""
    times = [TRAIN_STEPS * (1 - i / STEPS) for i in range(STEPS)]
    generator = torch.Generator().manual_seed(3)
    if name == "HiDreamImageTransformer2DModel":  # nobody described it
        torch.manual_seed(0)
        model = diffusers.HiDreamImageTransformer2DModel(**HIDREAM).eval()
        rest = {
            "encoder_hidden_states_t5": torch.randn(1, 6, 32, generator=generator),
            "encoder_hidden_states_llama3": torch.randn(2, 1, 6, 16, generator=generator),
            "pooled_embeds": torch.randn(1, 16, generator=generator),
        }
        x = torch.randn(1, 4, 8, 8, generator=generator)
        return model, [{"hidden_states": x * (1 + i), "timesteps": torch.tensor([t])} | rest for i, t in enumerate(times)]
    model, size = tiny_models.tiny(name)
    adapter = adapter_for(model)
    inputs = synthetic_inputs(model, adapter, size, generator)
    latent = latent_of(adapter, inputs)
    # The sample grows, so that each step has a scale of its own.
    return model, [moved_inputs(model, adapter, inputs, latent * (1 + i), t) for i, t in enumerate(times)]


def by_position(model: nn.Module, call: dict[str, object]) -> tuple[tuple, dict]:
    """The call with as many arguments by position as there are without a gap."""
    args, rest = [], dict(call)
    for name in list(inspect.signature(type(model).forward).parameters)[1:]:
        if name not in rest:
            break
        args.append(rest.pop(name))
    return tuple(args), rest


@pytest.fixture(params=[*tiny_models.TINY, *tiny_models.UNKNOWN, "HiDreamImageTransformer2DModel"])
def static(request: pytest.FixtureRequest) -> Iterator[tuple[str, nn.Module, list[dict[str, object]]]]:
    """A model with static scales, calibrated on its calls: its class, itself, the calls."""
    model, calls = calls_of(request.param)
    quantdit.quantize(model, STATIC, calls)
    yield request.param, model, calls


def test_bucket_i_at_step_i_by_keyword_and_by_position(static, tmp_path: Path):
    name, model, calls = static
    assert all(abs(edge) <= TRAIN_STEPS for edge in model.timestep_edges)
    assert (model.timestep_edges[0] < model.timestep_edges[-1]) == (name in RISING)
    layer = next(iter(quant_layers(model).values()))
    used = {"keyword": [], "position": []}
    with torch.no_grad():
        for call in calls:
            model(**call)
            used["keyword"].append(layer.bucket)
            layer.bucket = -1
            args, kwargs = by_position(model, call)
            assert len(args) > 1 or name in ("LTXVideoTransformer3DModel",), "nothing but the sample goes by position"
            model(*args, **kwargs)
            used["position"].append(layer.bucket)
    assert used == {"keyword": list(range(STEPS)), "position": list(range(STEPS))}
    model.save_pretrained(tmp_path / "saved")
    assert quantdit.load(tmp_path / "saved").timestep_edges == model.timestep_edges


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_call_of_every_known_class_is_understood(name: str):
    model, calls = calls_of(name)
    adapter = adapter_for(model)
    seen = view(model, (), calls[3])
    assert torch.equal(seen.latent, latent_of(adapter, calls[3])) and seen.batch == len(seen.latent)
    assert times_rise(model) == (name in RISING)
    assert seen.time == pytest.approx(float(torch.as_tensor(calls[3][time_argument(model)]).max()))
    args, kwargs = by_position(model, calls[3])
    again = view(model, args, kwargs)
    assert again.time == seen.time and torch.equal(again.latent, seen.latent)


class Timed(nn.Module):
    """A class that nobody described."""

    def forward(self, latents: Tensor, text: Tensor | None = None, vision_timesteps: object = None) -> Tensor:
        return latents


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.tensor([3.0, 7.0]), 7.0),
        ([torch.tensor(3.0), torch.tensor([7.0])], 7.0),
        (7, 7.0),
        (None, None),
        (True, None),
        (torch.empty(0), None),
    ],
)
def test_a_time_may_be_given_in_many_ways(given: object, expected: float | None):
    x = torch.ones(2, 3)
    for args, kwargs in (((x, None, given), {}), ((x,), {"vision_timesteps": given})):
        found = view(Timed(), args, kwargs)
        assert found.time == expected and torch.equal(found.latent, x) and found.batch == 2


def test_a_call_that_forward_does_not_take_says_nothing():
    assert view(Timed(), (), {"unknown": 1}) == CallView()
    assert view(Timed(), ([torch.ones(2), torch.ones(3)],), {}).latent is None


class Scaled(nn.Module):
    """Its first argument is no sample."""

    def forward(self, scale: Tensor, x0: Tensor) -> Tensor:
        return scale * x0


class AnyArguments(nn.Module):
    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return args[0]


class Rest(nn.Module):
    def forward(self, *ignored: Tensor, timestep: object = None, **more: Tensor) -> None:
        pass


WAN = type("WanTransformer3DModel", (Rest,), {"forward": lambda self, **more: None})


def test_a_number_and_arguments_without_names_are_no_sample():
    x = torch.ones(2, 3)
    assert view(Scaled(), (torch.tensor(2.0), x), {}) == CallView()
    assert view(AnyArguments(), (x, x), {}) == CallView()
    assert view(Rest(), (x, x), {"timestep": 4, "other": x}) == CallView(time=4.0)
    found = view(WAN(), (), {"hidden_states": x, "timestep": 4})  # whatever the rest of the keywords is called
    assert found.latent is x and found.time == 4.0


@pytest.mark.parametrize("sign", [1, -1])
def test_edges_are_finite_and_find_the_bucket_again(sign: int):
    """Empty buckets in the middle, at the end and, as a choice of timesteps leaves them, at the beginning."""
    times = [(sign * t, bucket) for t, bucket in ((900.0, 2), (800.0, 2), (500.0, 4), (100.0, 5))]
    edges = edges_of(times, 8)
    assert len(edges) == 8 and all(abs(edge) < 1e3 for edge in edges)
    assert edges[2:] == tuple(sign * e for e in (800.0, 800.0, 500.0, 100.0, 100.0, 100.0))
    assert [bucket_of(time, edges) for time, _ in times] == [0, 0, 4, 5]  # 0 and 1 have the scale of 2, the nearest
    assert edges_of([], 3) == (0.0, 0.0, 0.0) and bucket_of(None, edges) == 7
    assert not rising([900, 500, 100, 900, 500, 100]) and rising([0, 0.5, 0.9, 0, 0.5, 0.9])


@pytest.mark.parametrize("compiled", [False, True])
def test_threads_that_share_a_model_have_their_own_bucket(compiled: bool):
    model, calls = calls_of("WanTransformer3DModel")
    quantdit.quantize(model, STATIC, calls)
    calls = calls[::4]  # compiled once for each
    run = torch.compile(model, backend="eager") if compiled else model
    with torch.no_grad():
        wanted = [run(**call, return_dict=False)[0] for call in calls]
    wrong: list[int] = []

    def sample(order: list[int]) -> None:
        with torch.no_grad():
            for i in order:
                if not torch.equal(run(**calls[i], return_dict=False)[0], wanted[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=sample, args=([*range(start, 3), *range(start)] * 8,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
