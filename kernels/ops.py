"""Every op of a quantized layer: the function that defines it, which faster kernels only agree with, and its outputs' shapes.

Letters: m, n, k = tokens, out, in. The ops live in `torch.ops.quantdit`; a QTensor, an Epilogue or a Transform is passed to them
as `*flat(part)` (schema.py):

    rotate(x, premultiplier, block)                            (x * premultiplier) H, block-Hadamard (transform.py)
    quantize_tokens(x, bits, group_size, affine, static_scale) codes of each token on its int8 grid, and the grid's scales
    quantize_tokens_fp8(x)                                     the same in e4m3
    rotate_quantize(x, premultiplier, block, format, ...)      rotate, then quantize_tokens or quantize_tokens_fp8, and x R down^T
    decode8(weight)                                            any stored weight -> its decoded matrix I [n, k]
    gemm_w8a8(codes, decoded, scale, after)                    codes I^T, then the epilogue
    gemm_packed_a8(codes, weight, after)                       gemm_w8a8 of decode8, of any stored format
    gemm_w8a16(x, decoded, scale, bias)                        x (scale I)^T + bias
    gemm_packed_a16(x, weight, after)                          x I^T, then the epilogue, of any stored format
    straight_through(y, x, bias, weight, up, down, transform)  y, whose gradient is that of the dequantized layer
    input_gradient(gradient, weight, up, down, transform)      the gradient [m, k] of that layer's inputs

On CUDA the ops go to triton_ops/dispatch.py. Rotated float16 tokens, and their product by `down`, are float32
(transform.kept_in).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantdit.formats import FORMATS
from quantdit.formats.float8 import LARGEST
from quantdit.kernels import cpu
from quantdit.kernels.schema import Op, Output, flat
from quantdit.tensors.qtensor import QTensor
from quantdit.tensors.row_chunks import in_row_chunks
from quantdit.tensors.transform import Transform, apply, kept_in, weight_back

LIBRARY = torch.library.Library("quantdit", "DEF")
OPS: dict[str, Op] = {}


def define(outputs: Callable[..., list[Output]]) -> Callable[[Callable], Callable]:
    """Define the op that a function `NAME_reference` is the definition of; `outputs` as `Op` takes it."""

    def register(reference: Callable) -> Callable:
        name = reference.__name__.removesuffix("_reference")
        OPS[name] = Op(LIBRARY, name, reference, outputs)
        return reference

    return register


@dataclass(frozen=True)
class Epilogue:
    """What follows the sums of a product, in float32: `token_scale[m] scale[n] sums[m, n] + bias[n] + low_rank_hidden up^T`.

    Attributes:
        dtype: of the result.
        token_scale: `[m]` float32, of quantized activations.
        bias: `[n]` float.
        low_rank_hidden: `[m, r]` float, the transformed tokens times `down^T`; with `up` only.
        up: `[n, r]` float.
    """

    dtype: torch.dtype
    token_scale: Tensor | None = None
    bias: Tensor | None = None
    low_rank_hidden: Tensor | None = None
    up: Tensor | None = None


def _rotate_outputs(x: Tensor, premultiplier: Tensor, block: int) -> list[Output]:
    width = x.shape[-1]
    torch._check(width == premultiplier.shape[0], lambda: f"rotate: x has width {width}, premultiplier {premultiplier.shape[0]}")
    torch._check(width % block == 0, lambda: f"rotate: block {block} does not divide the width {width}")
    return [(x.shape, kept_in(x.dtype))]


# x :: [..., k] float, premultiplier :: [k] int8 or f32  ->  [..., k] like x, float32 for float16
@define(_rotate_outputs)
def rotate_reference(x: Tensor, premultiplier: Tensor, block: int) -> Tensor:
    return apply(Transform(premultiplier, block), x)


def _code_outputs(x: Tensor, bits: int, group_size: int, affine: bool, static_scale: Tensor | None) -> list[Output]:
    _check_tokens("quantize_tokens", x, bits, group_size)
    if static_scale is not None:
        torch._check(not affine, lambda: "quantize_tokens: static scales are for symmetric codes")
        got = tuple(static_scale.shape)
        torch._check(got == (1,), lambda: f"quantize_tokens: static_scale must be [1], got {got}")
    return [(x.shape, torch.int8), (x.shape[:1], torch.float32)]


def _check_tokens(op: str, x: Tensor, bits: int, group_size: int) -> None:
    torch._check(x.dim() == 2, lambda: f"{op}: x must be [m, k], got {tuple(x.shape)}")
    torch._check(2 <= bits <= 8, lambda: f"{op}: bits must be 2..8, got {bits}")
    divides = group_size == 0 or (group_size > 0 and x.shape[1] % group_size == 0)
    torch._check(divides, lambda: f"{op}: group size {group_size} does not divide the width {x.shape[1]}")


# x :: [m, k] float  ->  I :: [m, k] int8, scale :: [m] f32;  x ~= scale[:, None] * I
@define(_code_outputs)
def quantize_tokens_reference(
    x: Tensor, bits: int, group_size: int = 0, affine: bool = False, static_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Define `quantize_tokens`: the decode contract for activations, one float scale a token and everything else integers.

    * symmetric: `I` = code in -L..L, `L = 2^(bits-1) - 1`, scale = absmax / L, or `static_scale` `[1]` for every token, which
      clips what is larger;
    * affine: `I = code + offset`, codes 0..2^bits - 1, the offset an integer of the token;
    * group_size > 0: scale = absmax / 127; each group of inputs has an integer multiplier (and an offset if affine),
      `I = code * multiplier + offset`, so that small groups of a token get finer steps without a float scale of their own.

    Ties go to even. A token of zeros has scale 0.
    """
    codes, scale = in_row_chunks(lambda rows: _codes(rows, bits, group_size, affine, static_scale), x)
    return codes, scale


def _codes(x: Tensor, bits: int, group_size: int, affine: bool, static_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x.float().contiguous()
    top = 2**bits - 1 if affine else 2 ** (bits - 1) - 1
    if group_size:
        scale = _per_token(x.abs().amax(dim=1) / 127, static_scale)
        y = (x / _not_zero(scale)[:, None]).clamp_(-127, 127).unflatten(1, (-1, group_size))
        codes = _affine_groups(y, top) if affine else _symmetric_groups(y, top)
        return codes.flatten(1).to(torch.int8), scale
    low, high = x.amin(dim=1), x.amax(dim=1)
    if affine:
        # At least absmax / 127, so that the offset of a token far from zero is still an int8.
        scale = torch.maximum((high - low) / top, torch.maximum(high, -low) / 127)
        y = x / _not_zero(scale)[:, None]
        offset = _offset(low / _not_zero(scale), high / _not_zero(scale), torch.ones_like(low), top)[:, None]
        return ((y - offset).round_().clamp_(0, top) + offset).to(torch.int8), scale
    # Two reductions and an in-place rounding: temporaries the size of x cost more than arithmetic here.
    scale = _per_token(torch.maximum(high, -low) / top, static_scale)
    codes = (x / _not_zero(scale)[:, None]).round_()
    return (codes if static_scale is None else codes.clamp_(-top, top)).to(torch.int8), scale


def _symmetric_groups(y: Tensor, top: int) -> Tensor:
    """Return `code * multiplier` of y `[m, groups, g]` in units of the token's int8 grid."""

    def rounded(multiplier: Tensor) -> Tensor:
        # A multiplier rounded up may carry the outermost code past the grid, whose end is then the nearer value.
        return ((y / multiplier).round().clamp(-top, top) * multiplier).clamp(-127, 127)

    return _nearer(y, y.abs().amax(dim=2, keepdim=True) / top, rounded)


def _affine_groups(y: Tensor, top: int) -> Tensor:
    low, high = y.amin(dim=2, keepdim=True), y.amax(dim=2, keepdim=True)

    def rounded(multiplier: Tensor) -> Tensor:
        offset = _offset(low, high, multiplier, top)
        # As above; three bits need it, whose multipliers reach past 255 / top.
        return (((y - offset) / multiplier).round().clamp(0, top) * multiplier + offset).clamp(-128, 127)

    return _nearer(y, (high - low) / top, rounded)


def _nearer(y: Tensor, step: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Return y rounded with the integer multiplier just above or below the step, in each group whichever is nearer to y.

    The larger covers the group, the smaller clips its ends for finer steps between: 0.8 dB less error at 4 bits.
    """
    wide, fine = rounded(step.ceil().clamp_min(1)), rounded(step.floor().clamp_min(1))
    better = (fine - y).square().sum(dim=2, keepdim=True) < (wide - y).square().sum(dim=2, keepdim=True)
    return torch.where(better, fine, wide)


def _offset(low: Tensor, high: Tensor, multiplier: Tensor, top: int) -> Tensor:
    """Return the integer that centres `top` steps on low..high and keeps `offset + top * multiplier` in the int8 range."""
    centred = ((low + high - top * multiplier) / 2).round()
    return torch.minimum(centred.clamp_min(-128), 127 - top * multiplier)


def _per_token(scale: Tensor, static_scale: Tensor | None) -> Tensor:
    return scale if static_scale is None else static_scale.float().expand_as(scale).clone()


def _not_zero(scale: Tensor) -> Tensor:
    """Return 1 for a token of zeros: dividing by it keeps NaN out."""
    return scale.masked_fill(scale == 0, 1.0)


def _fp8_code_outputs(x: Tensor) -> list[Output]:
    _check_tokens("quantize_tokens_fp8", x, 8, 0)
    return [(x.shape, torch.float8_e4m3fn), (x.shape[:1], torch.float32)]


# x :: [m, k] float  ->  codes :: [m, k] e4m3, scale :: [m] f32;  x ~= scale[:, None] * codes
@define(_fp8_code_outputs)
def quantize_tokens_fp8_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = in_row_chunks(_fp8_codes, x)
    return codes, scale


def _fp8_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float().contiguous()
    scale = x.abs().amax(dim=1) / LARGEST
    return (x / _not_zero(scale)[:, None]).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def _rotated_code_outputs(
    x: Tensor,
    premultiplier: Tensor,
    block: int,
    format: str,
    bits: int,
    group_size: int,
    static_scale: Tensor | None,
    down: Tensor | None,
) -> list[Output]:
    torch._check(format in ("int", "affine", "fp8"), lambda: f"rotate_quantize: unknown activation format {format!r}")
    _check_tokens("rotate_quantize", x, bits, group_size)
    [(_, dtype)] = _rotate_outputs(x, premultiplier, block)
    affine = format == "affine"
    coded = _fp8_code_outputs(x) if format == "fp8" else _code_outputs(x, bits, group_size, affine, static_scale)
    if down is not None:
        got, k = tuple(down.shape), x.shape[1]
        torch._check(len(got) == 2 and got[1] == k, lambda: f"rotate_quantize: down must be [r, {k}], got {got}")
    return [*coded, ((x.shape[0], 0 if down is None else down.shape[0]), dtype)]


# x :: [m, k] float, premultiplier :: [k], down :: [r, k]
#   ->  codes :: [m, k] int8 or e4m3, scale :: [m] f32, low_rank_hidden :: [m, r] like what `rotate` returns
@define(_rotated_code_outputs)
def rotate_quantize_reference(
    x: Tensor,
    premultiplier: Tensor,
    block: int,
    format: str,
    bits: int,
    group_size: int = 0,
    static_scale: Tensor | None = None,
    down: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Define `rotate_quantize`: `rotate`, then codes of a format of ActivationSpec: `int`, `affine` or `fp8`.

    The third is what a low-rank branch begins with: rotated tokens times `down^T` in their dtype; without `down` it is `[m, 0]`.
    """

    def coded(rotated: Tensor) -> tuple[Tensor, Tensor]:
        if format == "fp8":
            return quantize_tokens_fp8_reference(rotated)
        return quantize_tokens_reference(rotated, bits, group_size, format == "affine", static_scale)

    if down is None:  # no rotated token outlives its codes
        codes, scale = in_row_chunks(lambda rows: coded(rotate_reference(rows, premultiplier, block)), x)
        return codes, scale, project(x, None)
    rotated = rotate_reference(x, premultiplier, block)
    return *coded(rotated), project(rotated, down)


def project(tokens: Tensor, down: Tensor | None) -> Tensor:
    """Return tokens `[m, k]` times down^T, `[m, r]` in `kept_in` their dtype; `[m, 0]` without down."""
    dtype = kept_in(tokens.dtype)
    if down is None:
        return tokens.new_empty(tokens.shape[0], 0, dtype=dtype)
    return torch.nn.functional.linear(tokens.to(dtype), down.to(dtype))


# stored weight  ->  I :: [n, k] int8 or e4m3
@define(lambda weight: [((weight.spec.out_features, weight.spec.in_features), FORMATS[weight.spec.format].decoded_dtype)])
def decode8_reference(weight: QTensor) -> Tensor:
    decoded = weight.decode8()
    return decoded.clone() if decoded is weight.data else decoded  # an op's output may not alias its input


def _product_outputs(codes: Tensor, decoded: Tensor, scale: Tensor, after: Epilogue) -> list[Output]:
    _check_gemm("gemm_w8a8", codes, decoded, scale)
    return _coded_outputs("gemm_w8a8", codes, decoded.shape, after)


def _packed_a8_outputs(codes: Tensor, weight: QTensor, after: Epilogue) -> list[Output]:
    return _coded_outputs("gemm_packed_a8", codes, (weight.spec.out_features, weight.spec.in_features), after)


def _packed_a16_outputs(x: Tensor, weight: QTensor, after: Epilogue) -> list[Output]:
    return _after_outputs("gemm_packed_a16", x, (weight.spec.out_features, weight.spec.in_features), after)


def _coded_outputs(op: str, codes: Tensor, size: Sequence[int], after: Epilogue) -> list[Output]:
    known = codes.dtype in (torch.int8, torch.float8_e4m3fn)
    torch._check(known, lambda: f"{op}: codes must be int8 or e4m3, got {codes.dtype}")
    one_each = after.token_scale is not None and after.token_scale.shape == codes.shape[:1]
    torch._check(one_each, lambda: f"{op}: one token_scale per token is needed")
    return _after_outputs(op, codes, size, after)


def _after_outputs(op: str, x: Tensor, size: Sequence[int], after: Epilogue) -> list[Output]:
    n, k = size
    torch._check(x.dim() == 2, lambda: f"{op}: operands must be matrices")
    torch._check(x.shape[1] == k, lambda: f"{op}: k differs, {x.shape[1]} and {k}")
    m, hidden, up = x.shape[0], after.low_rank_hidden, after.up
    torch._check((hidden is None) == (up is None), lambda: f"{op}: low_rank_hidden and up come together")
    if hidden is not None and up is not None:
        fits = hidden.shape == (m, up.shape[1]) and up.shape[0] == n
        torch._check(fits, lambda: f"{op}: low_rank_hidden must be [m, r] and up [n, r]")
    return [((m, n), after.dtype)]


def _check_gemm(op: str, x: Tensor, decoded: Tensor, scale: Tensor) -> None:
    torch._check(x.dim() == 2 and decoded.dim() == 2, lambda: f"{op}: operands must be matrices")
    torch._check(x.shape[1] == decoded.shape[1], lambda: f"{op}: k differs, {x.shape[1]} and {decoded.shape[1]}")
    torch._check(scale.shape == decoded.shape[:1], lambda: f"{op}: one scale per output channel is needed")


# codes :: [m, k], decoded :: [n, k] (int8 or e4m3), scale :: [n] f32  ->  [m, n] dtype
@define(_product_outputs)
def gemm_w8a8_reference(codes: Tensor, decoded: Tensor, scale: Tensor, after: Epilogue) -> Tensor:
    """Define `gemm_w8a8`: float64 holds every sum of up to 2^39 int8 products exactly."""
    product = codes.float().double() @ decoded.float().double().T
    return finished(product.float() * scale, after)


def _gemm_w8a8_cpu(codes: Tensor, decoded: Tensor, scale: Tensor, after: Epilogue) -> Tensor:
    if decoded.dtype == codes.dtype == torch.int8:
        if after.low_rank_hidden is not None:
            return finished(cpu.scaled_int8_product(codes, decoded, scale), after)

        def some(rows: Tensor, token_scale: Tensor | None) -> tuple[Tensor]:
            return (finished(cpu.scaled_int8_product(rows, decoded, scale), replace(after, token_scale=token_scale)),)

        # Integer sums are exact, however many rows there are.
        return in_row_chunks(some, codes, after.token_scale, width=len(decoded))[0]
    return finished(torch.nn.functional.linear(codes.float(), decoded.float()) * scale, after)


OPS["gemm_w8a8"].implement(_gemm_w8a8_cpu, "CPU")


def finished(product: Tensor, after: Epilogue) -> Tensor:
    """Return what follows the product `[m, n]` float32, already times `scale`, which is overwritten."""
    if after.token_scale is not None:
        product *= after.token_scale[:, None]
    if after.bias is not None:
        product += after.bias.float()
    if after.low_rank_hidden is not None and after.up is not None:
        product += after.low_rank_hidden.float() @ after.up.float().T
    return product.to(after.dtype)


# as gemm_w8a8, the weight as it is stored
@define(_packed_a8_outputs)
def gemm_packed_a8_reference(codes: Tensor, weight: QTensor, after: Epilogue) -> Tensor:
    """Define `gemm_packed_a8`."""
    return gemm_w8a8_reference(codes, decode8_reference(weight), weight.scale, after)


# x :: [m, k] float, the weight as it is stored  ->  [m, n] dtype
@define(_packed_a16_outputs)
def gemm_packed_a16_reference(x: Tensor, weight: QTensor, after: Epilogue) -> Tensor:
    """Define `gemm_packed_a16`: integers times x in float32, scaled afterwards."""
    return finished(torch.nn.functional.linear(x.float(), weight.decode8().float()) * weight.scale, after)


def _dense_outputs(x: Tensor, decoded: Tensor, scale: Tensor) -> list[Output]:
    _check_gemm("gemm_w8a16", x, decoded, scale)
    return [((x.shape[0], decoded.shape[0]), x.dtype)]


# x :: [m, k] float, decoded :: [n, k] int8 or e4m3, scale :: [n] f32, bias :: [n]  ->  [m, n] like x
@define(_dense_outputs)
def gemm_w8a16_reference(x: Tensor, decoded: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    # The weight is scaled before the product: x I^T alone would overflow float16.
    dense = (decoded.float() * scale[:, None]).to(x.dtype)
    return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))


# y :: [m, n], x :: [m, k], bias :: [n], the parts of the layer that made y of x  ->  [m, n] like y
@define(lambda y: [(y.shape, y.dtype)])
def straight_through_reference(
    y: Tensor, x: Tensor, bias: Tensor | None, weight: QTensor, up: Tensor | None, down: Tensor | None, transform: Transform
) -> Tensor:
    """Return y. Its gradient with respect to x and bias is that of the dequantized layer, `input_gradient` and the sum of rows.

    So rounding and clipping count as the identity: an input beyond a static scale, or at the end of its codes, gets the gradient
    of one that was not clipped. The backward pass keeps no more than the layer's stored tensors, and decodes them again.
    """
    return y.clone(memory_format=torch.contiguous_format)


def _keep_layer(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, _, bias, *layer = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.others = [None if isinstance(a, Tensor) else a for a in layer]
    ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in layer))


def _straight_through_backward(ctx: Any, gradient: Tensor) -> tuple:
    layer = [other if tensor is None else tensor for tensor, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
    of_x = torch.ops.quantdit.input_gradient(gradient, *layer) if ctx.needs_input_grad[1] else None
    of_bias = gradient.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return None, of_x, of_bias, *(None for _ in layer)


torch.library.register_autograd("quantdit::straight_through", _straight_through_backward, setup_context=_keep_layer, lib=LIBRARY)


# gradient :: [m, n] float, the parts of a layer  ->  [m, k] like gradient
@define(lambda gradient, weight: [((gradient.shape[0], weight.spec.in_features), gradient.dtype)])
def input_gradient_reference(
    gradient: Tensor, weight: QTensor, up: Tensor | None, down: Tensor | None, transform: Transform
) -> Tensor:
    """Define `input_gradient`: `gradient W`, W `[n, k]` the dequantized weight in the inputs' space, with its low-rank branch."""
    wide = gradient.to(kept_in(gradient.dtype))
    decoded = torch.ops.quantdit.decode8(*flat(weight))
    of_tokens = wide @ (decoded.float() * weight.scale[:, None]).to(wide.dtype)
    if up is not None and down is not None:
        of_tokens = of_tokens + (wide @ up.to(wide.dtype)) @ down.to(wide.dtype)
    return weight_back(transform, of_tokens).to(gradient.dtype)
