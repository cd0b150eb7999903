"""Open an exported graph in ONNX Runtime with the settings it was verified with, and call it as the transformer it came from."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import KeyPath, MappingKey, SequenceKey, tree_leaves_with_path

from quantdit.checkpoints import checkpoint
from quantdit.exporters import onnx_digest
from quantdit.pipelines.arguments import checked_numbers
from quantdit.pipelines.source import Source
from quantdit.system.files import CheckpointError
from quantdit.system.optional_import import PIP, install

if TYPE_CHECKING:
    import onnxruntime

CPU = "CPUExecutionProvider"
VNNI = "cpu-vnni"  # a target of to_onnx.py
NO_VNNI = "and this CPU adds up uint8 x int8 products in 16 bits, where they saturate"
WHEELS = ("onnxruntime", "onnxruntime-gpu")
PACKED_BYTES = "1000000"  # constants larger than this are decoded at every call where memory is to be saved


def session(
    path: str | Path, providers: Sequence[str] = (CPU,), save_memory: bool = False, threads: int | None = None
) -> onnxruntime.InferenceSession:
    """Open an ONNX graph with the settings that keep its arithmetic what the export verified; one of ours only if it is whole.

    * `uint8 x int8` products do not saturate (session.x64quantprecision);
    * a weight-only product stays one: ONNX Runtime does not quantize its activations (session.qdq_matmulnbits_accuracy_level).

    Args:
        path: the .onnx file; its .data file, if there is one, lies beside it.
        providers: what is to run it, in order; each must be granted. Nodes that the others do not have run on the CPU.
        save_memory: leave packed weights packed and decode them at every call, instead of once when the session opens; and give
            memory back at once, not keep it for the next call.
        threads: of one operator; torch's number if None.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: this onnxruntime lacks a provider (it would run on the CPU without a word), or the graph is for CPUs with
            VNNI on one without.
        CheckpointError: no ONNX graph; one of ours that is not, or whose weights are not, what the export wrote.
    """
    return open_graph(path, providers, save_memory, threads)[0]


def open_graph(
    path: str | Path, providers: Sequence[str] = (CPU,), save_memory: bool = False, threads: int | None = None
) -> tuple[onnxruntime.InferenceSession, dict]:
    """Return what `session` does, and the metadata of a graph of ours, {} of any other."""
    path = Path(path)
    checked_numbers({"threads": threads}, optional=("threads",))
    ort = _onnxruntime()
    missing = [p for p in providers if p not in ort.get_available_providers()]
    if missing:
        raise ValueError(
            f"this onnxruntime has no {missing[0]}, it has {', '.join(ort.get_available_providers())}; for CUDA run:"
            f" {PIP} uninstall onnxruntime && {install('onnx-gpu')}"
        )
    if not path.is_file():
        raise CheckpointError(f"{path} is no file; give the .onnx file that quantdit export --to onnx wrote")
    content = onnx_digest.check(path)
    if content.get("target") == VNNI and saturates():
        raise ValueError(f"{path} was exported with --target {VNNI}, {NO_VNNI}; export it with --target cpu")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else int(threads)
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    if save_memory:
        options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", PACKED_BYTES)
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    try:
        opened = ort.InferenceSession(path, options, providers=list(providers))
    except Exception as error:  # ONNX Runtime's errors have no common class of their own
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path}: ONNX Runtime {ort.__version__} cannot open it ({first}); export it again") from error
    refused = [p for p in providers if p not in opened.get_providers()]
    if refused:
        raise ValueError(
            f"{refused[0]} was asked for, but ONNX Runtime opened {path} on {', '.join(opened.get_providers())};"
            " its CUDA and cuDNN libraries are probably missing: pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    return opened, content


@lru_cache(maxsize=1)
def saturates() -> bool:
    """Return whether `uint8 x int8` products of ONNX Runtime saturate on this CPU (kernels/cpu.py), by one of the largest."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.full((64, 64), 127, np.int8), "w")
    x, y = (helper.make_tensor_value_info(n, kind, [8, 64]) for n, kind in (("x", TensorProto.UINT8), ("y", TensorProto.INT32)))
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "largest", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    opened = _onnxruntime().InferenceSession(model.SerializeToString(), providers=[CPU])
    product = opened.run(None, {"x": np.full((8, 64), 255, np.uint8)})[0]
    return bool(np.any(np.asarray(product) != 255 * 127 * 64))


def _onnxruntime():
    """Import onnxruntime; say so if both of its wheels are there, which share one folder.

    Raises:
        ImportError: neither is, or only the rest of one that the other overwrote.
    """
    if len(found := [wheel for wheel in WHEELS if _installed(wheel)]) > 1:
        warnings.warn(
            f"{' and '.join(found)} are both installed and overwrite each other's files; keep one:"
            f" {PIP} uninstall -y onnxruntime onnxruntime-gpu, then {install('onnx')} (or onnx-gpu)",
            stacklevel=3,
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"ONNX graphs need ONNX Runtime; run: {install('onnx')}") from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise ImportError(
            "onnxruntime is only half installed, as uninstalling one of its two wheels leaves it; run:"
            f" {PIP} install --force-reinstall --no-deps onnxruntime"
        )
    return onnxruntime


def _installed(wheel: str) -> bool:
    try:
        version(wheel)
    except PackageNotFoundError:
        return False
    return True


def leaves(arguments: Mapping[str, object]) -> list[tuple[str, Any]]:
    """Return name and value of every tensor, number and text in nested arguments: `a`, `a.b` of a dictionary, `a.0` of a list."""
    return [(name_of(path), value) for path, value in tree_leaves_with_path(dict(arguments))]


def name_of(path: KeyPath) -> str:
    """Return the name of a leaf of nested arguments."""
    return ".".join(str(key.idx if isinstance(key, SequenceKey) else cast(MappingKey, key).key) for key in path)


def arguments_of(forward: inspect.Signature, args: tuple, kwargs: dict) -> dict[str, object]:
    """Return the arguments of a call of a transformer by name, without those that are None or only say how to return."""
    bound = forward.bind(*args, **kwargs).arguments
    return {k: v for k, v in bound.items() if v is not None and k not in ("return_dict", "self")}


class OnnxForward:
    """Stands in for a transformer's `forward`: same arguments, but ONNX Runtime computes.

    Args:
        transformer: that the graph was exported from.
        path: of the graph.
        opened: the graph, as `open_graph` returns it.
        content: its metadata.

    Raises:
        CheckpointError: quantdit did not export it.
    """

    def __init__(self, transformer: nn.Module, path: Path, opened: onnxruntime.InferenceSession, content: dict) -> None:
        self._signature = inspect.signature(type(transformer).forward)
        self._transformer, self._session, self._path = transformer, opened, path
        self._inputs = {i.name: i for i in opened.get_inputs()}
        if not content:
            raise CheckpointError(f"{path} has no metadata of quantdit; give a file that quantdit export --to onnx wrote")
        constants, unused = content.get("constants"), content.get("unused")
        if not isinstance(constants, dict) or not isinstance(unused, list) or not all(isinstance(n, str) for n in unused):
            raise CheckpointError(f"{path}: its metadata lacks what a call needs; export it again")
        self.metadata = content

    def run(self, arguments: Mapping[str, object]) -> Tensor:
        """Return the first output for arguments by name.

        Raises:
            ValueError: other arguments than were exported, sizes the graph is not for, or what ONNX Runtime cannot compute.
        """
        feeds, numbers = {}, {}
        for name, value in leaves(arguments):
            if isinstance(value, Tensor):
                feeds[name] = value.detach().cpu()
            else:
                numbers[name] = value
        unused = set(self.metadata["unused"])
        for name in feeds:
            if name not in self._inputs and name not in unused:
                raise ValueError(f"{self._path} has no input {name}: the call it was exported from had none; export it again")
        for name, known in self._inputs.items():
            if name not in feeds:
                raise ValueError(f"{self._path} needs the input {name}; it was exported from a call that had one")
            self._check_shape(name, known, feeds[name])
        if numbers != (fixed := self.metadata["constants"]):
            name = next(n for n in sorted(numbers.keys() | fixed) if numbers.get(n) != fixed.get(n))
            raise ValueError(
                f"{self._path} was exported with {name} = {fixed.get(name)!r} and is fixed to that, got {numbers.get(name)!r}"
            )
        named = {name: as_numpy(feeds[name], known.type) for name, known in self._inputs.items()}
        try:
            return torch.from_numpy(self._session.run(None, named)[0])
        except Exception as error:  # ONNX Runtime's errors have no common class of their own
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"{self._path}: ONNX Runtime cannot compute this call ({first}); export it again") from error

    def _check_shape(self, name: str, known, value: Tensor) -> None:
        wanted, got = known.shape, tuple(value.shape)
        fits = len(wanted) == len(got) and all(w == g for w, g in zip(wanted, got, strict=True) if isinstance(w, int))
        if not fits:
            raise ValueError(
                f"{self._path}: input {name} is {list(got)}, but the graph is for {wanted}"
                f" ({self.metadata.get('dynamic_note', 'its sizes are fixed')}); export it again for this size"
            )

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Answer as the transformer would: an output with `sample`, or a tuple."""
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        bound = self._signature.bind(self._transformer, *args, **kwargs).arguments
        wants_output = bound.get("return_dict", True)
        bound.update(bound.pop("kwargs", {}))
        given = {k: v for k, v in bound.items() if v is not None and k not in ("return_dict", "self")}
        latent = next(v for v in given.values() if isinstance(v, Tensor))
        sample = self.run(given).to(latent.device)
        return Transformer2DModelOutput(sample=sample) if wants_output else (sample,)


def use_graph(pipeline: object, source: Source, path: Path) -> OnnxForward:
    """Let a transformer of a pipeline answer from the graph that was exported from it, from now on.

    Args:
        pipeline: as `load_pipeline` returns it.
        source: the same.
        path: the .onnx file.

    Raises:
        ValueError: the graph comes from another checkpoint.
        ImportError, CheckpointError: as `session`, or quantdit did not export it.
    """
    opened, content = open_graph(path)
    part = content.get("part")
    folder = source.folder_of(part) if part is not None and part in source.components else None
    own = folder is not None and checkpoint.is_quantized(folder) and checkpoint.identity(folder) == content.get("sha256")
    if content and not own:
        raise ValueError(
            f"{path} was exported from another checkpoint than {source.label}; give the folder it was exported from, or export"
            f" this one: quantdit export {source.folder} --to onnx --output FILE.onnx"
        )
    transformer = getattr(pipeline, part or source.components[0])
    transformer.forward = OnnxForward(transformer, path, opened, content)
    return transformer.forward


_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}


def as_numpy(value: Tensor, kind: str):
    """Return a tensor as the array that an input of this ONNX type takes.

    Raises:
        ValueError: a type that no graph of ours has.
    """
    if kind not in _TYPES:
        raise ValueError(f"an input of type {kind} is none that quantdit exports; export the graph again")
    return value.to(_TYPES[kind]).contiguous().numpy()
