"""A product as ONNX Runtime's own MatMulNBits, whose weights stay narrow in memory: for the targets cpu-nbits and cuda.

* `int4` in groups of 16 to 256 keeps 4 bits. The operator wants `scale (code - 8)`, ours is `scale (code multiplier + offset)`
  with an offset that need not be a multiple of the multiplier; what is left over is constant in a group, so it multiplies
  the sum of the group's inputs: a product `[..., groups] x [groups, out]` beside, a hundredth of the work. Nothing is rounded.
* Every other format with an int8 `I` goes as 8 bits, `scale I` with the scale repeated for each block.

On the CPU `accuracy_level 4` quantizes activations itself, to 8 bits for each token and block of inputs, finer than our 8 bits
a token, but not the same: such layers are marked lossy. CUDA multiplies in float16 whatever the level.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from torch import Tensor

from quantdit.exporters.onnx_nodes import Nodes
from quantdit.exporters.onnx_weights import as_array, emit_integers, steps_of
from quantdit.formats import QSpec
from quantdit.tensors.layer_spec import decodes_to_fp8
from quantdit.tensors.qtensor import QTensor

BLOCKS = (256, 128, 64, 32, 16)
TARGET_BLOCKS = {"cpu-nbits": (128, 64, 32, 16), "cuda": (32,)}  # of 8 bits; cuda: what its fused GEMM takes
MIDDLE = 8  # the zero point of 4 bits that MatMulNBits assumes
DOMAIN = "com.microsoft"

Read = Callable[[], QTensor]


def block_of(spec: QSpec, target: str) -> int:
    """Return the block size of a weight as MatMulNBits, 0 if it cannot be one."""
    if decodes_to_fp8(spec.format):
        return 0
    if _keeps_four_bits(spec, target):
        return spec.group_size
    return next((b for b in TARGET_BLOCKS[target] if spec.in_features % b == 0), 0)


def _keeps_four_bits(spec: QSpec, target: str) -> bool:
    return spec.format == "int4" and spec.group_size in BLOCKS and target == "cpu-nbits"


def emit_nbits(nodes: Nodes, spec: QSpec, read: Read, x: ir.Value, rank: int, target: str, storage: str, level: int) -> ir.Value:
    """Return `x (scale I)^T`, float32 like x of that rank; `level`: 0 multiplies floats, 4 quantizes tokens."""
    block = block_of(spec, target)
    blocks = (spec.out_features, spec.in_features // block)
    sizes = {"K": spec.in_features, "N": spec.out_features, "block_size": block, "accuracy_level": level}
    half = target == "cuda"
    tokens = nodes.op("Cast", [x], to=ir.DataType.FLOAT16) if half else x
    if _keeps_four_bits(spec, target):
        packed = nodes.lazy("data", ir.DataType.UINT8, (*blocks, block // 2), lambda: _nibbles(read(), block))
        scale = nodes.lazy("block_scale", ir.DataType.FLOAT, blocks, lambda: _block_scale(read()))
        y = nodes.op("MatMulNBits", [tokens, packed, scale], domain=DOMAIN, bits=4, **sizes)
        return nodes.op("Add", [y, _left_over(nodes, spec, read, x, rank)]) if bool(_leftovers(read()).any()) else y
    shifted = nodes.op("Transpose", [emit_integers(nodes, spec, read, "uint8", storage)], perm=[1, 0])
    packed = nodes.reshape(shifted, (*blocks, block))
    scale = nodes.lazy("scale", ir.DataType.FLOAT, (spec.out_features, 1), lambda: as_array(read().scale[:, None]))
    repeated = nodes.op("Expand", [scale, nodes.constant("shape", np.array(blocks, np.int64))])
    if half:
        repeated = nodes.op("Cast", [repeated], to=ir.DataType.FLOAT16)
    y = nodes.op("MatMulNBits", [tokens, packed, repeated], domain=DOMAIN, bits=8, **sizes)
    return nodes.op("Cast", [y], to=ir.DataType.FLOAT) if half else y


def _nibbles(q: QTensor, block: int) -> np.ndarray:
    from quantdit.formats import FORMATS

    f = FORMATS[q.spec.format]
    codes = f.unpack(f, q.data, q.spec.in_features).reshape(q.spec.out_features, -1, block // 2, 2)
    return as_array(codes[..., 0] | (codes[..., 1] << 4))


def _block_scale(q: QTensor) -> np.ndarray:
    return as_array(q.scale[:, None] * steps_of(q)[0].float())


def _leftovers(q: QTensor) -> Tensor:
    """Return `offset + 8 multiplier` `[out, groups]` int16: what `multiplier (code - 8)` lacks."""
    multiplier, offset = steps_of(q)
    return offset.short() + MIDDLE * multiplier.short()


def _left_over(nodes: Nodes, spec: QSpec, read: Read, x: ir.Value, rank: int) -> ir.Value:
    """Return what the offsets add: the sum of each group's inputs times what is left over of its offset."""
    rest = nodes.lazy("leftover", ir.DataType.INT16, (spec.groups, spec.out_features), lambda: as_array(_leftovers(read()).T))
    scale = nodes.lazy("scale", ir.DataType.FLOAT, (spec.out_features,), lambda: as_array(read().scale))
    matrix = nodes.op("Mul", [nodes.op("Cast", [rest], to=ir.DataType.FLOAT), scale])
    grouped = nodes.reshape(x, [*[0] * (rank - 1), spec.groups, spec.group_size])
    sums = nodes.op("ReduceSum", [grouped, nodes.constant("axes", np.array([-1], np.int64))], keepdims=0)
    return nodes.op("MatMul", [sums, matrix])
