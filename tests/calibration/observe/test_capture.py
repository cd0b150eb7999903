"""Capture: which calls are recorded, in which bucket, how they walk from block to block, and what each linear has seen."""

from __future__ import annotations

import math
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantdit.calibration import stats
from quantdit.calibration.observe.capture import collecting, transformer_calls
from quantdit.calibration.observe.recorded_calls import StoredCalls
from quantdit.calibration.stats import Stats

WIDTH = 8


class Block(nn.Module):
    """Attention-like: q, k and v of one tensor, an output of another, a modulation of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.modulation = nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        self.calls += 1
        x = hidden_states * self.modulation(temb)[:, None]
        return hidden_states + self.to_out(self.to_q(x) + self.to_k(x) * self.to_v(x))


class Transformer(nn.Module):
    """Two blocks behind an input layer; the timestep by keyword or by position, as pipelines differ."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj_in = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, hidden_states: Tensor, timestep: Tensor | float | None = None, scale: dict | None = None) -> Tensor:
        t = torch.as_tensor(0.0 if timestep is None else timestep, dtype=torch.float32)
        temb = torch.cos(t.reshape(-1)[:1, None] * torch.arange(WIDTH) / 100).expand(len(hidden_states), WIDTH)
        x = self.proj_in(hidden_states)
        for block in self.blocks:
            x = block(x, temb=temb)
        return x


def integers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def sample(transformer: nn.Module, timesteps: list, guidance: bool = True, keyword: bool = True, batches: int = 1):
    """What a pipeline does: all timesteps for each batch, with guidance in two calls each."""

    def run() -> None:
        for _ in range(batches):
            for t in timesteps:
                for _ in range(2 if guidance else 1):
                    x = integers(2, 3, WIDTH)
                    transformer(x, timestep=t) if keyword else transformer(x, t)

    return run


@pytest.fixture
def record(tmp_path: Path):
    """Record the calls of one transformer, each time into a folder of its own."""
    folders = count()

    def go(run, transformer: nn.Module, steps: int, buckets: int, **options) -> StoredCalls:
        folder = tmp_path / str(next(folders))
        return transformer_calls(run, {"transformer": transformer}, steps, buckets, folder, **options)["transformer"]

    return go


def buckets(calls: StoredCalls) -> list[int]:
    return [call.bucket for call in calls]


@pytest.mark.parametrize("keyword", [True, False])
@pytest.mark.parametrize("kind", [float, int, torch.tensor, lambda t: torch.tensor([t, t]), lambda t: torch.full((2, 3), t)])
def test_calls_of_a_step_share_a_bucket(record, kind, keyword: bool):
    """Four steps, two calls each, in two buckets, the noisiest first; the second batch goes through the same buckets."""
    transformer = Transformer()
    timesteps = [kind(t) for t in (900, 600, 300, 0)]
    calls = record(sample(transformer, timesteps, keyword=keyword, batches=2), transformer, steps=4, buckets=2)
    assert buckets(calls) == [0, 0, 0, 0, 1, 1, 1, 1] * 2


@pytest.mark.parametrize(
    ("count", "steps", "number", "expected"),
    [
        (4, 4, 4, [0, 1, 2, 3]),
        (5, 5, 2, [0, 0, 0, 1, 1]),
        (4, 4, 10, [0, 2, 5, 7]),
        (4, 4, 1, [0, 0, 0, 0]),
        (1, 1, 5, [0]),
        (7, 4, 2, [0, 0, 0, 0, 1, 1, 1]),  # a solver that calls at more timesteps than it has steps
        (3, 6, 2, [0, 0, 0]),  # one that was stopped halfway
    ],
)
def test_buckets_are_of_equal_length(record, count: int, steps: int, number: int, expected: list[int]):
    transformer = Transformer()
    run = sample(transformer, [1000.0 - 100 * i for i in range(count)], guidance=False)
    assert buckets(record(run, transformer, steps, number)) == expected


def test_calls_without_a_time_share_a_bucket(record):
    """Nothing will tell them apart when the model is used."""
    transformer = Transformer()

    def run() -> None:
        for i in range(4):
            transformer(integers(2, 3, WIDTH, seed=i))

    assert buckets(record(run, transformer, steps=4, buckets=2)) == [0, 0, 0, 0]


@pytest.mark.parametrize("batches", [1, 2])
def test_times_of_a_class_that_nobody_described_may_rise(record, batches: int):
    transformer = Transformer()
    calls = record(sample(transformer, [0.0, 0.3, 0.6, 0.9], guidance=False, batches=batches), transformer, 4, 4)
    assert buckets(calls) == [0, 1, 2, 3] * batches


def test_recorded_arguments_are_copies_at_the_time_of_the_call(record):
    transformer = Transformer()
    x = integers(2, 3, WIDTH)
    scale = {"a": [torch.ones(2), 3], "b": (None, "text")}

    def run() -> None:
        for t in (1.0, 0.0):
            transformer(x, timestep=t, scale=scale)
            x.add_(1)
            scale["a"][0].zero_()

    first, second = record(run, transformer, steps=2, buckets=2)
    assert torch.equal(first.args[0], integers(2, 3, WIDTH))
    assert torch.equal(second.args[0], integers(2, 3, WIDTH) + 1)
    recorded = first.kwargs["scale"]
    assert torch.equal(recorded["a"][0], torch.ones(2))
    assert (recorded["a"][1], recorded["b"]) == (3, (None, "text"))
    assert first.kwargs["timestep"] == 1.0


def test_recording_needs_no_gradients_and_leaves_no_hook(record):
    transformer = Transformer()
    x = integers(2, 3, WIDTH).requires_grad_()
    seen = []

    def run() -> None:
        seen.append(transformer(x, timestep=1.0))

    (call,) = record(run, transformer, steps=1, buckets=1)
    assert not seen[0].requires_grad
    assert not call.args[0].requires_grad
    assert not transformer._forward_pre_hooks

    def broken() -> None:
        transformer(x, timestep=1.0)
        raise KeyError("pipeline")

    with pytest.raises(KeyError, match="pipeline"):
        record(broken, transformer, steps=1, buckets=1)
    assert not transformer._forward_pre_hooks


def test_a_pipeline_that_never_calls_its_transformer(record):
    with pytest.raises(ValueError, match="never called its transformer"):
        record(lambda: None, Transformer(), steps=1, buckets=1)


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def test_layers_of_one_input_share_their_stats():
    block, result = Block(), {}
    with collecting(linears(block), 2, result) as set_bucket, torch.no_grad():
        for bucket in (0, 1):
            set_bucket(bucket)
            block(integers(2, 3, WIDTH, seed=bucket), integers(2, WIDTH, seed=5))
    assert result.keys() == linears(block).keys()
    assert result["to_q"] is result["to_k"]
    assert result["to_q"] is result["to_v"]
    assert len({id(s) for s in result.values()}) == 3
    assert result["to_q"].count == 12  # each token once, not three times
    assert result["modulation"].count == 4


def test_stats_are_those_of_the_inputs():
    """Each linear's Stats equal an update with the tensors it was called with; those of to_k, called in between, too."""
    layers = {name: nn.Linear(WIDTH, 2) for name in ("to_q", "other", "to_k")}
    expected, result = {}, {}
    with collecting(layers, 2, result) as set_bucket, torch.no_grad():
        for bucket in (1, 0, 1):
            x, y = integers(2, 3, WIDTH, seed=bucket), integers(4, WIDTH, seed=bucket + 9)
            set_bucket(bucket)
            for name, value in (("to_q", x), ("other", y), ("to_k", x)):
                layers[name](value)
                before = expected.get(name, stats.init(WIDTH, 2))
                expected[name] = stats.update(before, value, bucket)
    for name in layers:
        assert isinstance(result[name], Stats)
        assert result[name].count == expected[name].count
        for field in ("gram", "absmax", "rows"):
            assert torch.equal(getattr(result[name], field), getattr(expected[name], field)), (name, field)


def test_equal_values_in_two_tensors_are_two_inputs():
    layers, result = {"a": nn.Linear(WIDTH, 2), "b": nn.Linear(WIDTH, 2)}, {}
    x = integers(3, WIDTH)
    with collecting(layers, 1, result), torch.no_grad():
        layers["a"](x)
        layers["b"](x.clone())
    assert result["a"] is not result["b"]
    assert torch.equal(result["a"].gram, result["b"].gram)


def test_nothing_is_collected_afterwards_or_of_what_was_not_called():
    block, result = Block(), {}
    layers = {**linears(block), "unused": nn.Linear(WIDTH, 2)}
    with collecting(layers, 1, result), torch.no_grad():
        block(integers(2, 3, WIDTH), integers(2, WIDTH))
    count = result["to_out"].count
    block(integers(2, 3, WIDTH), integers(2, WIDTH))
    assert result["to_out"].count == count
    assert "unused" not in result
    assert not any(layer._forward_pre_hooks for layer in layers.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["to_q", "to_out", "modulation"])
def test_an_activation_that_is_not_finite_names_the_layer(name: str, bad: float):
    """Where it shows first; and no hook stays behind."""
    block = Block()
    x, temb = integers(2, 3, WIDTH), integers(2, WIDTH)
    with torch.no_grad():
        if name == "modulation":
            temb[1, 2] = bad
        elif name == "to_q":
            x[0, 1, 2] = bad
        else:
            block.to_v.bias[3] = bad
    with pytest.raises(ValueError, match=f"layer {name}: .*NaN or infinite"), collecting(linears(block), 1, {}), torch.no_grad():
        block(x, temb)
    assert not any(layer._forward_pre_hooks for layer in linears(block).values())
