"""The chain of blocks: what is handed on is found, replayed where it has to be, and refused where that would be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain as joined

import pytest
import torch
from torch import Tensor, nn

from quantdit.calibration.observe.block_order import (
    BlockLink,
    BlocksNotSequential,
    Outputs,
    first_call,
    last_prediction,
    next_call,
    observe,
    outputs_of,
    run_call,
)
from quantdit.calibration.observe.recorded_calls import Call, Key
from quantdit.models.prediction import prediction_of

WIDTH = 4


class Block(nn.Module):
    """Changes its first argument."""

    def __init__(self, factor: float = 1.5) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.factor = factor

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        return x + self.linear(x) * self.factor + (0 if temb is None else temb)


class Pair(Block):
    """Changes sample and text, and returns both; the text may be the first of the two, or None."""

    def __init__(self, text_first: bool = False, last: bool = False) -> None:
        super().__init__()
        self.text_first, self.last = text_first, last

    def forward(self, x: Tensor, text: Tensor, temb: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        x, text = super().forward(x, temb), None if self.last else text - self.linear(text)
        return (text, x) if self.text_first else (x, text)


class Toy(nn.Module):
    """Two lists of two blocks; what happens around them is given."""

    def __init__(self, way: Callable, first: tuple[nn.Module, ...] = (), second: tuple[nn.Module, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.ModuleList(first or (Block(), Block()))
        self.second = nn.ModuleList(second or (Block(), Block()))
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.way = way

    def forward(self, hidden_states: Tensor, text: Tensor | None = None, timestep: float = 1.0) -> Tensor:
        temb = torch.linspace(0, timestep, WIDTH)
        return self.proj(self.way(self, hidden_states, text, temb))


def paths(model: Toy) -> list[str]:
    return [f"{name}.{i}" for name in ("first", "second") for i in range(len(getattr(model, name)))]


def call(seed: int = 0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    x, text = torch.randn(2, 3, WIDTH, generator=generator), torch.randn(2, 5, WIDTH, generator=generator)
    return Call((x,), {"text": text, "timestep": 0.5 + seed}, 0)


# ---- what happens around the blocks, and which of them are fed by the one before


def straight(m: Toy, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    for block in joined(m.first, m.second):
        x = block(x, temb=temb)
    return x


def in_between(m: Toy, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    for block in m.first:
        x = block(x, temb)
    x = torch.cat([text, x], 1)
    for block in m.second:
        x = block(x, temb)
    return x[:, text.shape[1] :]


def interleaved(m: Toy, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    """As video transformers do: a block over places, one over times."""
    for here, there in zip(m.first, m.second, strict=True):
        x = there(here(x).transpose(0, 1)).transpose(0, 1)
    return x


def pairs(m: Toy, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    for block in m.first:
        x, text = block(x, text, temb)
    for block in m.second:
        x, text = block(x, text=text, temb=temb)
    return x


def text_first(m: Toy, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    for block in joined(m.first, m.second):
        text, x = block(x, text=text)
    return x + text.mean(1, keepdim=True)


def refined(m: Toy, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    """The first list works on the text, which each of the second list needs."""
    for block in m.first:
        text = block(text)
    text = text.mean(1, keepdim=True)
    for block in m.second:
        x = block(x, temb=text)
    return x


def refined_in_between(m: Toy, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    """As `refined`, and before each block something happens: a replay needs the end of the first list."""
    for block in m.first:
        text = block(text)
    for block in m.second:
        x = block(x.flip(1), temb=text.mean(1, keepdim=True) * 2)
    return x


def in_place_between(m: Toy, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    for block in joined(m.first, m.second):
        x = block(x, temb)
        x.mul_(2)
    return x


def in_place_condition(m: Toy, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    for block in joined(m.first, m.second):
        x = block(x, temb)
        temb.add_(1)
    return x


def other_keyword(m: Toy, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    """Arguments by other names from call to call."""
    for i, block in enumerate(joined(m.first, m.second)):
        x = block(x, temb) if i % 2 else block(x=x, temb=temb)
    return x


def skip_of_the_input(m: Toy, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    """What the blocks get from afar does not come out of a block."""
    origin = x
    for block in joined(m.first, m.second):
        x = block(x, temb) + origin
    return x


FED, REPLAYED = True, False
WAYS: dict[str, tuple[Callable, dict, list[bool]]] = {
    "straight": (straight, {}, [FED, FED, FED, FED]),
    "in between": (in_between, {}, [FED, FED, REPLAYED, FED]),
    "interleaved": (interleaved, {}, [FED, REPLAYED, REPLAYED, REPLAYED]),
    "pairs": (pairs, {"first": (Pair(), Pair()), "second": (Pair(), Pair(last=True))}, [FED, FED, REPLAYED, FED]),
    "text first": (text_first, {"first": (Pair(True), Pair(True)), "second": (Pair(True), Pair(True))}, [FED] * 4),
    "refined": (refined, {}, [FED, FED, REPLAYED, FED]),
    "refined in between": (refined_in_between, {}, [FED, FED, REPLAYED, REPLAYED]),
    "in place between": (in_place_between, {}, [FED, REPLAYED, REPLAYED, REPLAYED]),
    "condition in place": (in_place_condition, {}, [FED, REPLAYED, REPLAYED, REPLAYED]),
    "other keyword": (other_keyword, {}, [FED, REPLAYED, REPLAYED, REPLAYED]),
    "skip of the input": (skip_of_the_input, {}, [FED, REPLAYED, REPLAYED, REPLAYED]),
}


def real(model: Toy, made: Call) -> tuple[list[tuple[str, Call]], list[Outputs], Tensor]:
    """The blocks' calls in running order and what they return, by plain hooks; and the transformer's output."""
    calls: list[tuple[str, Call]] = []
    outputs: list[Outputs] = []

    def copied(value: object) -> object:
        return value.clone() if isinstance(value, Tensor) else value

    def before(path: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            calls.append((path, Call(tuple(map(copied, args)), {k: copied(v) for k, v in kwargs.items()}, 0)))

        return hook

    def after(module: nn.Module, args: tuple, output: object) -> None:
        outputs.append(tuple(map(copied, outputs_of(output))))

    handles = []
    for path in paths(model):
        handles.append(model.get_submodule(path).register_forward_pre_hook(before(path), with_kwargs=True))
        handles.append(model.get_submodule(path).register_forward_hook(after))
    output = run_call(model, made)
    for handle in handles:
        handle.remove()
    return calls, outputs, output


def equal(a: Call, b: Call) -> bool:
    def same(x: object, y: object) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y

    return (
        len(a.args) == len(b.args)
        and a.kwargs.keys() == b.kwargs.keys()
        and all(map(same, a.args, b.args))
        and all(same(a.kwargs[k], b.kwargs[k]) for k in a.kwargs)
    )


def state(model: Toy) -> tuple:
    """The modules under their names, and every hook."""
    hooks = [len(getattr(m, name)) for m in model.modules() for name in ("_forward_pre_hooks", "_forward_hooks")]
    return [(name, id(module)) for name, module in model.named_modules()], hooks


@pytest.mark.parametrize("way", WAYS)
def test_calls_walked_along_the_chain_are_the_real_ones(way: str):
    """Observed on one call, walked along another: each block's arguments and the transformer's output, to the bit."""
    body, blocks, fed = WAYS[way]
    model = Toy(body, **blocks)
    links = observe(model, paths(model), call(0))
    calls, outputs, output = real(model, call(1))
    assert [link.path for link in links] == [path for path, _ in calls]
    assert [link.fed is not None for link in links] == fed
    before = state(model)
    walked = first_call(model, links[0].path, call(1))
    assert equal(walked, calls[0][1])
    done: dict[int, Outputs] = {}
    for index, link in enumerate(links):
        done[index] = outputs_of(run_call(model.get_submodule(link.path), walked))
        assert all(torch.equal(a, b) for a, b in zip(done[index], outputs[index], strict=True) if b is not None)
        if index + 1 == len(links):
            break
        following = links[index + 1]
        if following.fed is None:
            needed = {number: done[number] for number in (*following.needs, index)}
            walked = next_call(model, links, index, call(1), needed)
        else:
            walked = walked.with_arguments({key: done[index][number] for key, number in following.fed})
        assert equal(walked, calls[index + 1][1]), following
    assert torch.equal(last_prediction(model, links, call(1), done[len(links) - 1]), output)
    assert state(model) == before


def test_no_block_runs_for_the_last_prediction_or_a_replay():
    model = Toy(in_between)
    links = observe(model, paths(model), call())
    _, outputs, _ = real(model, call())
    for block in joined(model.first, model.second):
        block.forward = lambda *a, **k: pytest.fail("a block was run")
    next_call(model, links, 1, call(), {1: outputs[1]})
    last_prediction(model, links, call(), outputs[-1])
    with pytest.raises(pytest.fail.Exception):
        run_call(model, call())


def test_what_a_replay_needs_of_earlier_lists():
    model = Toy(refined_in_between)
    links = observe(model, paths(model), call())
    assert [link.needs for link in links] == [(), (), (), (1,)]
    model = Toy(straight)
    assert all(link.needs == () for link in observe(model, paths(model), call()))


def test_order_is_that_of_the_run_not_of_the_paths():
    model = Toy(interleaved)
    links = observe(model, paths(model), call())
    assert [link.path for link in links] == ["first.0", "second.0", "first.1", "second.1"]


@pytest.mark.parametrize("way", WAYS)
def test_links_survive_json(way: str):
    body, blocks, _ = WAYS[way]
    model = Toy(body, **blocks)
    links = observe(model, paths(model), call())
    again = [BlockLink.from_dict(json.loads(json.dumps(link.to_dict()))) for link in links]
    assert again == links and hash(tuple(again)) == hash(tuple(links))


def test_outputs_and_the_arguments_they_update():
    model = Toy(pairs, *((Pair(), Pair()), (Pair(), Pair(last=True))))
    links = observe(model, paths(model), call())
    assert [link.passed for link in links] == [(0, 1), (0, 1), (0, "text"), (0, None)]
    assert [link.fed for link in links] == [(), ((0, 0), (1, 1)), None, ((0, 0), ("text", 1))]
    assert not any(link.single for link in links)
    model = Toy(straight)
    links = observe(model, paths(model), call())
    assert [link.passed for link in links] == [(0,)] * 4 and all(link.single for link in links)


# ---- what has no chain


def skip(m: Toy, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    early = x = m.first[0](x)
    x = m.second[0](m.first[1](x))
    return m.second[1](x, early)


def to_the_head(m: Toy, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    early = x = m.first[0](x)
    for block in (m.first[1], *m.second):
        x = block(x)
    return x + early


def twice(m: Toy, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    return m.first[0](straight(m, x, text, temb))


def never(m: Toy, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
    return m.second[1](m.first[1](m.first[0](x)))


class Strange(Block):
    def forward(self, x: Tensor, temb: Tensor) -> object:
        return {"x": x}


class Narrow(Block):
    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return x[:, :1]


class Shifting(Block):
    """Changes an argument in place that it does not return."""

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        x = super().forward(x, temb)
        temb.add_(1)
        return x


class Failing(Block):
    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        raise KeyError("broken model")


REFUSED = {
    "long skip": (skip, (), "second.1 needs more than what the blocks before it returned"),
    "skip to the head": (to_the_head, (), "output needs more than what its last block"),
    "twice": (twice, (), "first.0 runs more than once"),
    "never": (never, (), "second.0 never runs"),
    "no tensor": (straight, (Strange(), Block()), "returns dict"),
    "condition in place": (straight, (Shifting(), Block()), "first.1 needs more"),
}


@pytest.mark.parametrize("way", REFUSED)
def test_blocks_without_a_chain_say_why_and_leave_no_trace(way: str):
    body, first, message = REFUSED[way]
    model = Toy(body, first)
    before = state(model)
    with pytest.raises(BlocksNotSequential, match=message):
        observe(model, paths(model), call())
    assert state(model) == before


def test_block_may_return_what_none_of_its_arguments_has_the_shape_of():
    """T5's first block makes the bias of positions that the others get."""
    model = Toy(straight, (Narrow(), Block()))
    links = observe(model, paths(model), call())
    assert [link.passed for link in links[:2]] == [(None,), (0,)]


@pytest.mark.parametrize("interrupt", [KeyError, KeyboardInterrupt])
def test_nothing_is_left_behind_when_the_model_fails(interrupt: type[BaseException]):
    model = Toy(in_between)
    links = observe(model, paths(model), call())
    _, outputs, _ = real(model, call())
    before = state(model)

    def fail(*args: object) -> None:
        raise interrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "way", lambda m, x, *rest: fail(m.first[0](x)))
        for act in (
            lambda: observe(model, paths(model), call()),
            lambda: last_prediction(model, links, call(), outputs[-1]),
            lambda: first_call(model, "second.0", call()),
            lambda: next_call(model, links, 1, call(), {1: outputs[1]}),
        ):
            with pytest.raises((interrupt, BlocksNotSequential)):
                act()
            assert state(model) == before


def test_first_call_does_not_run_the_block_and_copies_nothing():
    model = Toy(straight, (Failing(), Block()))
    found = first_call(model, "first.0", call())
    assert torch.equal(found.args[0], call().args[0]) and found.kwargs.keys() == {"temb"}
    model = Toy(lambda m, x, *rest: x)
    with pytest.raises(BlocksNotSequential, match=r"block first\.0 never runs"):
        first_call(model, "first.0", call())


def test_a_block_may_return_its_own_input_changed_in_place():
    class InPlace(Block):
        def forward(self, x: Tensor, temb: Tensor) -> Tensor:
            return x.add_(self.linear(x) + temb)

    model = Toy(straight, (InPlace(), InPlace()), (InPlace(), InPlace()))
    made = call()
    links = observe(model, paths(model), Call((made.args[0] + 0,), made.kwargs, 0))
    assert [link.fed for link in links] == [(), ((0, 0),), ((0, 0),), ((0, 0),)]


def test_a_layer_outside_that_borrows_from_a_block_still_works():
    """DiT's last layer is modulated by an embedder of its first block."""
    model = Toy(lambda m, x, text, temb: straight(m, x, text, temb) * m.first[0].factor + m.first[0].linear.bias)
    links = observe(model, paths(model), call())
    _, outputs, output = real(model, call())
    assert torch.equal(last_prediction(model, links, call(), outputs[-1]), output)


@pytest.mark.parametrize("key", [0, "x"])
def test_argument_by_position_or_by_keyword(key: Key):
    def way(m: Toy, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        for block in joined(m.first, m.second):
            x = block(x, temb=temb) if key == 0 else block(temb=temb, x=x)
        return x

    model = Toy(way)
    links = observe(model, paths(model), call())
    assert all(link.fed == ((key, 0),) for link in links[1:]) and all(link.passed == (key,) for link in links)
    assert isinstance(prediction_of(run_call(model, call())), Tensor)
