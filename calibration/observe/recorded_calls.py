"""Recorded calls of a module, kept on disk: the activations of a video do not fit into memory.

A call is one safetensors file: its tensors by number, and in the metadata the shape of its arguments as JSON with those numbers
in the tensors' places. What a block hands to the next is kept in a second, small file beside the first block's call.
A folder's index has the sha256 of each file, which is checked when the file is first read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_map_only

from quantdit.system import checksummed_json, files

INDEX = "index.json"
_CALL = "call"
_SUMS = "sha256"
_COMPLEX = {torch.complex64: torch.float32, torch.complex128: torch.float64}

T = TypeVar("T")
Key = int | str  # a position or a keyword
Sums = MutableMapping[Path, str]  # sha256 of files that are still to be checked


@dataclass(frozen=True)
class Call:
    """One call of a module, the timestep bucket it belongs to, and of a whole transformer what it returned."""

    args: tuple
    kwargs: dict
    bucket: int
    output: Tensor | None = None

    def argument(self, key: Key) -> object:
        """Return the argument at a position or of a keyword."""
        return self.args[key] if isinstance(key, int) else self.kwargs[key]

    def with_arguments(self, values: dict[Key, object]) -> Call:
        """Return the call with other values of some arguments."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for key, value in values.items():
            if isinstance(key, int):
                args[key] = value
            else:
                kwargs[key] = value
        return replace(self, args=tuple(args), kwargs=kwargs)


def rows_of(value: T, keep: Tensor | slice, count: int) -> T:
    """Return arguments or outputs with the rows `keep` of every tensor that has `count` of them; the rest as it is."""
    return tree_map_only(Tensor, lambda tensor: tensor[keep] if tensor.ndim and len(tensor) == count else tensor, value)


@dataclass(frozen=True)
class StoredCall:
    """Where a call lies: the file of its arguments, and one of tensors that take the place of some of them.

    Attributes:
        path: the call's file.
        bucket: its timestep bucket.
        output: file of what the module returned, if that was recorded.
        carried: file of the tensors `0`, `1`, ... that a block before returned.
        fed: (argument, number of the tensor in `carried`).
        sums: of these files, and of others in their folders.
    """

    path: Path
    bucket: int
    output: Path | None = None
    carried: Path | None = None
    fed: tuple[tuple[Key, int], ...] = ()
    sums: Sums = field(default_factory=dict)

    def load(self) -> Call:
        """Read the call into memory.

        Raises:
            ValueError: a file is not what was written.
        """
        args, kwargs = _read(self.path, self.sums)
        output = _read(self.output, self.sums)[0][0] if self.output is not None else None
        call = Call(args, kwargs, self.bucket, output)
        if self.carried is None:
            return call
        outputs = load_outputs(self.carried, self.sums)
        return call.with_arguments({key: outputs[number] for key, number in self.fed})


@dataclass(frozen=True)
class StoredCalls(Sequence):
    """Calls that are read when they are asked for, one at a time.

    Attributes:
        entries: where they lie.
        levels: of the edges of the trajectory that they were taken from (timesteps.buckets_of); () without.
    """

    entries: tuple[StoredCall, ...]
    levels: tuple[tuple[float, int], ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> Call: ...
    @overload
    def __getitem__(self, index: slice) -> StoredCalls: ...
    def __getitem__(self, index):
        return replace(self, entries=self.entries[index]) if isinstance(index, slice) else self.entries[index].load()

    def __iter__(self) -> Iterator[Call]:
        return (entry.load() for entry in self.entries)


def save_call(path: Path, args: tuple, kwargs: dict) -> None:
    """Write the arguments of a call.

    Raises:
        ValueError: an argument that is neither a tensor, a number, a text, nor made of these.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[int, str] = {}
    shape = {"args": _describe(tuple(args), tensors, numbers), "kwargs": _describe(dict(kwargs), tensors, numbers)}
    save_file(tensors, path, metadata={_CALL: json.dumps(shape)})


def save_outputs(path: Path, outputs: Sequence[Tensor | None]) -> None:
    """Write what a block returned."""
    save_call(path, tuple(outputs), {})


def load_outputs(path: Path, sums: Sums | None = None) -> tuple[Tensor | None, ...]:
    """Read what `save_outputs` wrote; `sums` of the folder's index, if it has one.

    Raises:
        ValueError: the file is not what was written.
    """
    return _read(path, {} if sums is None else sums)[0]


def save_recorded(folder: Path, number: int, args: tuple, kwargs: dict) -> None:
    """Write a transformer's call of this number."""
    save_call(_call_path(folder, number), args, kwargs)


def save_returned(folder: Path, number: int, output: Tensor) -> None:
    """Write what the transformer's call of this number returned."""
    save_outputs(_output_path(folder, number), (output,))


def forget_recorded(folder: Path, number: int) -> None:
    """Remove a call."""
    _call_path(folder, number).unlink()
    _output_path(folder, number).unlink(missing_ok=True)


def finish_recorded(folder: Path, buckets: dict[int, int], levels: Sequence[tuple[float, int]] = ()) -> StoredCalls:
    """Mark a folder of recorded calls as whole; the timestep bucket of each number, and the levels of the trajectory's edges."""
    finish(folder, {"calls": list(buckets.items()), "levels": list(levels)})
    stored = recorded(folder)
    assert stored is not None  # its mark has just been written
    return stored


def recorded(folder: Path) -> StoredCalls | None:
    """Return the recorded calls of a folder; None if it is not whole."""
    index = index_of(folder)
    if index is None:
        return None
    sums = sums_of(folder)
    entries = []
    for number, bucket in index["calls"]:
        output = _output_path(folder, number)
        entries.append(StoredCall(_call_path(folder, number), bucket, output if output in sums else None, sums=sums))
    return StoredCalls(tuple(entries), tuple((time, bucket) for time, bucket in index.get("levels", ())))


def store(calls: Iterable[Call], folder: Path) -> StoredCalls:
    """Write calls that are in memory into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    buckets = {}
    for number, call in enumerate(calls):
        save_recorded(folder, number, call.args, call.kwargs)
        if call.output is not None:
            save_returned(folder, number, call.output)
        buckets[number] = call.bucket
    return finish_recorded(folder, buckets)


def finish(folder: Path, content: dict, run: str = "") -> None:
    """Mark a folder of calls as whole, its files flushed to the disk; what has no mark was interrupted.

    Args:
        folder: of the calls.
        content: JSON to keep with the mark.
        run: names the run, as for `sealed.write`.
    """
    sums = {}
    for path in sorted(folder.glob("*.safetensors")):
        files.fsync(path)
        sums[path.name] = files.sha256(path)
    checksummed_json.write(folder / INDEX, content | {_SUMS: sums}, run)


def index_of(folder: Path, run: str = "") -> dict | None:
    """Return what `finish` wrote; None if the folder is not whole.

    Raises:
        ValueError: the mark is damaged, or of another run.
    """
    path = folder / INDEX
    return checksummed_json.read(path, run) if path.exists() else None


def sums_of(folder: Path, run: str = "") -> dict[Path, str]:
    """Return the sha256 of each file of a whole folder.

    Raises:
        ValueError: as `index_of`, or the folder is not whole.
    """
    return {folder / name: found for name, found in checksummed_json.read(folder / INDEX, run)[_SUMS].items()}


def _describe(value: object, tensors: dict[str, Tensor], numbers: dict[int, str]) -> list:
    """Return `value` as JSON, its tensors put into `tensors`; the same tensor twice is one tensor twice when read back."""
    if isinstance(value, Tensor):
        if id(value) not in numbers:
            numbers[id(value)] = str(len(tensors))
            plain = torch.view_as_real(value.resolve_conj()) if value.dtype in _COMPLEX else value
            # A copy: views of one storage are not written twice, and a view would write its whole storage.
            tensors[numbers[id(value)]] = plain.detach().to("cpu", copy=True).contiguous()
        return ["complex" if value.dtype in _COMPLEX else "tensor", numbers[id(value)]]
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return ["dict", {k: _describe(v, tensors, numbers) for k, v in value.items()}]
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return [kind, [_describe(v, tensors, numbers) for v in value]]
    if value is None or isinstance(value, bool | int | float | str):
        return ["value", value]
    kind = "dict with keys that are no texts" if isinstance(value, dict) else type(value).__name__
    raise ValueError(
        f"a call with an argument of type {kind} cannot be kept; quantdit keeps tensors, numbers, texts, and"
        " lists, tuples and dictionaries of them"
    )


def _read(path: Path, sums: Sums) -> tuple[tuple, dict]:
    if path in sums:
        if not path.exists() or files.sha256(path) != sums[path]:
            raise ValueError(f"{path} is not what the interrupted run wrote; {checksummed_json.REMEDY}")
        del sums[path]
    with safe_open(path, framework="pt") as file:
        # A copy: a mapped tensor would keep the pages of the file in memory.
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - not a mapping
        shape = json.loads(file.metadata()[_CALL])

    complexes: dict[str, Tensor] = {}

    def build(entry: list) -> Any:
        kind, content = entry
        if kind == "tensor":
            return tensors[content]
        if kind == "complex":
            return complexes.setdefault(content, torch.view_as_complex(tensors[content]))
        if kind == "dict":
            return {k: build(v) for k, v in content.items()}
        if kind in ("tuple", "list"):
            return (tuple if kind == "tuple" else list)(build(v) for v in content)
        return content

    return build(shape["args"]), build(shape["kwargs"])


def _call_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


def _output_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}-output.safetensors"
