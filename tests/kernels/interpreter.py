"""Repairs for Triton's CPU interpreter, and the inline PTX of our kernels run as text (checked with triton 3.6.0 and 3.9.0).

1. bfloat16 is kept as uint16 and then added and multiplied as integers: compute in float32, round to nearest even.
2. int8 products go through float64, which is exact and has BLAS.
3. float32 -> e4m3 loses the carry into the exponent (31.8 -> 16): cast by torch, saturating as the GPU does.
4. `tl.inline_asm_elementwise` is not implemented: a small emulator of 32-bit PTX instructions.
5. triton 3.6 with numpy 2.4 cannot make an index of a one-element array.

`install()` once, before the first launch; TRITON_INTERPRET=1 must be set before a kernel is decorated. `launched` collects the
names of the kernels that ran.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

launched: set[str] = set()
Handle = interpreter.TensorHandle
FP8 = {tl.float8e4nv: (torch.float8_e4m3fn, 448.0), tl.float8e5: (torch.float8_e5m2, 57344.0)}


def widened(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 bits as float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """Return float32 as bfloat16 bits, ties to even."""
    u = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = ((u + ((u >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
    return np.where((u & 0x7FFFFFFF) > 0x7F800000, ((u >> 16) | 0x40).astype(np.uint16), nearest)


def _bf16(handle: Handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _values(handle: Handle) -> np.ndarray:
    return widened(handle.data) if _bf16(handle) else handle.data


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    source = np.stack([(word >> np.uint32(8 * i)) & np.uint32(0xFF) for word in (a, b) for i in range(4)])
    out = np.zeros_like(a)
    for j in range(4):
        pick = (selector >> np.uint32(4 * j)) & np.uint32(0xF)
        byte = np.take_along_axis(source, (pick & 7)[None].astype(np.int64), 0)[0]
        sign = np.where(byte & 0x80, np.uint32(0xFF), np.uint32(0))
        out |= np.where(pick & 8, sign, byte).astype(np.uint32) << np.uint32(8 * j)
    return out


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    out = np.zeros_like(a)
    for i in range(8):
        if (table >> i) & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


PTX: dict[str, Callable[..., np.ndarray]] = {
    "mov.b32": lambda a: a.copy(),
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.b32": lambda a, b: a >> b,
    "add.u32": lambda a, b: a + b,
    "mul.lo.u32": lambda a, b: a * b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "prmt.b32": _prmt,
}


def run_ptx(text: str, outputs: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Run asm text on uint32 registers: `$0`.. are the outputs, after them the inputs, one array for each."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def value(operand: str) -> np.ndarray:
        if operand in registers:
            return registers[operand]
        return np.full(inputs[0].shape, int(operand, 0) & 0xFFFFFFFF, np.uint32)  # a ValueError: an undefined register

    for statement in text.replace("{", " ").replace("}", " ").split(";"):
        if not (statement := statement.strip()) or statement.startswith(".reg"):
            continue
        op, operands = statement.split(None, 1)
        target, *sources = (o.strip() for o in operands.split(","))
        if op == "lop3.b32":
            registers[target] = _lop3(*map(value, sources[:3]), int(sources[3], 0))
        else:
            registers[target] = PTX[op](*map(value, sources)).astype(np.uint32)
    return [registers[f"${i}"] for i in range(outputs)]


def _inline_asm(self, text: str, constraints: str, values: list, types: list, is_pure: bool, pack: int):
    """Pack along the last axis; a GPU packs in register order, which is the same for tiles whose last axis is contiguous."""
    outputs = sum(c.strip().startswith("=") for c in constraints.split(","))
    shape = np.broadcast_shapes(*[v.data.shape for v in values])
    registers: list[np.ndarray] = []
    for v in values:
        words = np.ascontiguousarray(np.broadcast_to(v.data, shape)).reshape(-1).view(np.uint32)
        words = words.reshape(-1, pack * v.data.dtype.itemsize // 4)
        registers += [np.ascontiguousarray(words[:, i]) for i in range(words.shape[1])]
    assert outputs + len(registers) == len(constraints.split(","))
    results = []
    produced = iter(run_ptx(text, outputs, registers))
    for t in types:
        dtype = interpreter._get_np_dtype(t)
        words = np.stack([next(produced) for _ in range(pack * dtype.itemsize // 4)], 1)
        results.append(Handle(np.ascontiguousarray(words).reshape(-1).view(dtype).reshape(shape), t.scalar))

    class Call:
        def get_result(self, i: int) -> Handle:
            return results[i]

    return Call()


def install() -> None:
    """Put the repairs in place."""
    builder = interpreter.InterpreterBuilder
    binary, unary, cast, fp_to_fp, dot = (
        builder.binary_op, builder.unary_op, builder.cast_impl, builder.create_fp_to_fp, builder.create_dot,
    )  # fmt: skip

    def binary_op(self, left, right, op):
        if not (_bf16(left) and _bf16(right)):
            return binary(self, left, right, op)
        result = op(_values(left), _values(right))
        return Handle(result, tl.int1) if result.dtype == np.bool_ else Handle(rounded(result), tl.bfloat16)

    def unary_op(self, value, op):
        return Handle(rounded(op(_values(value))), tl.bfloat16) if _bf16(value) else unary(self, value, op)

    def cast_impl(self, source, to):
        if source.dtype.scalar == to.scalar:
            return cast(self, source, to)
        if _bf16(source):
            wide = Handle(_values(source), tl.float32)
            return wide if to.scalar == tl.float32 else cast(self, wide, to)
        if to.scalar == tl.bfloat16:
            return Handle(rounded(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, to)

    def create_fp_to_fp(self, source, to, rounding):
        if to.scalar in FP8 and source.dtype.scalar in (tl.float32, tl.float16, tl.bfloat16):
            dtype, top = FP8[to.scalar]
            clipped = np.clip(np.ascontiguousarray(_values(source)).astype(np.float32), -top, top)
            return Handle(torch.from_numpy(clipped).to(dtype).view(torch.uint8).numpy(), to.scalar)
        if to.scalar == tl.bfloat16:
            wide = source if source.dtype.scalar == tl.float32 else fp_to_fp(self, source, tl.float32, rounding)
            return Handle(rounded(wide.data), tl.bfloat16)
        if _bf16(source):
            return fp_to_fp(self, Handle(_values(source), tl.float32), to, rounding)
        return fp_to_fp(self, source, to, rounding)

    def create_dot(self, a, b, d, precision, imprecise):
        if a.data.dtype == np.int8 and b.data.dtype == np.int8:
            product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(np.int64).astype(np.int32)
        elif _bf16(a) or _bf16(b) or a.data.dtype == np.float16:
            product = np.matmul(_values(a).astype(np.float32), _values(b).astype(np.float32))
        else:
            return dot(self, a, b, d, precision, imprecise)
        return Handle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    builder.binary_op, builder.unary_op, builder.cast_impl = binary_op, unary_op, cast_impl
    builder.create_fp_to_fp, builder.create_dot, builder.create_inline_asm = create_fp_to_fp, create_dot, _inline_asm
    if not hasattr(builder, "get_bf16"):
        builder.get_bf16 = lambda self, v: Handle(rounded(np.array([v], dtype=np.float32)), tl.bfloat16)
    _repair_index()
    _record_launches()


def _repair_index() -> None:
    original = interpreter._patch_lang_tensor
    if "squeeze" in inspect.getsource(original):
        return

    def index(self) -> int:
        return int(np.asarray(self.handle.data).reshape(-1)[0])

    def patched(tensor, *args, **kwargs):
        result = original(tensor, *args, **kwargs)
        scope = args[-1] if args else kwargs.get("scope")
        if scope is not None and hasattr(scope, "set_attr"):
            scope.set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index
        return result

    interpreter._patch_lang_tensor = patched


def _record_launches() -> None:
    call = interpreter.GridExecutor.__call__

    def recorded(self, *args, **kwargs):
        launched.add(self.fn.__name__)
        return call(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = recorded
