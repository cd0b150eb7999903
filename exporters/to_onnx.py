"""ONNX export: the transformer of a quantized folder as a graph for ONNX Runtime, checked against PyTorch before it counts.

The transformer is traced with an opaque operator in the place of every quantized layer (`torch.onnx.export`), so no weight of
theirs passes through the tracer. Then each operator becomes the nodes of its layer (onnx_layers.py), whose weights are read and
repacked one at a time while the file is written. Nodes are named by module path.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import KeyPath, tree_leaves, tree_map_with_path

from quantdit.checkpoints import checkpoint
from quantdit.exporters import onnx_digest
from quantdit.exporters.onnx_session import NO_VNNI, VNNI, leaves, name_of, saturates
from quantdit.exporters.onnx_verify import Cut, keep_decoded, recorded_calls, verified
from quantdit.layers.quant_linear import QuantLinear
from quantdit.models.adapter import Adapter, adapter_for
from quantdit.models.call_view import time_argument, times_rise
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.system import files
from quantdit.system.optional_import import install

OPSET = 23
STORAGES = ("packed", "int8")
TARGETS = ("cpu", VNNI, "cpu-nbits", "cuda")
SINGLE_FILE_BYTES = 2**26  # beyond, weights go into a file of their own; protobuf ends at 2 GiB
SAVE_MEMORY_BYTES = 2**28  # weights beyond stay packed while a graph is verified
LAYER = "Layer"

# Which sizes of its inputs a class lets vary, by the names of models/adapter.py. Not here: fixed, since their positions are a
# table of one size (DiT, PixArt, SD3), or since nobody checked.
DYNAMIC = {
    "DiTTransformer2DModel": ("batch",),
    "FluxTransformer2DModel": ("batch", "patches", "tokens"),
    "SD3Transformer2DModel": ("batch", "tokens"),
    "WanTransformer3DModel": ("batch", "frames", "height", "width", "tokens"),
}

torch.library.define("quantdit_onnx::layer", "(Tensor x, str layer, int out_features) -> Tensor")


@torch.library.register_fake("quantdit_onnx::layer")
def _(x: Tensor, layer: str, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def to_onnx(
    folder: Path,
    output: Path,
    storage: str = "packed",
    verify: bool = True,
    part: str | None = None,
    target: str = "cpu",
    accept_config: bool = False,
) -> dict:
    """Write the transformer of `folder` as an ONNX graph; returns the metadata that the graph carries.

    Args:
        folder: a quantized pipeline, or a quantized transformer alone.
        output: the .onnx file; weights of more than 64 MiB go into `<output>.data` beside it.
        storage: `packed` (codes as narrow as in the checkpoint, decoded when a session opens) or `int8` (decoded in the file).
        verify: run the graph against PyTorch on calls that the pipeline makes while it samples, or on made-up ones for a
            transformer without a pipeline (onnx_verify.py). A graph that computes something else is not written.
        part: which of several transformers.
        target: `cpu`: integer products of the checkpoint's own codes, standard operators alone, exact on every CPU: uint8 x int8
            where no two neighbouring weights saturate before AVX512-VNNI (8-bit ones do), else uint8 x uint8.
            `cpu-vnni`: uint8 x int8 throughout, the faster one, for CPUs that have VNNI; on others `session` refuses the graph.
            `cpu-nbits`: MatMulNBits, 4-bit weights stay so in memory; 8-bit activations are rounded by ONNX Runtime, for each
            block of inputs. `cuda`: MatMulNBits with float16 activations, which is what ONNX Runtime's CUDA kernels multiply;
            8-bit ones are not rounded.
        accept_config: as `load_pipeline` takes it.

    Raises:
        ValueError: no quantized folder (CheckpointError), an output that exists, a model that cannot be traced, or a graph that
            does not compute what PyTorch does.
        ImportError: the packages of quantdit's extra onnx are missing.
        OSError: the output cannot be written.
    """
    _check(folder, output, storage, target, verify)
    pipeline, source = load_pipeline(str(folder), accept_config=accept_config)
    names = source.components
    if part is not None and part not in names:
        raise ValueError(f"{folder} has no {part}; it has {', '.join(names)}")
    part = part or names[0]
    sha256 = checkpoint.identity(source.folder_of(part))
    transformer = getattr(pipeline, part)
    keep_decoded(transformer)
    calls = recorded_calls(pipeline, part)
    recipe = files.read_json(source.folder_of(part) / "config.json")["quantization_config"].get("recipe")
    del pipeline
    model, content, cuts = graph_of(transformer, calls[0].arguments, storage, target)
    content |= {
        "part": part,
        "sha256": sha256,
        "recipe": recipe.get("name") if isinstance(recipe, dict) else None,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        path = scratch / output.name
        size = save(model, path, content)
        del model  # and the weights in it
        if verify:
            content["verified"] = verified(transformer, path, calls, cuts, content["lossy"], size > SAVE_MEMORY_BYTES)
            onnx_digest.describe(path, content)
        # The weights first: a graph under its final name is whole.
        for made in sorted(scratch.iterdir(), key=lambda p: p == path):
            files.fsync(made)
            os.replace(made, output.parent / made.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return content


def describe(output: Path, content: dict) -> str:
    """Return what to tell whoever exported: the size, what may vary, how far from PyTorch and how fast."""
    size = sum(path.stat().st_size for path in (output, _data_of(output)) if path.exists())
    varying = ", ".join(content["dynamic"]) or "nothing"
    lines = [
        f"{output}: {len(content['layers'])} quantized layers, {size / 1e6:.2f} MB, opset {content['opset']}; may vary: {varying}"
    ]
    if (found := content.get("verified")) is not None:
        lines.append(
            f"output differs from PyTorch's by {found['rel_rmse']:.1e} (rel_rmse), any part on PyTorch's own values by at most"
            f" {found['parts_rel_rmse']:.1e}; rounding ties alone move PyTorch's own output by {found['ties']:.1e}"
        )
        lines.append(
            f"a call takes {found['milliseconds']:.1f} ms in ONNX Runtime {found['onnxruntime']},"
            f" {found['milliseconds_torch']:.1f} ms in PyTorch; threads: {found['threads']}"
        )
    return "\n".join(lines)


def _check(folder: Path, output: Path, storage: str, target: str, verify: bool) -> None:
    if storage not in STORAGES:
        raise ValueError(f"storage {storage!r} is unknown; use {' or '.join(STORAGES)}")
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is unknown; use {', '.join(TARGETS)}")
    if output.suffix != ".onnx":
        raise ValueError(f"--output {output} must end in .onnx")
    for path in (output, _data_of(output)):
        if path.exists():
            raise ValueError(f"{path} exists; remove it or choose another output")
    if not folder.is_dir():
        raise files.CheckpointError(f"{folder} is no folder; give the folder that quantdit calibrate wrote")
    require_packages()
    if verify and target == VNNI and saturates():
        raise ValueError(
            f"target {target} is for CPUs with VNNI, {NO_VNNI}, so that the graph cannot be verified here;"
            " export it on a machine that has it, or with --no-verify"
        )


def require_packages() -> None:
    """Refuse at once what the tracer would refuse much later.

    Raises:
        ImportError: the packages of quantdit's extra onnx are missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"exporting to ONNX needs more packages; run: {install('onnx')}") from error


def _data_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


def graph_of(
    transformer: nn.Module, arguments: dict[str, object], storage: str = "packed", target: str = "cpu", narrow: bool = True
):
    """Return `(onnx_ir.Model, metadata, where each layer lies)` of a quantized transformer, for calls of these arguments.

    Weights stay where they are until the model is saved. `narrow`: dense weights are stored in 16 bits where that loses nothing.

    Raises:
        ValueError: the transformer cannot be traced, its activations are wider on some steps, or it has 8-bit attention.
    """
    import onnx_ir as ir

    from quantdit.exporters import onnx_cleaning
    from quantdit.exporters.onnx_layers import Translation, emit_layer
    from quantdit.exporters.onnx_nbits import DOMAIN

    layers = checkpoint.quant_layers(transformer)
    _check_edges(layers)
    if getattr(transformer, "attention_specs", None):
        raise ValueError(
            "graphs of ONNX have no 8-bit attention; calibrate without --attention (the recipe's [[attention]]), or export --to"
            " dense"
        )
    adapter = adapter_for(transformer)
    example, shapes = _dynamic(transformer, adapter, arguments)
    with _opaque(layers), _without_hooks(transformer):
        program = _traced(transformer, example, shapes)
    model: ir.Model = program.model
    graph = model.graph
    onnx_cleaning.fold(model, large=not narrow)
    onnx_cleaning.expand_masks(graph)
    names = {name.replace(".", "_"): name for name, value in leaves(arguments) if isinstance(value, Tensor)}
    for value in graph.inputs:
        value.name = names[value.name or ""]
    onnx_cleaning.name_dimensions(graph, _dimension_names(transformer, adapter))
    own = (*transformer.named_parameters(), *transformer.named_buffers())
    onnx_cleaning.name_nodes(graph, {name for name, _ in own})
    if narrow:
        onnx_cleaning.narrow_weights(graph)
    shared = Translation(storage, target, bucket=_bucket(graph, transformer, layers))
    ends: dict[str, tuple[ir.Value, ir.Value]] = {}
    for node in list(graph):
        if node.op_type != LAYER:
            continue
        name = node.attributes["layer"].as_string()
        x = node.inputs[0]
        assert x is not None  # a layer has an input
        nodes, output = emit_layer(shared, name, layers[name], x)
        ends.setdefault(name, (x, output))
        graph.insert_before(node, nodes.made)
        output.shape, output.type = node.outputs[0].shape, node.outputs[0].type
        ir.convenience.replace_all_uses_with(node.outputs, [output], replace_graph_outputs=True)
        graph.remove(node, safe=True)
    for initializer in shared.initializers.values():
        graph.register_initializer(initializer)
    if any(node.domain == DOMAIN for node in graph):
        graph.opset_imports[DOMAIN] = 1
    onnx_cleaning.finish(model, "sample")
    used = {value.name for value in graph.inputs}
    content = {
        "class": type(transformer).__name__,
        "quantdit": version("quantdit"),
        "opset": OPSET,
        "storage": storage,
        "target": target,
        "lossy": shared.lossy,
        "dynamic": sorted({str(d) for v in graph.inputs for d in v.shape or () if not isinstance(d, int)}),
        "dynamic_note": _dynamic_note(transformer),
        "constants": {name: value for name, value in leaves(arguments) if not isinstance(value, Tensor)},
        "unused": sorted(set(names.values()) - used),
        "layers": {name: f"{layer.spec.format} {layer.layer_spec.activation}" for name, layer in layers.items()},
    }
    return model, content, {name: Cut(x.name or "", y.name or "") for name, (x, y) in ends.items()}


def _check_edges(layers: Mapping[str, QuantLinear]) -> None:
    """Refuse activations that are wider on some steps: a graph has one product for each layer."""
    for name, layer in layers.items():
        if layer.layer_spec.activation.edge_bits:
            raise ValueError(
                f"layer {name} has activations {layer.layer_spec.activation}, and an ONNX graph has one width for all steps;"
                " calibrate with edge_steps = 0, or export --to dense"
            )


def _dynamic_note(transformer: nn.Module) -> str:
    free = DYNAMIC.get(type(transformer).__name__, ())
    return f"of a {type(transformer).__name__} {' and '.join(free) if free else 'nothing'} may vary, the other sizes are fixed"


def _dynamic(transformer: nn.Module, adapter: Adapter, arguments: dict[str, object]) -> tuple[dict, dict]:
    """Return the arguments to trace with, and the dimensions of each that may vary, in the same nesting."""
    specs = _dimension_names(transformer, adapter)
    config = transformer.config
    patch = getattr(config, "patch_size", 1)
    patches: dict[str, int] = (
        {"height": patch, "width": patch}
        if isinstance(patch, int)
        else dict(zip(("frames", "height", "width"), patch, strict=True))
    )
    dims: dict[str, object] = {}

    def dim(name: str):
        if name not in dims:
            step = patches.get(name, 1)
            # torch solves for the number of patches, so that is the free variable.
            free_one = torch.export.Dim(name if step == 1 else f"{name}_patches", min=1)
            dims[name] = free_one if step == 1 else step * free_one
        return dims[name]

    def doubled(path: KeyPath, value: object) -> object:
        if not isinstance(value, Tensor) or specs.get(name_of(path), {}).get(0) != "batch" or len(value) != 1:
            return value
        return torch.cat([value, value])  # a size of one would be taken for fixed

    def varying(path: KeyPath, value: object) -> dict[int, object] | None:
        if not isinstance(value, Tensor):
            return None
        return {i: dim(n) for i, n in specs.get(name_of(path), {}).items() if value.shape[i] > 1}

    example = tree_map_with_path(doubled, arguments)
    return example, tree_map_with_path(varying, example)


@contextmanager
def _opaque(layers: Mapping[str, QuantLinear]) -> Iterator[None]:
    """Let each layer be one operator of its name while the body runs."""

    def forward(name: str, layer: QuantLinear):
        return lambda input: torch.ops.quantdit_onnx.layer(input, name, layer.out_features)

    for name, layer in layers.items():
        layer.forward = forward(name, layer)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


@contextmanager
def _without_hooks(transformer: nn.Module) -> Iterator[None]:
    """Leave out what runs before a call: telling layers the timestep's bucket reads its value, which a tracer has none of."""
    hooks = transformer._forward_pre_hooks
    transformer._forward_pre_hooks = type(hooks)()
    try:
        yield
    finally:
        transformer._forward_pre_hooks = hooks


def _traced(transformer: nn.Module, arguments: dict, shapes: dict):
    """Trace; raises ValueError with the tracer's own reason."""
    from torch.onnx.errors import OnnxExporterError

    from quantdit.exporters.onnx_cleaning import translations

    dynamic = {**shapes, "return_dict": None} if any(leaf is not None for leaf in tree_leaves(shapes)) else None
    try:
        with warnings.catch_warnings(), _quiet_logs(), redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                transformer,
                (),
                kwargs={**arguments, "return_dict": False},
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                dynamic_shapes=dynamic,
                custom_translation_table=translations(LAYER),
            )
            assert program is not None  # without a path to save to
            return program
    except (OnnxExporterError, RuntimeError) as error:
        cause = error.__cause__ or error
        reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise ValueError(
            f"{type(transformer).__name__} cannot be traced to ONNX by torch {torch.__version__}: {reason}"
        ) from error


def _dimension_names(transformer: nn.Module, adapter: Adapter) -> dict[str, dict[int, str]]:
    """Return the names of the dimensions that may vary, by input and place."""
    free = DYNAMIC.get(type(transformer).__name__, ())
    return {spec.name: {i: n for i, n in enumerate(spec.shape) if isinstance(n, str) and n in free} for spec in adapter.inputs}


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """Keep the tracer's notes about packages that nobody asked for off the terminal."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _bucket(graph, transformer: nn.Module, layers: Mapping[str, QuantLinear]):
    """Return the timestep bucket of a call as an int64 scalar (timesteps.bucket_of), None if no layer asks for it."""
    import numpy as np
    import onnx_ir as ir

    from quantdit.exporters.onnx_nodes import Nodes

    if not any(layer.layer_spec.activation.buckets for layer in layers.values()):
        return None
    shared: dict = {}
    nodes = Nodes("timestep_bucket", shared)
    edges = np.array(transformer.timestep_edges, np.float64)
    name = time_argument(transformer)
    time = next((value for value in graph.inputs if value.name == name), None)
    if time is None:
        bucket = nodes.constant("bucket", np.array(len(edges) - 1, np.int64))
    else:
        wide = nodes.op("Cast", [time], to=ir.DataType.DOUBLE)
        noisiest = nodes.op("ReduceMin" if times_rise(transformer) else "ReduceMax", [wide], keepdims=0)
        # The bucket is the number of edges that the time does not reach; what reaches none belongs to the last one.
        short = "Greater" if edges[-1] > edges[0] else "Less"
        missed = nodes.op(short, [noisiest, nodes.constant("edges", edges[:-1])])
        bucket = nodes.op("ReduceSum", [nodes.op("Cast", [missed], to=ir.DataType.INT64)], keepdims=0)
    if nodes.made:
        graph.insert_before(next(iter(graph)), nodes.made)
    for value in shared.values():
        value.name = f"timestep_bucket.{value.name}"
        graph.register_initializer(value)
    return bucket


def save(model, path: Path, content: dict) -> int:
    """Write a model with its metadata; returns the bytes of its weights."""
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    ir.save(model, path, external_data=_data_of(path).name if size > SINGLE_FILE_BYTES else None)
    onnx_digest.describe(path, content)
    return size
