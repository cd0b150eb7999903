"""The chain of a transformer's blocks, found by watching one call: in which order they run, and what one hands to the next.

Most transformers hand the tensors a block returns straight to the next block (`fed`). Between Flux's two lists, or where a video
transformer folds its frames, something happens in between; then the transformer is run again with its finished blocks standing
in for themselves: the last of them returns what was recorded, those before it hand on their inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from quantdit.calibration.observe.recorded_calls import Call, Key
from quantdit.models.prediction import predicting, prediction_of

Outputs = tuple[Tensor | None, ...]


class BlocksNotSequential(ValueError):
    """Blocks that cannot be run one after the other; says why."""


class Enough(Exception):
    """Ends a forward pass once what was asked for is known."""


# What a transformer may raise whose blocks are stood in for.
_FAILURES = (AttributeError, TypeError, IndexError, KeyError, RuntimeError)


@dataclass(frozen=True)
class BlockLink:
    """One block.

    Attributes:
        path: of the module.
        fed: (argument, number of the output of the block before that it is); all other arguments are those of the block before.
            None: only a replay tells the arguments. Empty for the first block.
        passed: for each of its outputs the argument of the same shape, or None where there is none.
        single: it returns one tensor, not a tuple.
        needs: numbers of earlier blocks whose outputs a replay of its arguments needs, besides those of the block before.
    """

    path: str
    fed: tuple[tuple[Key, int], ...] | None
    passed: tuple[Key | None, ...]
    single: bool
    needs: tuple[int, ...] = ()

    def to_dict(self) -> dict:
        """Return it as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict) -> BlockLink:
        """Return what `to_dict` gave."""
        fed = None if content["fed"] is None else tuple((key, number) for key, number in content["fed"])
        return cls(content["path"], fed, tuple(content["passed"]), content["single"], tuple(content["needs"]))


@dataclass(frozen=True)
class _Arrival:
    """A block that is about to run: its arguments, their versions (see `_Ran`), and where they come from (see `BlockLink`)."""

    call: Call
    began: dict[Key, tuple[int, ...]]
    fed: tuple[tuple[Key, int], ...] | None
    needs: tuple[int, ...]


@dataclass(frozen=True)
class _Ran:
    """A block that has just run.

    Attributes:
        call: its arguments.
        began: the versions of each argument's tensors when it began.
        outputs: what it returned.
        versions: of the outputs' tensors when it ended.
        copies: of the outputs, since what comes behind may change them in place.
    """

    call: Call
    began: dict[Key, tuple[int, ...]]
    outputs: Outputs
    versions: tuple[int, ...]
    copies: Outputs


def outputs_of(output: object) -> Outputs:
    """Return what a block returned as a tuple.

    Raises:
        BlocksNotSequential: something else than a tensor or a tuple of tensors.
    """
    outputs = output if isinstance(output, tuple) else (output,)
    if not all(v is None or isinstance(v, Tensor) for v in outputs):
        raise BlocksNotSequential(f"a block returns {type(output).__name__}, expected tensors")
    return cast(Outputs, outputs)


@contextmanager
def outputs_at(transformer: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Outputs]]:
    """Have what the modules at these paths return, by path, while the body runs."""
    found: dict[str, Outputs] = {}

    def hook(path: str):
        def keep(module: nn.Module, args: tuple, output: object) -> None:
            found[path] = outputs_of(output)

        return keep

    handles = [transformer.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def observe(transformer: nn.Module, paths: Sequence[str], call: Call) -> list[BlockLink]:
    """Return the chain of the blocks at `paths`, in running order, by making one call of the transformer.

    Raises:
        BlocksNotSequential: a block that never runs or runs twice, or arguments, or an output of the transformer, that cannot be
            had from the block before alone.
    """
    observer = _Observer(transformer, call)
    handles = []
    try:
        for path in paths:
            block = transformer.get_submodule(path)
            handles.append(block.register_forward_pre_hook(partial(observer.before, path), with_kwargs=True))
            handles.append(block.register_forward_hook(partial(observer.after, path), with_kwargs=True))
        found = predict(transformer, call)
    finally:
        for handle in handles:
            handle.remove()
    links, latest = observer.links, observer.latest
    if missing := set(paths) - {link.path for link in links}:
        raise BlocksNotSequential(f"block {min(missing)} never runs")
    assert latest is not None  # there is a block, and all have run
    try:
        again = last_prediction(transformer, links, call, latest.copies)
    except _FAILURES as error:
        raise BlocksNotSequential(
            f"the way from the last block to the output cannot be run without the blocks ({error})"
        ) from error
    if found is None or again is None or not _equal_tensors(again, found):
        raise BlocksNotSequential("the output needs more than what its last block returned (a long skip connection?)")
    return links


class _Observer:
    """Hooks of blocks that find out, while a call of the transformer runs, what each hands to the next."""

    def __init__(self, transformer: nn.Module, call: Call) -> None:
        self.transformer, self.call = transformer, call
        self.links: list[BlockLink] = []
        self.latest: _Ran | None = None
        self._ends: dict[int, Outputs] = {}  # what the last block of each finished list returned
        self._arrival: _Arrival | None = None
        self._replaying = False

    def before(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """See a block's arguments."""
        if self._replaying:
            return
        if any(link.path == path for link in self.links):
            raise BlocksNotSequential(f"block {path} runs more than once in a call")
        pending = Call(args, kwargs, self.call.bucket)
        began = {key: _versions(pending.argument(key)) for key in _keys(pending)}
        if self.latest is None:
            self._arrival = _Arrival(pending, began, (), ())
            return
        if path.rpartition(".")[0] != self.links[-1].path.rpartition(".")[0]:
            self._ends[len(self.links) - 1] = self.latest.copies
        fed = _fed(self.latest, pending)
        needs = self._replayed(path, pending, self.latest.copies) if fed is None else ()
        self._arrival = _Arrival(pending, began, fed, needs)

    def after(self, path: str, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        """See what a block returns."""
        arrival = self._arrival
        assert arrival is not None  # `before` saw it
        outputs = outputs_of(output)
        passed, single = _passed(arrival.call, outputs), not isinstance(output, tuple)
        self.links.append(BlockLink(path, arrival.fed, passed, single, arrival.needs))
        copies = tuple(None if tensor is None else tensor.clone() for tensor in outputs)
        self.latest = _Ran(arrival.call, arrival.began, outputs, _versions(outputs), copies)

    def _replayed(self, path: str, pending: Call, copies: Outputs) -> tuple[int, ...]:
        """Return which blocks' outputs a replay of the pending call needs, besides the `copies` of the one before."""
        self._replaying = True
        try:
            for needs in dict.fromkeys(((), tuple(self._ends))):
                recorded = {len(self.links) - 1: copies} | {number: self._ends[number] for number in needs}
                found = _replayed(self.transformer, self.links, self.call, recorded, path)
                if _equal((found.args, found.kwargs), (pending.args, pending.kwargs)):
                    return needs
        finally:
            self._replaying = False
        raise BlocksNotSequential(f"block {path} needs more than what the blocks before it returned (a long skip connection?)")


def first_call(transformer: nn.Module, path: str, call: Call) -> Call:
    """Return the call that reaches the block at `path` when `call` is made of the transformer; the block is not run."""
    found: list[Call] = []

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append(Call(args, kwargs, call.bucket))
        raise Enough

    handle = transformer.get_submodule(path).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run_call(transformer, call)
    except Enough:
        return found[0]
    finally:
        handle.remove()
    raise BlocksNotSequential(f"block {path} never runs")


def next_call(
    transformer: nn.Module, links: Sequence[BlockLink], index: int, call: Call, recorded: Mapping[int, Outputs]
) -> Call:
    """Return the call of the block after `links[index]` by replay.

    `call` is the transformer's, `recorded` the outputs of block `index` and of those that the next one `needs`, by number.
    """
    return _replayed(transformer, links[: index + 1], call, recorded, links[index + 1].path)


def last_prediction(transformer: nn.Module, links: Sequence[BlockLink], call: Call, outputs: Outputs) -> Tensor | None:
    """Return what the transformer predicts for `call` if its last block returns `outputs`; no block is run."""
    with _standing_in(transformer, links, {len(links) - 1: outputs}):
        return predict(transformer, call)


def predict(model: nn.Module, call: Call) -> Tensor | None:
    """Return a model's prediction for a recorded call, without gradients."""
    found: list[Tensor | None] = []
    handle = predicting(model).register_forward_hook(lambda module, args, output: found.append(prediction_of(output)))
    try:
        run_call(model, call)
    finally:
        handle.remove()
    return found[-1] if found else None


def run_call(module: nn.Module, call: Call) -> object:
    """Make a recorded call, without gradients."""
    with torch.no_grad():
        return module(*call.args, **call.kwargs)


class _StandIn(nn.Module):
    """Takes the place of a block: returns what was recorded, or its own inputs."""

    def __init__(self, link: BlockLink, outputs: Outputs | None, block: nn.Module) -> None:
        super().__init__()
        self.link, self.outputs = link, outputs
        self._block = (block,)  # in a tuple, so that it is no submodule

    def __getattr__(self, name: str):
        """Look up what is missing in the block: DiT's last layer borrows an embedder of its first block."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block[0], name)

    def forward(self, *args, **kwargs) -> object:
        outputs = self.outputs
        if outputs is None:
            call = Call(args, kwargs, 0)
            outputs = tuple(None if key is None else call.argument(key) for key in self.link.passed)
        return outputs[0] if self.link.single else outputs


def _standing_in(
    transformer: nn.Module, links: Sequence[BlockLink], recorded: Mapping[int, Outputs]
) -> AbstractContextManager[None]:
    """Let the blocks of `links` return what is recorded of them, or else their inputs, while the body runs."""
    blocks = (transformer.get_submodule(link.path) for link in links)
    stand_ins = (
        _StandIn(link, recorded.get(number), block) for number, (link, block) in enumerate(zip(links, blocks, strict=True))
    )
    return replaced(transformer, {link.path: stand_in for link, stand_in in zip(links, stand_ins, strict=True)})


@contextmanager
def replaced(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other modules in place of those of these names while the body runs."""
    before = {name: model.get_submodule(name) for name in layers}
    try:
        put(model, layers)
        yield
    finally:
        put(model, before)


def put(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Replace the modules of these names."""
    for name, layer in layers.items():
        model.set_submodule(name, layer)


def _replayed(transformer: nn.Module, links: Sequence[BlockLink], call: Call, recorded: Mapping[int, Outputs], path: str) -> Call:
    try:
        with _standing_in(transformer, links, recorded):
            return first_call(transformer, path, call)
    except _FAILURES as error:
        raise BlocksNotSequential(f"the way to block {path} cannot be run without the blocks before it ({error})") from error


def _keys(call: Call) -> tuple[Key, ...]:
    return (*range(len(call.args)), *call.kwargs)


def _fed(ran: _Ran, call: Call) -> tuple[tuple[Key, int], ...] | None:
    """Return which arguments of `call` are outputs of the block before; None if there are others that have changed."""
    given = ran.call
    if len(given.args) != len(call.args) or given.kwargs.keys() != call.kwargs.keys():
        return None
    if _versions(ran.outputs) != ran.versions:
        return None  # something was changed in place in between
    fed: list[tuple[Key, int]] = []
    for key in _keys(call):
        value = call.argument(key)
        number = next((n for n, output in enumerate(ran.outputs) if output is not None and output is value), None)
        if number is not None:
            fed.append((key, number))
        elif not _same(value, given.argument(key)) or _versions(value) != ran.began[key]:
            return None  # another one, or changed in place by the block or behind it
    return tuple(fed)


def _passed(call: Call, outputs: Outputs) -> tuple[Key | None, ...]:
    """Return for each output the argument that it updates: the first one not yet taken of the same shape, None if there is none.

    T5's first block makes the bias of positions that the others are given.
    """
    given = {key: value for key in _keys(call) if isinstance(value := call.argument(key), Tensor)}
    passed: list[Key | None] = []
    for output in outputs:
        fitting = None
        if output is not None:
            fitting = next((k for k, value in given.items() if k not in passed and value.shape == output.shape), None)
        passed.append(fitting)
    return tuple(passed)


def tensors_of(value: object) -> list[Tensor]:
    """Return the tensors in nested arguments or outputs, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _versions(value: object) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors_of(value) if not tensor.is_inference())


def _same(a: object, b: object) -> bool:
    """Return whether two arguments are made of the very same tensors and equal values."""
    (x, shape), (y, other) = tree_flatten(a), tree_flatten(b)
    return shape == other and all(
        u is v if isinstance(u, Tensor) or isinstance(v, Tensor) else u == v for u, v in zip(x, y, strict=True)
    )


def _equal(a: object, b: object) -> bool:
    (x, shape), (y, other) = tree_flatten(a), tree_flatten(b)
    return shape == other and all(
        _equal_tensors(u, v) if isinstance(u, Tensor) and isinstance(v, Tensor) else not isinstance(v, Tensor) and u == v
        for u, v in zip(x, y, strict=True)
    )


def _equal_tensors(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
