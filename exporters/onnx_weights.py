"""Stored weights as ONNX: initializers of packed codes, and the few nodes that decode them to the 8-bit matrix `I` at load time.

A graph holds the weight transposed, `[in, out]`, as MatMul wants it. For integer products it is int8 `I`, which ONNX Runtime
multiplies fastest, where that is exact on every CPU, else uint8 `I + 128` of zero point 128: before AVX512-VNNI, x86 adds two
neighbouring products of `uint8 x int8` in 16 bits and saturates (kernels/cpu.py). For float products it is float32. Codes are
packed in element order, element 0 in the low bits, in planes of 4, 2 and 1 bits as formats/packing.py cuts them, so that one
Gather from a table of 256 rows unpacks a byte. ONNX Runtime folds all of it when a session is created.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from quantdit.exporters.onnx_nodes import Nodes
from quantdit.formats import FORMATS, QSpec, trellis
from quantdit.formats.packing import PLANES
from quantdit.tensors.layer_spec import decodes_to_fp8
from quantdit.tensors.qtensor import QTensor

ZERO_POINT = 128
PARTS = {"uint8": ir.DataType.UINT8, "int8": ir.DataType.INT8, "float32": ir.DataType.FLOAT}

Read = Callable[[], QTensor]


def is_packed(spec: QSpec, storage: str) -> bool:
    """Return whether a weight is stored as packed codes: asked for, narrower than 8 bits, and whole bytes of every plane."""
    f = FORMATS[spec.format]
    codes = spec.out_features * spec.in_features // f.dim
    narrow = f.code_bits < 8 * f.dim
    return storage == "packed" and narrow and all(codes * p % 8 == 0 for p in PLANES[f.code_bits])


def emit_integers(nodes: Nodes, spec: QSpec, read: Read, element: str, storage: str) -> ir.Value:
    """Return the value of `I^T` `[in, out]`.

    Args:
        nodes: where nodes and initializers go.
        spec: of the weight.
        read: returns the QTensor; called once for each initializer, when the file is written.
        element: `int8` (`I`) or `uint8` (`I + 128`), not for formats that decode to e4m3; `float32` (`I`).
        storage: `packed` or `int8` (decoded in the file: a byte a weight).
    """
    f = FORMATS[spec.format]
    shape = (spec.in_features, spec.out_features)
    if not is_packed(spec, storage):
        return _dense(nodes, spec, read, element)
    if f.dim == 1 and spec.codebook_rows == 1 and not _affine(spec) and not f.state_bits and len(PLANES[f.code_bits]) == 1:
        # One Gather unpacks and decodes: the table of a byte holds the levels of its codes.
        book = _level_of(_book(read())[0], element)
        table = nodes.constant("levels_of_byte", book[_codes_of_byte(f.code_bits)])
        return nodes.reshape(nodes.op("Gather", [table, _bytes(nodes, spec, read, 0, "data")]), shape)
    if f.sign_split:
        return _signed(nodes, spec, read, element)
    codes = _codes(nodes, spec, read)
    if f.state_bits:
        return _trellis(nodes, spec, codes, element)
    if _affine(spec):
        return _affine_integers(nodes, spec, read, codes, element)
    if f.dim > 1:
        book = nodes.constant("codebook", _level_of(_book(read()), element))  # [L, d]
        vectors = nodes.op("Gather", [book, codes])  # [in / d, out, d]
        return nodes.reshape(nodes.op("Transpose", [vectors], perm=[0, 2, 1]), shape)
    if spec.codebook_rows == 1:
        return nodes.op("Gather", [nodes.constant("levels", _level_of(_book(read())[0], element)), codes])
    levels = nodes.lazy("levels", PARTS[element], (f.code_count, spec.out_features), lambda: _level_of(_book(read()).T, element))
    return nodes.op("GatherElements", [levels, codes], axis=0)


def _book(q: QTensor) -> Tensor:
    assert q.codebook is not None  # of formats that decode by one
    return q.codebook


def steps_of(q: QTensor) -> tuple[Tensor, Tensor]:
    """Return multiplier and offset of each group, `[out, groups]`."""
    assert q.multiplier is not None and q.offset is not None  # of affine formats
    return q.multiplier, q.offset


def _affine(spec: QSpec) -> bool:
    return FORMATS[spec.format].kind == "affine"


def _dense(nodes: Nodes, spec: QSpec, read: Read, element: str) -> ir.Value:
    shape = (spec.in_features, spec.out_features)
    if element != "float32":
        return nodes.lazy("weight", PARTS[element], shape, lambda: _integers(read().decode8().T, element))
    stored = ir.DataType.FLOAT8E4M3FN if decodes_to_fp8(spec.format) else ir.DataType.INT8
    weight = nodes.lazy("weight", stored, shape, lambda: as_array(read().decode8().T))
    return nodes.op("Cast", [weight], to=ir.DataType.FLOAT)


def _signed(nodes: Nodes, spec: QSpec, read: Read, element: str) -> ir.Value:
    """Return `I^T` of magnitudes, the first plane of the codes, and signs, the second."""
    f = FORMATS[spec.format]
    vectors = (spec.in_features // f.dim, spec.out_features, f.dim)
    bits = _codes_of_byte(PLANES[f.code_bits][1])[..., None] >> np.arange(f.dim) & 1
    book = nodes.constant("codebook", _book(read()).numpy().astype(np.int32))
    magnitudes = nodes.reshape(nodes.op("Gather", [book, _bytes(nodes, spec, read, 0, "data")]), vectors)
    table = nodes.constant("signs_of_byte", (1 - 2 * bits).astype(np.int32))
    signs = nodes.reshape(nodes.op("Gather", [table, _bytes(nodes, spec, read, 1, "signs")]), vectors)
    integers = nodes.op("Mul", [magnitudes, signs])
    if element == "uint8":
        integers = nodes.op("Add", [integers, nodes.constant("zero_point", np.array(ZERO_POINT, dtype=np.int32))])
    flat = nodes.reshape(nodes.op("Transpose", [integers], perm=[0, 2, 1]), (spec.in_features, spec.out_features))
    return nodes.op("Cast", [flat], to=PARTS[element])


def _trellis(nodes: Nodes, spec: QSpec, codes: ir.Value, element: str) -> ir.Value:
    """Return `I^T` of codes `[in, out]`: shifts are products and quotients, and the outputs before come by their index."""
    f = FORMATS[spec.format]
    states = None
    for j in range(-(-f.state_bits // f.code_bits)):
        before = codes
        if j:
            index = (np.arange(spec.out_features) - j) % spec.out_features
            before = nodes.op("Gather", [codes, nodes.constant("outputs_before", index)], axis=1)
        shift = f.state_bits - f.code_bits * (j + 1)
        factor = nodes.constant("power_of_two", np.array(2 ** abs(shift), dtype=np.int32))
        part = nodes.op("Mul" if shift >= 0 else "Div", [before, factor])
        states = part if states is None else nodes.op("Add", [states, part])
    return nodes.op(
        "Gather", [nodes.constant("trellis", _level_of(trellis.codebook(f.state_bits, f.code_bits), element)), states]
    )


def _codes(nodes: Nodes, spec: QSpec, read: Read) -> ir.Value:
    """Return the codes `[in / d, out]` int32."""
    f = FORMATS[spec.format]
    shape = (spec.in_features // f.dim, spec.out_features)
    total = None
    low = 0
    for number, p in enumerate(PLANES[f.code_bits]):
        codes = _bytes(nodes, spec, read, number, "data" if p == f.code_bits else f"data{p}")
        if p < 8:
            table = nodes.constant("codes_of_byte", (_codes_of_byte(p) << low).astype(np.int32))
            codes = nodes.op("Gather", [table, codes])
        codes = nodes.reshape(codes, shape)
        total = codes if total is None else nodes.op("Add", [total, codes])
        low += p
    assert total is not None  # every format has a plane
    return total


def _bytes(nodes: Nodes, spec: QSpec, read: Read, number: int, name: str) -> ir.Value:
    """Return the bytes of one plane of codes as int32, which Gather takes; `name` of their initializer."""
    f = FORMATS[spec.format]
    planes = PLANES[f.code_bits]
    low, p = sum(planes[:number]), planes[number]
    count = spec.in_features // f.dim * spec.out_features * p // 8

    def packed() -> np.ndarray:
        codes = f.unpack(f, read().data, spec.in_features // f.dim).T.contiguous()
        plane = ((codes >> low) & (2**p - 1)).reshape(-1, 8 // p)
        return as_array(torch.stack([plane[:, i] << (p * i) for i in range(8 // p)]).sum(dim=0).to(torch.uint8))

    return nodes.op("Cast", [nodes.lazy(name, ir.DataType.UINT8, (count,), packed)], to=ir.DataType.INT32)


def _affine_integers(nodes: Nodes, spec: QSpec, read: Read, codes: ir.Value, element: str) -> ir.Value:
    groups = (spec.groups, 1, spec.out_features)
    kind = "uint8" if element == "uint8" else "int8"
    multiplier = nodes.lazy("multiplier", ir.DataType.UINT8, groups, lambda: as_array(steps_of(read())[0].T.reshape(groups)))
    offset = nodes.lazy("offset", PARTS[kind], groups, lambda: _integers(steps_of(read())[1].T.reshape(groups), kind))
    codes = nodes.reshape(codes, (spec.groups, spec.group_size, spec.out_features))
    steps = nodes.op("Mul", [codes, nodes.op("Cast", [multiplier], to=ir.DataType.INT32)])
    integers = nodes.op("Add", [steps, nodes.op("Cast", [offset], to=ir.DataType.INT32)])
    flat = nodes.reshape(integers, (spec.in_features, spec.out_features))
    return nodes.op("Cast", [flat], to=PARTS[element])


def _codes_of_byte(p: int) -> np.ndarray:
    """Return the codes of p bits that each byte holds, `[256, 8 / p]`."""
    return (np.arange(256)[:, None] >> (p * np.arange(8 // p))) & (2**p - 1)


def _level_of(codebook: Tensor, element: str) -> np.ndarray:
    return np.ascontiguousarray(codebook.float().numpy()) if element == "float32" else _integers(codebook, element)


def _integers(integers: Tensor, element: str) -> np.ndarray:
    """Return int8 integers as they are, or as uint8, 128 higher."""
    integers = integers.contiguous()
    return as_array(integers.view(torch.uint8) ^ ZERO_POINT if element == "uint8" else integers)


def as_array(tensor: Tensor) -> np.ndarray:
    """Return a tensor as a contiguous array; bfloat16 and e4m3 as ml_dtypes'."""
    import ml_dtypes

    named = {torch.bfloat16: (torch.uint16, ml_dtypes.bfloat16), torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn)}
    tensor = tensor.detach().contiguous()
    if tensor.dtype in named:
        bits, dtype = named[tensor.dtype]
        return tensor.view(bits).numpy().view(dtype)
    return tensor.numpy()
