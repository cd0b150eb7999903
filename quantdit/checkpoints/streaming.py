"""A transformer, or an encoder, larger than memory: its blocks are read when they run, and dropped afterwards.

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
from quantdit.checkpoints.libraries import TRANSFORMERS, aliases, library_of_config, names_in, tie
from quantdit.layers.quant_embedding import scale_of, scaled_rows
from quantdit.layers.quant_linear import QuantLinear
from quantdit.models.adapter import adapter_for, tables
from quantdit.system.files import (
    CheckpointError,
    check_finite,
    is_float8,
    open_weights,
    read_json,
    stored_tensors,
    tensor_files,
    weight_files,
)

# Python with torch and diffusers, and what a run needs besides; measured.
PROCESS_BYTES = 2**30
GRAM_COPIES = 8


def skeleton(folder: Path, dtype: torch.dtype, class_name: str | None = None) -> nn.Module:
    """Return the full-precision transformer or encoder of a folder, its blocks on the meta device, the rest read as `dtype`.

    An encoder's table of words is on the meta device, too (`stream_of` has it looked up), unless a head multiplies with it.

    Args:
        folder: config.json and safetensors weights.
        dtype: of all floating tensors but those that the class keeps in float32.
        class_name: of an encoder, where a pipeline names another than its config.json.

    Raises:
        CheckpointError: a damaged folder, or one whose tensors are not a full-precision model's (`sources.check`).
        ValueError: a class without blocks.
    """
    built = _build(folder, class_name)
    inside = _streamed(built[0])
    shared = tuple(f"{path}." for path in adapter_for(built[0]).shared)
    model = _fill(*built, dtype, lambda name: not name.startswith(inside) or name.startswith(shared))
    model.__class__ = _computing_on_the_cpu(type(model))
    return model


def _computing_on_the_cpu(cls: type) -> type:
    """Return a subclass of the same names whose `device` is where it computes: pipelines send inputs there, not to meta."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), names | {"device": property(lambda model: torch.device("cpu"))})


def whole(folder: Path, dtype: torch.dtype, class_name: str | None = None) -> nn.Module:
    """Return the full-precision transformer or encoder of a folder, all of it in memory; raises what `skeleton` does."""
    model = _fill(*_build(folder, class_name), dtype, lambda name: True)
    check_in_memory(model, folder)
    return model


def _build(folder: Path, class_name: str | None) -> tuple[nn.Module, dict[str, Path]]:
    """Return a model without its weights, and in which file each tensor lies; both are checked."""
    config, stored = _config(folder, class_name), stored_tensors(weight_files(folder))
    model = build_on_meta(config, folder, room=room_for_tables(stored))
    sources.check(model, {name: stored[key] for name, key in names_in(model, stored).items()})
    return model, {key: tensor.path for key, tensor in stored.items()}


def _fill(model: nn.Module, files: dict[str, Path], dtype: torch.dtype, wanted: Callable[[str], bool]) -> nn.Module:
    stream, tied = Stream(model, files, dtype), aliases(model)
    for name in model.state_dict():
        # A buffer that the class computes is overwritten by the file's, if it has one.
        if name in stream.files and wanted(name):
            if name in tied and not torch.equal(stream.read(name), stream.read(tied[name])):
                raise CheckpointError(f"{stream.files[name]}: {name} is tied to {tied[name]}, but another tensor; copy it again")
            stream.put(name)
    tie(model)
    return model.requires_grad_(False).eval()


def _config(folder: Path, class_name: str | None = None) -> dict:
    """Return the config.json of a full-precision model, checked before anything is built from it."""
    where = folder / "config.json"
    config = read_json(where)
    sources.check_method(config, where)
    sources.check_safetensors(folder)
    if class_name is not None and library_of_config(config) is TRANSFORMERS:
        config["architectures"] = [class_name]
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


def need_of(folder: Path, dtype: torch.dtype, class_name: str | None = None) -> Need:
    """Estimate what the full-precision transformer or encoder of a folder needs, without reading its weights.

    The largest layer's Gram matrix counts GRAM_COPIES times: what it is made into (rotated, damped, factorized) lives beside it.
    """
    transformer = build_on_meta(_config(folder, class_name), folder, compute_buffers=False)
    sizes = {name: t.numel() * dtype.itemsize for name, t in transformer.named_parameters()}
    inside, streamed = _inside(transformer), _streamed(transformer)
    outside = sum(size for name, size in sizes.items() if not name.startswith(streamed))
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


def _streamed(transformer: nn.Module) -> tuple[str, ...]:
    """Return what the names of tensors begin with that are read when they are needed."""
    return (*_inside(transformer), *(f"{path}." for path in _looked_up(transformer)))


def _looked_up(transformer: nn.Module) -> dict[str, nn.Embedding]:
    """Return the modules of a table of words that nothing but lookups reads."""
    found = tables(transformer)
    weights = [module.weight for module in transformer.modules() if isinstance(module, nn.Linear)]
    return {} if any(weight is table.weight for table in found.values() for weight in weights) else found


def stream_of(model: nn.Module, folder: Path) -> Stream:
    """Return what reads the blocks of a model that `skeleton` made of a folder; lookups in a table on the disk read its rows."""
    stream, tied = Stream(model, tensor_files(folder), shared=adapter_for(model).shared), aliases(model)
    for path, table in _looked_up(model).items():
        if table.weight.device.type == "meta":
            name = f"{path}.weight"
            table.forward = partial(stream.look_up, tied.get(name, name), scale_of(table))
    return stream


@dataclass
class Stream:
    """Reads and drops parts of a transformer.

    Attributes:
        transformer: its parts on the meta device where they are not in memory.
        files: where each tensor of its state dict lies, given under the names in the files; `adopt` changes it for what
            calibration finished.
        dtype: of the floating tensors that are not part of a quantized layer, but those that the class keeps in float32.
        shared: paths of modules that are never dropped; see `Adapter.shared`.
    """

    transformer: nn.Module
    files: dict[str, Path]
    dtype: torch.dtype = torch.float32
    shared: tuple[str, ...] = ()
    _users: dict[str, int] = field(default_factory=dict)
    _keys: dict[str, str] = field(default_factory=dict)  # names in the files

    def __post_init__(self) -> None:
        """Find the tensors under the names that the model has for them."""
        self._keys = names_in(self.transformer, self.files)
        self.files = {name: self.files[key] for name, key in self._keys.items()}

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
        self._keys |= {name: name for name in names}

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
            stored = file.get_tensor(self._keys[name])
            if not quantized and is_float8(stored):
                stored = sources.scaled(stored, self._scale(name))
            # A copy: a mapped tensor would keep the pages of the file in memory.
            as_it_is = quantized or not stored.is_floating_point()
            dtype = torch.float32 if stays_float32(self.transformer, name, self.dtype) else self.dtype
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
            return file.get_tensor(self._keys[scale]).clone()

    def rows(self, name: str, count: int) -> Iterator[Tensor]:
        """Yield a tensor of the state dict in parts of `count` rows as they are stored, float8 ones as float32.

        Raises:
            CheckpointError: it is not there, or has NaN or infinite entries.
        """
        if name not in self.files:
            raise CheckpointError(f"no file holds tensor {name}; copy the model again")
        scale = self._scale(name)
        with open_weights(self.files[name]) as file:
            stored = file.get_slice(self._keys[name])
            for start in range(0, stored.get_shape()[0], count):
                part = stored[start : start + count].clone()
                if is_float8(part):
                    many = scale is not None and scale.numel() > 1  # one for each row
                    part = sources.scaled(part, scale[start : start + count] if scale is not None and many else scale)
                check_finite(name, part)
                yield part

    def look_up(self, name: str, scale: float | None, input: Tensor) -> Tensor:
        """Return the rows of a table on the disk, `[..., width]`, as its nn.Embedding would; takes its `forward`'s place."""
        numbers, places = input.unique(return_inverse=True)
        factor = self._scale(name)
        with open_weights(self.files[name]) as file:
            stored = file.get_slice(self._keys[name])
            rows = torch.cat([stored[number : number + 1] for number in numbers.tolist()])
        if is_float8(rows):
            rows = sources.scaled(rows, factor[numbers] if factor is not None and factor.numel() > 1 else factor)
        check_finite(name, rows)
        return scaled_rows(rows.to(self.dtype)[places], scale)

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
