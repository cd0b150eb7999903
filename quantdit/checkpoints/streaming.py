"""A transformer larger than memory: its blocks are read when they run, and dropped afterwards.

The module tree is built on the meta device. What lies outside the blocks is read once and stays; a block is read from safetensors
files, tensor by tensor, cast to the dtype of the computation. Blocks that calibration has finished are read from where it put
their quantized tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from quantdit.checkpoints import sources
from quantdit.checkpoints.checkpoint import build_on_meta, check_in_memory, check_plausible, room_for_tables, stays_float32
from quantdit.layers.quant_linear import QuantLinear
from quantdit.models.adapter import adapter_for
from quantdit.system.files import CheckpointError, check_finite, is_float8, open_weights, read_json, stored_tensors, weight_files

# Python with torch and diffusers, and what a run needs besides; measured.
PROCESS_BYTES = 2**30
GRAM_COPIES = 8


def skeleton(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Return the full-precision transformer of a folder, its blocks on the meta device, the rest read as `dtype`.

    Args:
        folder: config.json and safetensors weights.
        dtype: of all floating tensors but those that the class keeps in float32.

    Raises:
        CheckpointError: a damaged folder, or one whose tensors are not a full-precision model's (`sources.check`).
        ValueError: a class without blocks.
    """
    return _read(folder, dtype, all_of_it=False)


def whole(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Return the full-precision transformer of a folder, all of it in memory; raises what `skeleton` does."""
    transformer = _read(folder, dtype, all_of_it=True)
    check_in_memory(transformer, folder)
    return transformer


def _read(folder: Path, dtype: torch.dtype, all_of_it: bool) -> nn.Module:
    config, stored = _config(folder), stored_tensors(weight_files(folder))
    transformer = build_on_meta(config, folder, room=room_for_tables(stored))
    sources.check(transformer, stored)
    stream = Stream(transformer, {name: tensor.path for name, tensor in stored.items()}, dtype)
    inside, shared = _inside(transformer), tuple(f"{path}." for path in adapter_for(transformer).shared)
    for name in transformer.state_dict():
        # A buffer that the class computes is overwritten by the file's, if it has one.
        if name in stored and (all_of_it or not name.startswith(inside) or name.startswith(shared)):
            stream.put(name)
    return transformer.requires_grad_(False).eval()


def _config(folder: Path) -> dict:
    """Return the config.json of a full-precision transformer, checked before anything is built from it."""
    where = folder / "config.json"
    config = read_json(where)
    sources.check_method(config, where)
    check_plausible(config, len(stored_tensors(weight_files(folder))), where)
    return config


@dataclass(frozen=True)
class Need:
    """Bytes of memory that calibrating a transformer takes: with all its weights there, or with a block at a time.

    `work` of both is no weights: a second transformer needs it no second time.
    """

    resident: int
    streamed: int
    work: int = 0

    def __add__(self, other: Need) -> Need:
        """Return what two transformers need that are worked on in turn."""
        work = max(self.work, other.work)
        saved = self.work + other.work - work
        return Need(self.resident + other.resident - saved, self.streamed + other.streamed - saved, work)


def need_of(folder: Path, dtype: torch.dtype) -> Need:
    """Estimate what the full-precision transformer of a folder needs, without reading its weights.

    The largest layer's Gram matrix counts GRAM_COPIES times: what it is made into (rotated, damped, factorized) lives beside it.
    """
    transformer = build_on_meta(_config(folder), folder, compute_buffers=False)
    sizes = {name: t.numel() * dtype.itemsize for name, t in transformer.named_parameters()}
    inside = _inside(transformer)
    outside = sum(size for name, size in sizes.items() if not name.startswith(inside))
    blocks: Counter[str] = Counter()
    for name, size in sizes.items():
        if name.startswith(inside):
            prefix = next(p for p in inside if name.startswith(p))
            blocks[prefix + name[len(prefix) :].partition(".")[0]] += size
    width = max((m.in_features for m in transformer.modules() if isinstance(m, nn.Linear)), default=0)
    work = PROCESS_BYTES + GRAM_COPIES * 4 * width**2
    # The block being quantized, and its weights once more in other forms.
    return Need(sum(sizes.values()) + work, outside + 2 * max(blocks.values(), default=0) + work, work)


def _inside(transformer: nn.Module) -> tuple[str, ...]:
    return tuple(f"{path}." for path in adapter_for(transformer).blocks)


@dataclass
class Stream:
    """Reads and drops parts of a transformer.

    Attributes:
        transformer: its parts on the meta device where they are not in memory.
        files: where each tensor of its state dict lies; `adopt` changes it for what calibration finished.
        dtype: of the floating tensors that are not part of a quantized layer, but those that the class keeps in float32.
        shared: paths of modules that are never dropped; see `Adapter.shared`.
    """

    transformer: nn.Module
    files: dict[str, Path]
    dtype: torch.dtype = torch.float32
    shared: tuple[str, ...] = ()
    _users: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def loaded(self, path: str) -> Iterator[nn.Module]:
        """Have the module at `path` in memory while the body runs."""
        module = self.transformer.get_submodule(path)
        try:
            self.load(path)
            yield module
        finally:
            self.drop(path)

    @contextmanager
    def following(self, paths: Sequence[str]) -> Iterator[None]:
        """Load each of these modules when it is called and drop it afterwards, while the body runs."""
        handles, users = [], {path: self._users.get(path, 0) for path in paths}
        for path in paths:
            module = self.transformer.get_submodule(path)
            # First of the hooks before, last of those after, so that the others find it loaded.
            handles.append(module.register_forward_pre_hook(partial(_then, self.load, path), prepend=True))
            handles.append(module.register_forward_hook(partial(_then, self.drop, path), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for path in paths:
                # A pass that Ctrl-C ended has not dropped the block it was in.
                self._users[path] = users[path] + 1
                self.drop(path)

    def load(self, path: str) -> None:
        """Read what of a module is on the meta device."""
        self._users[path] = self._users.get(path, 0) + 1
        if self._users[path] == 1:
            for name in self._names(path, on_meta=True):
                self.put(name)

    def drop(self, path: str) -> None:
        """Put a module back on the meta device once nobody needs it any more."""
        self._users[path] = max(0, self._users.get(path, 0) - 1)
        if self._users[path]:
            return
        kept = tuple(f"{shared}." for shared in self.shared)
        for name in self._names(path, on_meta=False):
            if name in self.files and not name.startswith(kept):
                module, tensors, leaf = self._place(name)
                tensors[leaf] = _like(tensors[leaf], tensors[leaf].to("meta"))
                if isinstance(module, QuantLinear):
                    module.forget()

    def adopt(self, file: Path, names: Sequence[str]) -> None:
        """Let the tensors of these names be read from another file from now on."""
        self.files |= dict.fromkeys(names, file)

    def put(self, name: str) -> None:
        """Read one tensor into its place."""
        _, tensors, leaf = self._place(name)
        tensors[leaf] = _like(tensors[leaf], self.read(name))

    def read(self, name: str) -> Tensor:
        """Return one tensor of the state dict as it is computed with.

        Raises:
            CheckpointError: it is not there, of another shape, or has NaN or infinite entries.
        """
        if name not in self.files:
            raise CheckpointError(f"no file holds tensor {name}; copy the model again")
        path = self.files[name]
        module, tensors, leaf = self._place(name)
        quantized = isinstance(module, QuantLinear) and leaf in module._buffers
        with open_weights(path) as file:
            stored = file.get_tensor(name)
            if not quantized and is_float8(stored):
                stored = sources.scaled(stored, self._scale(name))
            # A copy: a mapped tensor would keep the pages of the file in memory.
            as_it_is = quantized or not stored.is_floating_point()
            dtype = torch.float32 if stays_float32(self.transformer, name) else self.dtype
            tensor = stored.clone() if as_it_is else stored.to(dtype, copy=True)
        if tensor.shape != tensors[leaf].shape:
            raise CheckpointError(f"{path}: tensor {name} is {tuple(tensor.shape)}, expected {tuple(tensors[leaf].shape)}")
        if not quantized:
            check_finite(name, tensor)
        return tensor

    def _scale(self, name: str) -> Tensor | None:
        scale = sources.scale_of(name, self.files)
        if scale is None:
            return None
        with open_weights(self.files[scale]) as file:
            return file.get_tensor(scale).clone()

    def _names(self, path: str, on_meta: bool) -> list[str]:
        module = self.transformer.get_submodule(path)
        named = (*module.named_parameters(prefix=path), *module.named_buffers(prefix=path))
        return [name for name, tensor in named if (tensor.device.type == "meta") == on_meta]

    def _place(self, name: str) -> tuple[nn.Module, dict, str]:
        parent, _, leaf = name.rpartition(".")
        module = self.transformer.get_submodule(parent)
        return module, module._parameters if leaf in module._parameters else module._buffers, leaf


def _then(action: Callable[[str], None], path: str, *call: object) -> None:
    """Do it at a module's call, as a hook of the module at `path`."""
    action(path)


def is_streamed(transformer: nn.Module) -> bool:
    """Return whether parts of the transformer are not in memory."""
    return any(t.device.type == "meta" for t in transformer.parameters())


def _like(before: Tensor, tensor: Tensor) -> Tensor:
    return nn.Parameter(tensor, requires_grad=False) if isinstance(before, nn.Parameter) else tensor
