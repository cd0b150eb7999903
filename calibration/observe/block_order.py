"""The chain of a transformer's blocks, found by watching one call: in which order they run, and what one hands to the next.

Most transformers hand the tensors a block returns straight to the next block (`fed`). Between Flux's two lists, or where a video
transformer folds its frames, something happens in between; then the transformer is run again with its finished blocks standing
in for themselves: the last of them returns what was recorded, those before it hand on their inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from quantdit.calibration.observe.recorded_calls import Call, Key

Outputs = tuple[Tensor | None, ...]


class Unchained(ValueError):
    """Blocks that cannot be run one after the other; says why."""


class Enough(Exception):
    """Ends a forward pass once what was asked for is known."""


# What a transformer may raise whose blocks are stood in for.
_FAILURES = (AttributeError, TypeError, IndexError, KeyError, RuntimeError)


@dataclass(frozen=True)
class Link:
    """One block.

    Attributes:
        path: of the module.
        fed: (argument, number of the output of the block before that it is); all other arguments are those of the block before.
            None: only a replay tells the arguments. Empty for the first block.
        passed: for each of its outputs the argument of the same shape, or None where the output is None.
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
    def from_dict(cls, content: dict) -> Link:
        """Return what `to_dict` gave."""
        fed = None if content["fed"] is None else tuple((key, number) for key, number in content["fed"])
        return cls(content["path"], fed, tuple(content["passed"]), content["single"], tuple(content["needs"]))


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
        Unchained: something else than a tensor or a tuple of tensors.
    """
    outputs = output if isinstance(output, tuple) else (output,)
    if not all(v is None or isinstance(v, Tensor) for v in outputs):
        raise Unchained(f"a block returns {type(output).__name__}, expected tensors")
    return outputs


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


def observe(transformer: nn.Module, paths: Sequence[str], call: Call) -> list[Link]:
    """Return the chain of the blocks at `paths`, in running order, by making one call of the transformer.

    Raises:
        Unchained: a block that never runs or runs twice, or arguments, or an output of the transformer, that cannot be had from
            the block before alone.
    """
    links: list[Link] = []
    latest: _Ran | None = None
    ends: dict[int, Outputs] = {}  # what the last block of each finished list returned
    arrival: tuple[Call, dict, tuple[tuple[Key, int], ...] | None, tuple[int, ...]] | None = None
    replaying = False

    def replayed(path: str, pending: Call) -> tuple[int, ...]:
        """Return which blocks' outputs a replay of the pending call needs."""
        nonlocal replaying
        replaying = True
        try:
            for needs in dict.fromkeys(((), tuple(ends))):
                recorded = {len(links) - 1: latest.copies} | {number: ends[number] for number in needs}
                found = _replayed(transformer, links, call, recorded, path)
                if _equal((found.args, found.kwargs), (pending.args, pending.kwargs)):
                    return needs
        finally:
            replaying = False
        raise Unchained(f"block {path} needs more than what the blocks before it returned (a long skip connection?)")

    def before(path: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal arrival
            if replaying:
                return
            if any(link.path == path for link in links):
                raise Unchained(f"block {path} runs more than once in a call")
            pending = Call(args, kwargs, call.bucket)
            began = {key: _versions(pending.argument(key)) for key in _keys(pending)}
            if latest is None:
                arrival = pending, began, (), ()
                return
            if path.rpartition(".")[0] != links[-1].path.rpartition(".")[0]:
                ends[len(links) - 1] = latest.copies
            fed = _fed(latest, pending)
            arrival = pending, began, fed, replayed(path, pending) if fed is None else ()

        return hook

    def after(path: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            nonlocal latest
            outputs = outputs_of(output)
            pending, began, fed, needs = arrival
            links.append(Link(path, fed, _passed(pending, outputs), not isinstance(output, tuple), needs))
            copies = tuple(None if tensor is None else tensor.clone() for tensor in outputs)
            latest = _Ran(pending, began, outputs, _versions(outputs), copies)

        return hook

    handles = []
    try:
        for path in paths:
            block = transformer.get_submodule(path)
            handles.append(block.register_forward_pre_hook(before(path), with_kwargs=True))
            handles.append(block.register_forward_hook(after(path), with_kwargs=True))
        output = run_call(transformer, call)
    finally:
        for handle in handles:
            handle.remove()
    if missing := set(paths) - {link.path for link in links}:
        raise Unchained(f"block {min(missing)} never runs")
    try:
        again = last_output(transformer, links, call, latest.copies)
    except _FAILURES as error:
        raise Unchained(f"the way from the last block to the output cannot be run without the blocks ({error})") from error
    if not _equal(*([leaf for leaf in _leaves(value) if isinstance(leaf, Tensor)] for value in (again, output))):
        raise Unchained("the output needs more than what its last block returned (a long skip connection?)")
    return links


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
    raise Unchained(f"block {path} never runs")


def next_call(transformer: nn.Module, links: Sequence[Link], index: int, call: Call, recorded: Mapping[int, Outputs]) -> Call:
    """Return the call of the block after `links[index]` by replay.

    `call` is the transformer's, `recorded` the outputs of block `index` and of those that the next one `needs`, by number.
    """
    return _replayed(transformer, links[: index + 1], call, recorded, links[index + 1].path)


def last_output(transformer: nn.Module, links: Sequence[Link], call: Call, outputs: Outputs) -> object:
    """Return what the transformer returns for `call` if its last block returns `outputs`; no block is run."""
    with _standing_in(transformer, links, {len(links) - 1: outputs}):
        return run_call(transformer, call)


def run_call(module: nn.Module, call: Call) -> object:
    """Make a recorded call, without gradients."""
    with torch.no_grad():
        return module(*call.args, **call.kwargs)


class _StandIn(nn.Module):
    """Takes the place of a block: returns what was recorded, or its own inputs."""

    def __init__(self, link: Link, outputs: Outputs | None, block: nn.Module) -> None:
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


@contextmanager
def _standing_in(transformer: nn.Module, links: Sequence[Link], recorded: Mapping[int, Outputs]) -> Iterator[None]:
    """Let the blocks of `links` return what is recorded of them, or else their inputs, while the body runs."""
    places = []
    for number, link in enumerate(links):
        parent, _, child = link.path.rpartition(".")
        modules = transformer.get_submodule(parent)._modules
        places.append((modules, child, modules[child]))
        modules[child] = _StandIn(link, recorded.get(number), modules[child])
    try:
        yield
    finally:
        for modules, child, block in places:
            modules[child] = block


def _replayed(transformer: nn.Module, links: Sequence[Link], call: Call, recorded: Mapping[int, Outputs], path: str) -> Call:
    try:
        with _standing_in(transformer, links, recorded):
            return first_call(transformer, path, call)
    except _FAILURES as error:
        raise Unchained(f"the way to block {path} cannot be run without the blocks before it ({error})") from error


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
    """Return for each output the argument that it updates: the first one not yet taken of the same shape."""
    keys = [key for key in _keys(call) if isinstance(call.argument(key), Tensor)]
    passed: list[Key | None] = []
    for output in outputs:
        fitting = None
        if output is not None:
            fitting = next((k for k in keys if k not in passed and call.argument(k).shape == output.shape), None)
            if fitting is None:
                raise Unchained(f"a block returns a tensor {tuple(output.shape)} that none of its arguments has the shape of")
        passed.append(fitting)
    return tuple(passed)


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        for key in value:
            yield key
            yield from _leaves(value[key])
    elif isinstance(value, tuple | list):
        for v in value:
            yield from _leaves(v)
    else:
        yield value


def _versions(value: object) -> tuple[int, ...]:
    return tuple(leaf._version for leaf in _leaves(value) if isinstance(leaf, Tensor) and not leaf.is_inference())


def _same(a: object, b: object) -> bool:
    """Return whether two arguments are made of the very same tensors and equal values."""
    x, y = list(_leaves(a)), list(_leaves(b))
    return len(x) == len(y) and all(
        u is v if isinstance(u, Tensor) or isinstance(v, Tensor) else u == v for u, v in zip(x, y, strict=True)
    )


def _equal(a: object, b: object) -> bool:
    x, y = list(_leaves(a)), list(_leaves(b))
    return len(x) == len(y) and all(
        _equal_tensors(u, v) if isinstance(u, Tensor) and isinstance(v, Tensor) else not isinstance(v, Tensor) and u == v
        for u, v in zip(x, y, strict=True)
    )


def _equal_tensors(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
