"""What the tracer leaves behind, put right: operators it does not know, readable names, narrow weights."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"
PAIR = "quantdit.pair"
LARGE = 2**30
GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
NARROW_FROM = 1024  # numbers; smaller constants stay float32


def translations(layer: str) -> dict:
    """Return the translation table of the tracer: our opaque layer, and two operators that it translates badly."""
    import onnx
    import torch
    from onnxscript import opset23, values
    from onnxscript.function_libs.torch_lib.ops.core import aten_slice_scatter

    # The stubs of both have no constants, numbers or values of a trace as inputs.
    op: Any = opset23
    scatter: Any = aten_slice_scatter
    kind = onnx.defs.OpSchema
    schema = kind(
        layer,
        "quantdit",
        1,
        inputs=[kind.FormalParameter("x", "T")],
        outputs=[kind.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[kind.Attribute("layer", kind.AttrType.STRING)],
    )
    opaque = values.Op(values.Opset("quantdit", 1), layer, schema)

    def onnx_layer(x, layer: str, out_features: int):
        return opaque(x, layer=layer)

    def squeeze(x, dim: int):
        # torch leaves a dimension that is not 1 alone, ONNX refuses it (PixArt's mask).
        size = x.shape[dim]
        return op.Squeeze(x, op.Constant(value_ints=[dim])) if size == 1 else op.Identity(x)

    def slice_scatter(x, src, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1):
        # Rotary positions write every second entry: two values side by side, where the tracer transposes all and scatters.
        width, first = x.shape[dim], start or 0
        every_second = (
            dim in (-1, len(x.shape) - 1) and step == 2 and first in (0, 1) and isinstance(width, int) and width % 2 == 0
        )
        if not every_second or (end is not None and end < width):
            return scatter(x, src, dim=dim, start=start, end=end, step=step)
        new = op.Unsqueeze(src, op.Constant(value_ints=[-1]))
        reshaped = x.producer()
        paired = reshaped.inputs[0].producer() if reshaped is not None and reshaped.op_type == "Reshape" else None
        if paired is not None and paired.op_type == "Concat" and PAIR in paired.metadata_props:
            kept = paired.inputs[1 - first]  # the other half was written just before
        else:
            halves = op.Reshape(x, op.Constant(value_ints=[*[0] * (len(x.shape) - 1), width // 2, 2]))
            kept = op.Slice(halves, *(op.Constant(value_ints=[n]) for n in (1 - first, 2 - first, -1)))
        pair = op.Concat(*((new, kept) if first == 0 else (kept, new)), axis=-1)
        pair.producer().metadata_props[PAIR] = ""
        return op.Reshape(pair, op.Constant(value_ints=[*[0] * (len(x.shape) - 1), width]))

    return {
        torch.ops.quantdit_onnx.layer.default: onnx_layer,
        torch.ops.aten.squeeze.dim: squeeze,
        torch.ops.aten.slice_scatter.default: slice_scatter,
    }


def fold(model: ir.Model, large: bool = False) -> None:
    """Compute what is constant (transposed weights too if `large`), share what is computed twice, drop what nobody needs."""
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    common.DeduplicateInitializersPass()(model)
    limits = {"input_size_limit": LARGE, "output_size_limit": LARGE} if large else {}
    # Nodes of several outputs (Split) are computed, left as they are and complained about on the terminal, unless refused here.
    fold_constants(model, onnx_shape_inference=False, should_fold=lambda n: False if len(n.outputs) > 1 else None, **limits)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)


def expand_masks(graph: ir.Graph) -> None:
    """Give attention masks a row for each query: ONNX Runtime's Attention does not broadcast a mask of one row (PixArt's)."""
    import numpy as np

    one = ir.Value(name="one", const_value=ir.tensor(np.array([1], np.int64), name="one"))
    one.shape, one.type = ir.Shape([1]), ir.TensorType(ir.DataType.INT64)
    for node in list(graph):
        mask = node.inputs[3] if node.op_type == "Attention" and len(node.inputs) > 3 else None
        if mask is None:
            continue
        rows = ir.node("Shape", [node.inputs[0]], {"start": 2, "end": 3})
        shape = ir.node("Concat", [one, one, rows.outputs[0], one], {"axis": 0})
        expanded = ir.node("Expand", [mask, shape.outputs[0]])
        for made in (rows, shape, expanded):  # named where the attention is
            made.metadata_props.update(node.metadata_props)
        graph.insert_before(node, [rows, shape, expanded])
        node.replace_input_with(3, expanded.outputs[0])
        graph.initializers.setdefault("one", one)


def name_dimensions(graph: ir.Graph, names: dict[str, dict[int, str]]) -> None:
    """Give the dimensions of inputs that vary the names they go by, and forget the tracer's in between."""
    for value in graph.inputs:
        known = names.get(value.name or "", {})
        value.shape = ir.Shape([d if isinstance(d, int) else known[i] for i, d in enumerate(value.shape or ())])
    for value in (*graph.outputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else None for d in value.shape])


def name_nodes(graph: ir.Graph, known: Container[str]) -> None:
    """Name every node by the path of the module it came from and its operator, every value and constant by its node.

    Initializers whose names are `known`, the model's own tensors, keep them.
    """
    paths: dict[ir.Value, str] = {}
    taken: dict[str, int] = {}
    computed = [name for name in graph.initializers if name not in known]
    for node in graph:
        scopes = node.metadata_props.get(SCOPES)
        inherited = next((paths[value] for value in node.inputs if value in paths), "")
        path = _module(scopes) if scopes else inherited
        for output in node.outputs:
            paths[output] = path
        name = f"{path}/{node.op_type}" if path else node.op_type
        number = taken.get(name, 0)
        taken[name] = number + 1
        # A tilde: layers name their own nodes path/Op_1.
        node.name = f"{name}~{number}" if number else name
        for i, output in enumerate(node.outputs):
            if not output.is_graph_output():
                output.name = node.name if len(node.outputs) == 1 else f"{node.name}:{i}"
        node.metadata_props.clear()
        for output in node.outputs:
            output.metadata_props.clear()
    for number, name in enumerate(computed):
        value = graph.initializers[name]
        user = next((use.node.name for use in value.uses()), "unused")
        value.name = f"{user}.constant{number}"


def _module(scopes: str) -> str:
    """Return the path of the innermost module: the scopes are a list of paths that ends in the name of the operation."""
    import ast

    found = [path for path in ast.literal_eval(scopes)[:-1] if not path.startswith("_")]  # torch's own notes
    return found[-1] if found else ""


def finish(model: ir.Model, output: str) -> None:
    """Name the output, drop what nobody needs and what only the tracer knew."""
    from onnx_ir.passes import common

    graph = model.graph
    graph.outputs[0].name = output
    for extra in list(graph.outputs)[1:]:
        graph.outputs.remove(extra)
    common.RemoveUnusedNodesPass()(model)
    graph.opset_imports.pop("quantdit", None)
    graph.metadata_props.clear()
    model.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.name = "transformer"
    model.producer_name = "quantdit"
    model.producer_version = None
    graph.sort()
    weights_first(graph)


def weights_first(graph: ir.Graph) -> None:
    """Put the nodes that decode weights, which depend on nothing that is given, in front of all others.

    Of what a node needs ONNX Runtime runs first what comes later in the graph. Were a layer's weights decoded next to the layer,
    they would be before what leads to the layer is computed: all layers' weights at once, four times the memory of the file.
    """
    given = set(graph.inputs)
    decoding = []
    for node in graph:
        if given.isdisjoint(node.inputs) and not any(a.type in GRAPHS for a in node.attributes.values()):
            decoding.append(node)
        else:
            given.update(node.outputs)
    if others := [node for node in graph if not given.isdisjoint(node.outputs)]:
        graph.remove(decoding)
        graph.insert_before(others[0], decoding)


def narrow_weights(graph: ir.Graph) -> None:
    """Store float32 constants that float16 or bfloat16 hold exactly as those, as the checkpoint does, and cast them back."""
    import ml_dtypes
    import numpy as np

    first = next(iter(graph))
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.LazyTensor) or value.dtype != ir.DataType.FLOAT or tensor.size < NARROW_FROM:
            continue
        array = tensor.numpy()
        shape = ir.Shape(array.shape)
        for dtype, kind in ((np.float16, ir.DataType.FLOAT16), (ml_dtypes.bfloat16, ir.DataType.BFLOAT16)):
            with np.errstate(over="ignore"):
                narrow: Any = array.astype(dtype)
            if not np.array_equal(narrow.astype(np.float32), array):
                continue
            held = ir.Tensor(narrow, dtype=kind, name=name)
            stored = ir.Value(name=name, shape=shape, type=ir.TensorType(kind), const_value=held)
            cast = ir.node("Cast", [stored], {"to": int(ir.DataType.FLOAT)}, name=f"{name}/Cast")
            cast.outputs[0].name = f"{name}/Cast"
            cast.outputs[0].shape, cast.outputs[0].type = shape, ir.TensorType(ir.DataType.FLOAT)
            graph.insert_before(first, cast)
            ir.convenience.replace_all_uses_with([value], [cast.outputs[0]])
            graph.initializers.pop(name)
            graph.register_initializer(stored)
            break
