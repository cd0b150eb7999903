"""One QuantLinear as ONNX nodes: transform -> quantize tokens -> integer product -> scale + bias, number for number.

Every code is computed as kernels/ops.py defines it and every integer sum is exact, so a graph differs from PyTorch only where
float32 arithmetic before a rounding falls on the other side of a tie. All operators are ONNX's own. The product is written as
DequantizeLinear of both operands and MatMul, which ONNX Runtime fuses to one integer product (MatMulIntegerToFloat).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from quantdit.exporters.onnx_nbits import TARGET_BLOCKS, block_of, emit_nbits
from quantdit.exporters.onnx_nodes import Nodes
from quantdit.exporters.onnx_session import VNNI
from quantdit.exporters.onnx_weights import ZERO_POINT, as_array, emit_integers
from quantdit.formats.float8 import LARGEST
from quantdit.kernels.cpu import unsafe_rows
from quantdit.layers.quant_linear import QuantLinear
from quantdit.tensors import hadamard
from quantdit.tensors.layer_spec import ActivationSpec, decodes_to_fp8
from quantdit.tensors.transform import NAMES

SPLIT_FROM = 128  # below, ONNX Runtime loses more to many small products than it saves
SMALLEST = float(np.finfo(np.float32).tiny)  # in place of the scale of a token of zeros


@dataclass
class Translation:
    """What the layers of one graph share.

    Attributes:
        storage: `packed` or `int8`.
        target: `cpu` (integer products of our codes, exact on every CPU), `cpu-vnni` (the same, weights always int8), `cpu-nbits`
            or `cuda` (onnx_nbits.py).
        lossy: layers whose activations something else than our codes stands for.
        bucket: the int64 scalar of the timestep bucket; None if no layer has static scales.
        initializers: constants by content, weights by name.
        calls: of each layer so far.
        prepared: tokens that were quantized already: layers with the same input and transform (q, k, v) quantize it once.
    """

    storage: str
    target: str = "cpu"
    lossy: list[str] = field(default_factory=list)
    bucket: ir.Value | None = None
    initializers: dict[tuple, ir.Value] = field(default_factory=dict)
    prepared: dict[tuple, tuple[ir.Value, ir.Value | None]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)


def emit_layer(shared: Translation, name: str, layer: QuantLinear, x: ir.Value) -> tuple[Nodes, ir.Value]:
    """Return the nodes of the layer at path `name`, and the value of its output `[..., out]`; x is `[..., in]` float32."""
    nodes = Nodes(name, shared.initializers, shared.calls[name])
    shared.calls[name] += 1
    spec = layer.layer_spec
    assert x.shape is not None  # the tracer knows the rank of every value
    rank = len(x.shape)
    key = (id(x), _tokens_digest(layer))
    tokens = shared.prepared.get((*key, "transformed")) or (_transformed(nodes, layer, x, rank), None)
    shared.prepared[(*key, "transformed")] = tokens
    moved = tokens[0]
    narrow = shared.target in TARGET_BLOCKS and block_of(spec.weight, shared.target) > 0
    own = spec.activation == ActivationSpec(8)  # what MatMulNBits does to its tokens comes closest to that
    if narrow and (own or spec.activation.bits == 16):
        level = 4 if own and shared.target != "cuda" else 0
        if own or shared.target == "cuda":
            shared.lossy.append(name)
        y = emit_nbits(nodes, spec.weight, lambda: layer.qtensor, moved, rank, shared.target, shared.storage, level)
    elif spec.activation.bits == 16:
        weight = emit_integers(nodes, spec.weight, lambda: layer.qtensor, "float32", shared.storage)
        y = nodes.op("MatMul", [moved, nodes.op("Mul", [weight, _scale(nodes, layer)])])
    else:
        # Codes that meet e4m3 weights stay float: there is no such integer product.
        floats = decodes_to_fp8(spec.weight.format)
        quantized = shared.prepared.get((*key, floats)) or _quantized(nodes, shared, layer, moved, rank, floats)
        shared.prepared[(*key, floats)] = quantized
        codes, token_scale = quantized
        y = nodes.op("Mul", [_product(nodes, shared, layer, codes, floats), token_scale])
    if layer.bias is not None:
        y = nodes.op("Add", [y, _narrow(nodes, "bias", layer.bias)])
    if spec.rank:
        thin = nodes.op("MatMul", [moved, _narrow(nodes, "down", layer.branch["down"].T)])
        y = nodes.op("Add", [y, nodes.op("MatMul", [thin, _narrow(nodes, "up", layer.branch["up"].T)])])
    return nodes, y


def _product(nodes: Nodes, shared: Translation, layer: QuantLinear, codes: ir.Value, floats: bool) -> ir.Value:
    spec = layer.layer_spec.weight
    if floats:
        weight = emit_integers(nodes, spec, lambda: layer.qtensor, "float32", shared.storage)
        return nodes.op("Mul", [nodes.op("MatMul", [codes, weight]), _scale(nodes, layer)])
    element = "int8" if shared.target == VNNI or not unsafe_rows(layer.decoded()).any() else "uint8"
    weight = emit_integers(nodes, spec, lambda: layer.qtensor, element, shared.storage)
    # A node of its own for every consumer: ONNX Runtime fuses no DequantizeLinear that two products share.
    left = nodes.op("DequantizeLinear", [codes, nodes.scalar(1), _zero_point(nodes)])
    operands = [weight, _scale(nodes, layer)]
    if element == "uint8":
        operands.append(nodes.constant("zero_points", np.full(spec.out_features, ZERO_POINT, np.uint8)))
    right = nodes.op("DequantizeLinear", operands, axis=1)
    return nodes.op("MatMul", [left, right])


def _scale(nodes: Nodes, layer: QuantLinear) -> ir.Value:
    return nodes.lazy("scale", ir.DataType.FLOAT, (layer.out_features,), lambda: as_array(layer.qtensor.scale))


def _narrow(nodes: Nodes, field: str, tensor: Tensor) -> ir.Value:
    """Return a tensor as float32, stored in its own dtype, or as bfloat16 where that loses nothing."""
    stored = tensor.detach().bfloat16() if torch.equal(tensor.bfloat16().float(), tensor.float()) else tensor.detach()
    kind = {torch.bfloat16: ir.DataType.BFLOAT16, torch.float16: ir.DataType.FLOAT16, torch.float32: ir.DataType.FLOAT}
    value = nodes.lazy(field, kind[stored.dtype], stored.shape, lambda: as_array(stored))
    return value if stored.dtype == torch.float32 else nodes.op("Cast", [value], to=ir.DataType.FLOAT)


def _zero_point(nodes: Nodes) -> ir.Value:
    return nodes.constant("zero_point", np.array(ZERO_POINT, np.uint8))


def _tokens_digest(layer: QuantLinear) -> str:
    """Return what makes two layers with one input quantize it alike."""
    spec = layer.layer_spec
    tensors = {n: t for n, t in layer.tensors().items() if n in (*NAMES, "static_scale")}
    found = hashlib.sha256(repr((spec.activation, spec.rotation, spec.block)).encode())
    for n, tensor in tensors.items():
        found.update(n.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def _transformed(nodes: Nodes, layer: QuantLinear, x: ir.Value, rank: int) -> ir.Value:
    """Return `x T` (transform.py)."""
    t = layer.transform
    if t.premultiplier is not None:
        x = nodes.op("Mul", [x, nodes.constant("premultiplier", t.premultiplier.float().numpy())])
    kept = [0] * (rank - 1)
    if t.rotation1 is not None:
        assert t.permutation is not None and t.rotation2 is not None  # the three go together
        x = _block_product(nodes, x, t.rotation1, "rotation1", rank)
        x = nodes.op("Gather", [x, nodes.constant("permutation", t.permutation.numpy())], axis=-1)
        return _block_product(nodes, x, t.rotation2, "rotation2", rank)
    if t.block > 1:
        return _hadamard_product(nodes, x, layer.in_features, t.block, kept)
    return x


def _hadamard_product(nodes: Nodes, x: ir.Value, width: int, block: int, kept: list[int]) -> ir.Value:
    """Return x times H in blocks: H_b, or `H_ac = H_a kron H_c` from both sides, X -> H_a X H_c: at 128 a fifth of the work."""
    if block < SPLIT_FROM:
        blocks = nodes.reshape(x, [*kept, width // block, block])
        rotated = nodes.op("MatMul", [blocks, nodes.constant("hadamard", hadamard.hadamard(block).numpy())])
    else:
        outer = 1 << (block.bit_length() - 1) // 2
        left, right = hadamard.hadamard(outer), hadamard.hadamard(block // outer)
        blocks = nodes.reshape(x, [*kept, width // block, outer, block // outer])
        inner = nodes.op("MatMul", [blocks, nodes.constant("hadamard", right.numpy())])
        rotated = nodes.op("MatMul", [nodes.constant("hadamard_outer", left.numpy()), inner])
    return nodes.reshape(rotated, [*kept, width])


def _block_product(nodes: Nodes, x: ir.Value, blocks: Tensor, field: str, rank: int) -> ir.Value:
    """Return x times a block-diagonal matrix `[n, b, b]`: as n products of all tokens, not as one a token."""
    count, block, _ = blocks.shape
    kept = [0] * (rank - 1)
    swap = [*range(rank - 2), rank - 1, rank - 2, rank]
    parts = nodes.op("Transpose", [nodes.reshape(x, [*kept, count, block])], perm=swap)
    matrix = nodes.lazy(field, ir.DataType.FLOAT, blocks.shape, lambda: as_array(blocks))
    turned = nodes.op("Transpose", [nodes.op("MatMul", [parts, matrix])], perm=swap)
    return nodes.reshape(turned, [*kept, count * block])


def _quantized(
    nodes: Nodes, shared: Translation, layer: QuantLinear, x: ir.Value, rank: int, floats: bool
) -> tuple[ir.Value, ir.Value]:
    """Return the codes of x, uint8 `code + 128` or float32, and the scale of each token `[..., 1]` (ops.quantize_tokens)."""
    a = layer.layer_spec.activation
    if a.format == "fp8":
        scale = _absmax_scale(nodes, x, LARGEST)
        codes = nodes.op("Clip", [_on_grid(nodes, x, scale), nodes.scalar(-LARGEST), nodes.scalar(LARGEST)])
        codes = nodes.op("Cast", [codes], to=ir.DataType.FLOAT8E4M3FN)
        return nodes.op("Cast", [codes], to=ir.DataType.FLOAT), scale
    top = 2**a.bits - 1 if a.format == "affine" else 2 ** (a.bits - 1) - 1
    if a.group_size:
        scale = _token_scale(nodes, shared, layer, x, 127)
        codes = _grouped_codes(nodes, a, _on_grid(nodes, x, scale), top, rank, layer.in_features)
    elif a.format == "affine":
        codes, scale = _affine_codes(nodes, x, top)
    else:
        scale = _token_scale(nodes, shared, layer, x, top)
        codes = _on_grid(nodes, x, scale)
        if a.buckets:
            codes = nodes.op("Clip", [codes, nodes.scalar(-top), nodes.scalar(top)])
    if floats:
        return nodes.op("Round", [codes]), scale
    return nodes.op("QuantizeLinear", [codes, nodes.scalar(1), _zero_point(nodes)]), scale


def _token_scale(nodes: Nodes, shared: Translation, layer: QuantLinear, x: ir.Value, top: int) -> ir.Value:
    if not layer.layer_spec.activation.buckets:
        return _absmax_scale(nodes, x, top)
    scales = nodes.constant("static_scale", layer.tensors()["static_scale"].numpy())
    return nodes.op("Gather", [scales, shared.bucket])  # a scalar


def _absmax_scale(nodes: Nodes, x: ir.Value, top: float) -> ir.Value:
    # Two passes that only read cost less than one that writes the absolute values.
    low, high = _reduce(nodes, "ReduceMin", x), _reduce(nodes, "ReduceMax", x)
    return nodes.op("Div", [nodes.op("Max", [high, nodes.op("Neg", [low])]), nodes.scalar(top)])


def _reduce(nodes: Nodes, kind: str, x: ir.Value) -> ir.Value:
    return nodes.op(kind, [x, nodes.constant("axes", np.array([-1], np.int64))], keepdims=1)


def _on_grid(nodes: Nodes, x: ir.Value, scale: ir.Value) -> ir.Value:
    return nodes.op("Div", [x, nodes.op("Max", [scale, nodes.scalar(SMALLEST)])])


def _affine_codes(nodes: Nodes, x: ir.Value, top: int) -> tuple[ir.Value, ir.Value]:
    """Return `code + offset` of codes 0..top of a whole token, and the token's scale."""
    low, high = _reduce(nodes, "ReduceMin", x), _reduce(nodes, "ReduceMax", x)
    range_scale = nodes.op("Div", [nodes.op("Sub", [high, low]), nodes.scalar(top)])
    outermost = nodes.op("Max", [high, nodes.op("Neg", [low])])
    scale = nodes.op("Max", [range_scale, nodes.op("Div", [outermost, nodes.scalar(127)])])
    safe = nodes.op("Max", [scale, nodes.scalar(SMALLEST)])
    one = nodes.scalar(1)
    offset = _offset(nodes, nodes.op("Div", [low, safe]), nodes.op("Div", [high, safe]), one, top)
    y = nodes.op("Div", [x, safe])
    steps = nodes.op("Round", [nodes.op("Sub", [y, offset])])
    codes = nodes.op("Clip", [steps, nodes.scalar(0), nodes.scalar(top)])
    return nodes.op("Add", [codes, offset]), scale


def _grouped_codes(nodes: Nodes, a: ActivationSpec, y: ir.Value, top: int, rank: int, width: int) -> ir.Value:
    """Return `code * multiplier` (`+ offset`) of y in units of the token's int8 grid, each group with the better multiplier."""
    kept = [0] * (rank - 1)
    y = nodes.op("Clip", [y, nodes.scalar(-127), nodes.scalar(127)])
    y = nodes.reshape(y, [*kept, width // a.group_size, a.group_size])
    ends = None  # least and largest of each group of affine codes
    if a.format == "affine":
        ends = low, high = _reduce(nodes, "ReduceMin", y), _reduce(nodes, "ReduceMax", y)
        step = nodes.op("Div", [nodes.op("Sub", [high, low]), nodes.scalar(top)])
    else:
        step = nodes.op("Div", [_reduce(nodes, "ReduceMax", nodes.op("Abs", [y])), nodes.scalar(top)])

    def rounded(kind: str) -> tuple[ir.Value, ir.Value]:
        """Return y rounded with the multiplier above (Ceil) or below (Floor) the step, and each group's error."""
        multiplier = nodes.op("Max", [nodes.op(kind, [step]), nodes.scalar(1)])
        if ends is not None:
            offset = _offset(nodes, *ends, multiplier, top)
            steps = nodes.op("Round", [nodes.op("Div", [nodes.op("Sub", [y, offset]), multiplier])])
            codes = nodes.op("Clip", [steps, nodes.scalar(0), nodes.scalar(top)])
            values = nodes.op("Add", [nodes.op("Mul", [codes, multiplier]), offset])
        else:
            steps = nodes.op("Round", [nodes.op("Div", [y, multiplier])])
            codes = nodes.op("Clip", [steps, nodes.scalar(-top), nodes.scalar(top)])
            values = nodes.op("Mul", [codes, multiplier])
        values = nodes.op("Clip", [values, nodes.scalar(-127 if ends is None else -128), nodes.scalar(127)])
        apart = nodes.op("Sub", [values, y])
        return values, _reduce(nodes, "ReduceSum", nodes.op("Mul", [apart, apart]))

    (wide, wide_error), (fine, fine_error) = rounded("Ceil"), rounded("Floor")
    codes = nodes.op("Where", [nodes.op("Less", [fine_error, wide_error]), fine, wide])
    return nodes.reshape(codes, [*kept, width])


def _offset(nodes: Nodes, low: ir.Value, high: ir.Value, multiplier: ir.Value, top: int) -> ir.Value:
    reach = nodes.op("Mul", [multiplier, nodes.scalar(top)])
    middle = nodes.op("Div", [nodes.op("Sub", [nodes.op("Add", [low, high]), reach]), nodes.scalar(2)])
    centred = nodes.op("Max", [nodes.op("Round", [middle]), nodes.scalar(-128)])
    return nodes.op("Min", [centred, nodes.op("Sub", [nodes.scalar(127), reach])])
