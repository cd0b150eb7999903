"""Every op of a quantized layer: schema, shapes (fake), and the reference that defines it. Faster kernels only agree with it.

Letters: m, n, k = tokens, out, in. The ops live in `torch.ops.quantdit`:

    rotate(x, premultiplier, block)                            (x * premultiplier) H, block-Hadamard (transform.py)
    quantize_tokens(x, bits, group_size, affine, static_scale) codes of each token on its int8 grid, and the grid's scales
    quantize_tokens_fp8(x)                                     the same in e4m3
    rotate_quantize(x, premultiplier, block, format, ...)      rotate, then quantize_tokens or quantize_tokens_fp8, and thin
    modulate_quantize(x, shift, modulation, eps, ...)          layer norm and AdaLN modulation, then rotate_quantize
    decode8(data, multiplier, offset, codebook, ...)           any stored weight -> I [n, k]
    gemm_w8a8(codes, token_scale, weight, scale, bias, dtype)  token_scale[m] scale[n] (codes I^T)[m, n] + bias
    gemm_w4a8(codes, token_scale, data, ..., scale, bias)      gemm_w8a8 of decode8, of any stored format
    gemm_w8a16(x, weight, scale, bias)                         x (scale I)^T + bias
    gemm_w4a16(x, data, ..., scale, bias)                      (x I^T) scale + bias, of any stored format
    straight_through(y, x, bias, data, ...)                    y, whose gradient is that of the dequantized layer
    input_gradient(gradient, data, ...)                        the gradient [m, k] of that layer's inputs

What may follow a product, in float32 (`thin` [m, r], `up` [n, r], `gate` [images, n], `residual` [m, n]):

    y -> residual + gate * activation(y + thin up^T)

On CUDA the ops go to triton_ops/dispatch.py, which is imported by the first call. Rotated float16 tokens, and `thin` of them, are
float32 (transform.kept_in).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from quantdit.formats import FORMATS, QSpec
from quantdit.formats.float8 import LARGEST
from quantdit.kernels import cpu
from quantdit.tensors import transform
from quantdit.tensors.transform import Transform

_library = torch.library.Library("quantdit", "DEF")
_library.define("rotate(Tensor x, Tensor premultiplier, int block) -> Tensor")
_library.define(
    "quantize_tokens(Tensor x, int bits, int group_size=0, bool affine=False, Tensor? static_scale=None) -> (Tensor, Tensor)"
)
_library.define("quantize_tokens_fp8(Tensor x) -> (Tensor, Tensor)")
_library.define(
    "rotate_quantize(Tensor x, Tensor premultiplier, int block, str format, int bits, int group_size=0,"
    " Tensor? static_scale=None, Tensor? down=None) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "modulate_quantize(Tensor x, Tensor shift, Tensor modulation, float eps, Tensor premultiplier, int block, str format,"
    " int bits, int group_size=0, Tensor? static_scale=None) -> (Tensor, Tensor)"
)
_STORED = "Tensor data, Tensor? multiplier, Tensor? offset, Tensor? codebook, str format, int group_size"
_AFTER = 'Tensor? thin=None, Tensor? up=None, str activation="none", Tensor? gate=None, Tensor? residual=None'
_library.define(
    "decode8(Tensor data, Tensor? multiplier, Tensor? offset, Tensor? codebook,"
    " str format, int in_features, int group_size) -> Tensor"
)
_library.define(
    "gemm_w8a8(Tensor codes, Tensor token_scale, Tensor weight, Tensor scale, Tensor? bias, ScalarType dtype,"
    f" {_AFTER}) -> Tensor"
)
_library.define(
    f"gemm_w4a8(Tensor codes, Tensor token_scale, {_STORED}, Tensor scale, Tensor? bias, ScalarType dtype, {_AFTER}) -> Tensor"
)
_library.define("gemm_w8a16(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor")
_library.define(f"gemm_w4a16(Tensor x, {_STORED}, Tensor scale, Tensor? bias, {_AFTER}) -> Tensor")
_LAYER = (
    f"{_STORED}, Tensor scale, Tensor? up, Tensor? down,"
    " Tensor? premultiplier, int block, Tensor? rotation1, Tensor? permutation, Tensor? rotation2"
)
_library.define(f"straight_through(Tensor y, Tensor x, Tensor? bias, {_LAYER}) -> Tensor")
_library.define(f"input_gradient(Tensor gradient, int in_features, {_LAYER}) -> Tensor")

_EVERYWHERE = "CompositeExplicitAutograd"


def _shapes(name: str) -> Callable[[Callable], Callable]:
    """Register the function that gives an op's output shapes and dtypes.

    torch calls it for fake tensors, and as soon as one argument is on the meta device. Its outputs are never written to, so with
    some arguments on the meta device and others in memory the op raises RuntimeError.
    """

    def register(shapes: Callable) -> Callable:
        names = tuple(inspect.signature(shapes).parameters)

        def checked(*args: object, **kwargs: object) -> object:
            given = {n: a for n, a in (*zip(names, args, strict=False), *kwargs.items()) if isinstance(a, Tensor)}
            away = [n for n, tensor in given.items() if tensor.device.type == "meta"]
            if away and len(away) < len(given):
                there = next(n for n in given if n not in away)
                raise RuntimeError(
                    f"quantdit::{name}: {' and '.join(away)} on the meta device, {there} in memory; the layer is not loaded whole"
                )
            return shapes(*args, **kwargs)

        torch.library.register_fake(f"quantdit::{name}", checked)
        return shapes

    return register


# x :: [..., k] float, premultiplier :: [k] int8 or f32  ->  [..., k] like x, float32 for float16
@torch.library.impl(_library, "rotate", _EVERYWHERE)
def rotate_reference(x: Tensor, premultiplier: Tensor, block: int) -> Tensor:
    check_rotate(x, premultiplier, block)
    return transform.apply(Transform(premultiplier, block), x)


@_shapes("rotate")
def _(x: Tensor, premultiplier: Tensor, block: int) -> Tensor:
    check_rotate(x, premultiplier, block)
    return torch.empty_like(x, dtype=transform.kept_in(x.dtype), memory_format=torch.contiguous_format)


# x :: [m, k] float  ->  I :: [m, k] int8, scale :: [m] f32;  x ~= scale[:, None] * I
@torch.library.impl(_library, "quantize_tokens", _EVERYWHERE)
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
    check_tokens("quantize_tokens", x, bits, group_size)
    check_static(static_scale, affine)
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


@_shapes("quantize_tokens")
def _(
    x: Tensor, bits: int, group_size: int = 0, affine: bool = False, static_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    check_tokens("quantize_tokens", x, bits, group_size)
    check_static(static_scale, affine)
    codes = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    return codes, x.new_empty(x.shape[0], dtype=torch.float32)


# x :: [m, k] float  ->  codes :: [m, k] e4m3, scale :: [m] f32;  x ~= scale[:, None] * codes
@torch.library.impl(_library, "quantize_tokens_fp8", _EVERYWHERE)
def quantize_tokens_fp8_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    check_tokens("quantize_tokens_fp8", x, 8, 0)
    x = x.float().contiguous()
    scale = x.abs().amax(dim=1) / LARGEST
    return (x / _not_zero(scale)[:, None]).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


@_shapes("quantize_tokens_fp8")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    check_tokens("quantize_tokens_fp8", x, 8, 0)
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    return codes, x.new_empty(x.shape[0], dtype=torch.float32)


# x :: [m, k] float, premultiplier :: [k], down :: [r, k]
#   ->  codes :: [m, k] int8 or e4m3, scale :: [m] f32, thin :: [m, r] like what `rotate` returns
@torch.library.impl(_library, "rotate_quantize", _EVERYWHERE)
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

    `thin` is what a low-rank branch begins with: rotated tokens times `down^T` in their dtype; without `down` it is `[m, 0]`.
    """
    check_rotate_quantize(x, premultiplier, block, format, bits, group_size)
    check_down(x, down)
    rotated = rotate_reference(x, premultiplier, block)
    thin = project(rotated, down)
    if format == "fp8":
        return *quantize_tokens_fp8_reference(rotated), thin
    return *quantize_tokens_reference(rotated, bits, group_size, format == "affine", static_scale), thin


def project(tokens: Tensor, down: Tensor | None) -> Tensor:
    """Return tokens `[m, k]` times down^T, `[m, r]` in `kept_in` their dtype; `[m, 0]` without down."""
    dtype = transform.kept_in(tokens.dtype)
    if down is None:
        return tokens.new_empty(tokens.shape[0], 0, dtype=dtype)
    return torch.nn.functional.linear(tokens.to(dtype), down.to(dtype))


@_shapes("rotate_quantize")
def _(
    x: Tensor,
    premultiplier: Tensor,
    block: int,
    format: str,
    bits: int,
    group_size: int = 0,
    static_scale: Tensor | None = None,
    down: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_rotate_quantize(x, premultiplier, block, format, bits, group_size)
    check_down(x, down)
    element = torch.float8_e4m3fn if format == "fp8" else torch.int8
    thin = x.new_empty(x.shape[0], 0 if down is None else down.shape[0], dtype=transform.kept_in(x.dtype))
    return x.new_empty(x.shape, dtype=element), x.new_empty(x.shape[0], dtype=torch.float32), thin


# x :: [m, k] float, shift, modulation :: [images, k]; m / images tokens of one image follow one another
@torch.library.impl(_library, "modulate_quantize", _EVERYWHERE)
def modulate_quantize_reference(
    x: Tensor,
    shift: Tensor,
    modulation: Tensor,
    eps: float,
    premultiplier: Tensor,
    block: int,
    format: str,
    bits: int,
    group_size: int = 0,
    static_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Define `modulate_quantize`: what AdaLN does before attention and feed-forward (DiT, arXiv 2212.09748), then the codes.

    `norm(x) (1 + modulation) + shift` in float32 with a layer norm without weights, rounded to x's dtype.
    """
    check_modulate(x, shift, modulation)
    normed = torch.nn.functional.layer_norm(x.float(), (x.shape[1],), eps=eps)
    tokens = x.shape[0] // shift.shape[0]
    y = normed * (1 + _of_tokens(modulation, tokens)) + _of_tokens(shift, tokens)
    return rotate_quantize_reference(y.to(x.dtype), premultiplier, block, format, bits, group_size, static_scale)[:2]


def _of_tokens(of_image: Tensor, tokens: int) -> Tensor:
    return of_image.float().repeat_interleave(tokens, dim=0)


@_shapes("modulate_quantize")
def _(
    x: Tensor,
    shift: Tensor,
    modulation: Tensor,
    eps: float,
    premultiplier: Tensor,
    block: int,
    format: str,
    bits: int,
    group_size: int = 0,
    static_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_modulate(x, shift, modulation)
    check_rotate_quantize(x, premultiplier, block, format, bits, group_size)
    element = torch.float8_e4m3fn if format == "fp8" else torch.int8
    return x.new_empty(x.shape, dtype=element), x.new_empty(x.shape[0], dtype=torch.float32)


# stored tensors of a QTensor  ->  I :: [n, k] int8 or e4m3
@torch.library.impl(_library, "decode8", _EVERYWHERE)
def decode8_reference(
    data: Tensor,
    multiplier: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor | None,
    format: str,
    in_features: int,
    group_size: int,
) -> Tensor:
    f = FORMATS[format]
    rows = codebook.shape[0] if codebook is not None and f.dim == 1 else 1
    tensors = {"data": data, "multiplier": multiplier, "offset": offset, "codebook": codebook}
    weight = f.decode8(f, QSpec(format, data.shape[0], in_features, group_size, rows), tensors)
    return weight.clone() if weight is data else weight  # an op's output may not alias its input


@_shapes("decode8")
def _(
    data: Tensor,
    multiplier: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor | None,
    format: str,
    in_features: int,
    group_size: int,
) -> Tensor:
    torch._check(format in FORMATS, lambda: f"decode8: unknown format {format!r}")
    fp8 = any(t is not None and t.dtype == torch.float8_e4m3fn for t in (data, codebook))
    element = torch.float8_e4m3fn if fp8 else torch.int8
    return data.new_empty((data.shape[0], in_features), dtype=element)


# codes :: [m, k], weight :: [n, k] (int8 or e4m3), token_scale :: [m] f32, scale :: [n] f32, bias :: [n]  ->  [m, n] dtype
@torch.library.impl(_library, "gemm_w8a8", _EVERYWHERE)
def gemm_w8a8_reference(
    codes: Tensor,
    token_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    thin: Tensor | None = None,
    up: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Define `gemm_w8a8`: float64 holds every sum of up to 2^39 int8 products exactly."""
    check_codes(codes, token_scale, weight, scale)
    check_after(codes, weight.shape[0], thin, up, activation, gate, residual)
    product = codes.float().double() @ weight.float().double().T
    return after_product(product.float() * scale, token_scale, bias, dtype, thin, up, activation, gate, residual)


@torch.library.impl(_library, "gemm_w8a8", "CPU")
def _gemm_w8a8_cpu(
    codes: Tensor,
    token_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    thin: Tensor | None = None,
    up: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    check_codes(codes, token_scale, weight, scale)
    check_after(codes, weight.shape[0], thin, up, activation, gate, residual)
    if weight.dtype != torch.int8 or codes.dtype != torch.int8:
        product = torch.nn.functional.linear(codes.float(), weight.float()) * scale
    else:
        product = cpu.scaled_int8_product(codes, weight, scale)
    return after_product(product, token_scale, bias, dtype, thin, up, activation, gate, residual)


def after_product(
    product: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    thin: Tensor | None,
    up: Tensor | None,
    activation: str,
    gate: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """Return what follows the product `[m, n]` float32, which is overwritten."""
    if token_scale is not None:
        product *= token_scale[:, None]
    if bias is not None:
        product += bias.float()
    if thin is not None:
        product += thin.float() @ up.float().T
    if activation == "gelu_tanh":
        product = torch.nn.functional.gelu(product, approximate="tanh")
    if gate is not None:
        product *= _of_tokens(gate, product.shape[0] // gate.shape[0])
    if residual is not None:
        product += residual.float()
    return product.to(dtype)


@_shapes("gemm_w8a8")
def _(
    codes: Tensor,
    token_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    thin: Tensor | None = None,
    up: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    check_codes(codes, token_scale, weight, scale)
    check_after(codes, weight.shape[0], thin, up, activation, gate, residual)
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=dtype)


# as gemm_w8a8, the weight as it is stored
@torch.library.impl(_library, "gemm_w4a8", _EVERYWHERE)
def gemm_w4a8_reference(
    codes: Tensor,
    token_scale: Tensor,
    data: Tensor,
    multiplier: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor | None,
    format: str,
    group_size: int,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    thin: Tensor | None = None,
    up: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Define `gemm_w4a8`."""
    weight = decode8_reference(data, multiplier, offset, codebook, format, codes.shape[1], group_size)
    return gemm_w8a8_reference(codes, token_scale, weight, scale, bias, dtype, thin, up, activation, gate, residual)


@_shapes("gemm_w4a8")
def _(
    codes: Tensor,
    token_scale: Tensor,
    data: Tensor,
    multiplier: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor | None,
    format: str,
    group_size: int,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    thin: Tensor | None = None,
    up: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    check_after(codes, data.shape[0], thin, up, activation, gate, residual)
    return codes.new_empty((codes.shape[0], data.shape[0]), dtype=dtype)


# x :: [m, k] float, the weight as it is stored  ->  [m, n] like x
@torch.library.impl(_library, "gemm_w4a16", _EVERYWHERE)
def gemm_w4a16_reference(
    x: Tensor,
    data: Tensor,
    multiplier: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor | None,
    format: str,
    group_size: int,
    scale: Tensor,
    bias: Tensor | None,
    thin: Tensor | None = None,
    up: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Define `gemm_w4a16`: integers times x in float32, scaled afterwards."""
    check_after(x, data.shape[0], thin, up, activation, gate, residual)
    weight = decode8_reference(data, multiplier, offset, codebook, format, x.shape[1], group_size)
    product = torch.nn.functional.linear(x.float(), weight.float()) * scale
    return after_product(product, None, bias, x.dtype, thin, up, activation, gate, residual)


@_shapes("gemm_w4a16")
def _(
    x: Tensor,
    data: Tensor,
    multiplier: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor | None,
    format: str,
    group_size: int,
    scale: Tensor,
    bias: Tensor | None,
    thin: Tensor | None = None,
    up: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    check_after(x, data.shape[0], thin, up, activation, gate, residual)
    return x.new_empty((x.shape[0], data.shape[0]))


# x :: [m, k] float, weight :: [n, k] int8 or e4m3, scale :: [n] f32, bias :: [n]  ->  [m, n] like x
@torch.library.impl(_library, "gemm_w8a16", _EVERYWHERE)
def gemm_w8a16_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    check_gemm("gemm_w8a16", x, weight, scale)
    # The weight is scaled before the product: x I^T alone would overflow float16.
    dense = (weight.float() * scale[:, None]).to(x.dtype)
    return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))


@_shapes("gemm_w8a16")
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    check_gemm("gemm_w8a16", x, weight, scale)
    return x.new_empty((x.shape[0], weight.shape[0]))


# y :: [m, n], x :: [m, k], bias :: [n], the tensors of the layer that made y of x  ->  [m, n] like y
@torch.library.impl(_library, "straight_through", _EVERYWHERE)
def straight_through_reference(y: Tensor, x: Tensor, bias: Tensor | None, *layer: object) -> Tensor:
    """Return y. Its gradient with respect to x and bias is that of the dequantized layer, `input_gradient` and the sum of rows.

    So rounding and clipping count as the identity: an input beyond a static scale, or at the end of its codes, gets the gradient
    of one that was not clipped. The backward pass keeps no more than the layer's stored tensors, and decodes them again.
    """
    return y.clone()


@_shapes("straight_through")
def _(
    y: Tensor,
    x: Tensor,
    bias: Tensor | None,
    data: Tensor,
    multiplier: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor | None,
    format: str,
    group_size: int,
    scale: Tensor,
    up: Tensor | None,
    down: Tensor | None,
    premultiplier: Tensor | None,
    block: int,
    rotation1: Tensor | None,
    permutation: Tensor | None,
    rotation2: Tensor | None,
) -> Tensor:
    return torch.empty_like(y)


def _keep_layer(ctx, inputs: tuple, output: Tensor) -> None:
    _, x, bias, *layer = inputs
    ctx.in_features, ctx.bias_dtype = x.shape[1], None if bias is None else bias.dtype
    ctx.others = [None if isinstance(a, Tensor) else a for a in layer]
    ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in layer))


def _straight_through_backward(ctx, gradient: Tensor) -> tuple:
    layer = [other if tensor is None else tensor for tensor, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
    of_x = torch.ops.quantdit.input_gradient(gradient, ctx.in_features, *layer) if ctx.needs_input_grad[1] else None
    of_bias = gradient.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return None, of_x, of_bias, *(None for _ in layer)


torch.library.register_autograd("quantdit::straight_through", _straight_through_backward, setup_context=_keep_layer, lib=_library)


# gradient :: [m, n] float, the tensors of a layer  ->  [m, k] like gradient
@torch.library.impl(_library, "input_gradient", _EVERYWHERE)
def input_gradient_reference(
    gradient: Tensor,
    in_features: int,
    data: Tensor,
    multiplier: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor | None,
    format: str,
    group_size: int,
    scale: Tensor,
    up: Tensor | None,
    down: Tensor | None,
    premultiplier: Tensor | None,
    block: int,
    rotation1: Tensor | None,
    permutation: Tensor | None,
    rotation2: Tensor | None,
) -> Tensor:
    """Define `input_gradient`: `gradient W`, W `[n, k]` the dequantized weight in the inputs' space, with its low-rank branch."""
    wide = gradient.to(transform.kept_in(gradient.dtype))
    integers = torch.ops.quantdit.decode8(data, multiplier, offset, codebook, format, in_features, group_size)
    of_tokens = wide @ (integers.float() * scale[:, None]).to(wide.dtype)
    if up is not None:
        of_tokens = of_tokens + (wide @ up.to(wide.dtype)) @ down.to(wide.dtype)
    t = Transform(premultiplier, block, rotation1, permutation, rotation2)
    return transform.weight_back(t, of_tokens).to(gradient.dtype)


@_shapes("input_gradient")
def _(
    gradient: Tensor,
    in_features: int,
    data: Tensor,
    multiplier: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor | None,
    format: str,
    group_size: int,
    scale: Tensor,
    up: Tensor | None,
    down: Tensor | None,
    premultiplier: Tensor | None,
    block: int,
    rotation1: Tensor | None,
    permutation: Tensor | None,
    rotation2: Tensor | None,
) -> Tensor:
    return gradient.new_empty((gradient.shape[0], in_features))


def check_rotate(x: Tensor, premultiplier: Tensor, block: int) -> None:
    torch._check(
        x.shape[-1] == premultiplier.shape[0],
        lambda: f"rotate: x has width {x.shape[-1]}, premultiplier {premultiplier.shape[0]}",
    )
    torch._check(x.shape[-1] % block == 0, lambda: f"rotate: block {block} does not divide the width {x.shape[-1]}")


def check_tokens(op: str, x: Tensor, bits: int, group_size: int) -> None:
    torch._check(x.dim() == 2, lambda: f"{op}: x must be [m, k], got {tuple(x.shape)}")
    torch._check(2 <= bits <= 8, lambda: f"{op}: bits must be 2..8, got {bits}")
    divides = group_size == 0 or (group_size > 0 and x.shape[1] % group_size == 0)
    torch._check(divides, lambda: f"{op}: group size {group_size} does not divide the width {x.shape[1]}")


def check_static(static_scale: Tensor | None, affine: bool) -> None:
    if static_scale is not None:
        torch._check(not affine, lambda: "quantize_tokens: static scales are for symmetric codes")
        got = tuple(static_scale.shape)
        torch._check(got == (1,), lambda: f"quantize_tokens: static_scale must be [1], got {got}")


def check_rotate_quantize(x: Tensor, premultiplier: Tensor, block: int, format: str, bits: int, group_size: int) -> None:
    torch._check(format in ("int", "affine", "fp8"), lambda: f"rotate_quantize: unknown activation format {format!r}")
    check_tokens("rotate_quantize", x, bits, group_size)
    check_rotate(x, premultiplier, block)


def check_down(x: Tensor, down: Tensor | None) -> None:
    if down is not None:
        got, k = tuple(down.shape), x.shape[1]
        torch._check(len(got) == 2 and got[1] == k, lambda: f"rotate_quantize: down must be [r, {k}], got {got}")


def check_modulate(x: Tensor, shift: Tensor, modulation: Tensor) -> None:
    images = shift.shape[0]
    fits = x.dim() == 2 and shift.shape == modulation.shape == (images, x.shape[1]) and x.shape[0] % images == 0
    torch._check(fits, lambda: f"modulate_quantize: x {tuple(x.shape)} and shift {tuple(shift.shape)} do not go together")


def check_after(
    x: Tensor, n: int, thin: Tensor | None, up: Tensor | None, activation: str, gate: Tensor | None, residual: Tensor | None
) -> None:
    m = x.shape[0]
    torch._check(activation in ("none", "gelu_tanh"), lambda: f"gemm: unknown activation {activation!r}")
    torch._check((thin is None) == (up is None), lambda: "gemm: thin and up come together")
    if thin is not None:
        torch._check(thin.shape == (m, up.shape[1]) and up.shape[0] == n, lambda: "gemm: thin must be [m, r] and up [n, r]")
    if gate is not None:
        torch._check(gate.shape[1] == n and m % gate.shape[0] == 0, lambda: "gemm: gate must be [images, n], images dividing m")
    if residual is not None:
        torch._check(residual.shape == (m, n), lambda: "gemm: residual must be [m, n]")


def check_codes(codes: Tensor, token_scale: Tensor, weight: Tensor, scale: Tensor) -> None:
    check_gemm("gemm_w8a8", codes, weight, scale)
    known = codes.dtype in (torch.int8, torch.float8_e4m3fn)
    torch._check(known, lambda: f"gemm_w8a8: codes must be int8 or e4m3, got {codes.dtype}")
    torch._check(token_scale.shape == codes.shape[:1], lambda: "gemm_w8a8: one token_scale per token is needed")


def check_gemm(op: str, x: Tensor, weight: Tensor, scale: Tensor) -> None:
    torch._check(x.dim() == 2 and weight.dim() == 2, lambda: f"{op}: operands must be matrices")
    torch._check(x.shape[1] == weight.shape[1], lambda: f"{op}: k differs, {x.shape[1]} and {weight.shape[1]}")
    torch._check(scale.shape == weight.shape[:1], lambda: f"{op}: one scale per output channel is needed")


def _on_cuda(name: str) -> Callable:
    def run(*args, **kwargs):
        # Only now: importing quantdit imports neither triton nor anything that touches a GPU.
        from quantdit.kernels.triton_ops import dispatch

        return getattr(dispatch, name)(*args, **kwargs)

    return run


ON_CUDA = (
    "rotate",
    "quantize_tokens",
    "quantize_tokens_fp8",
    "rotate_quantize",
    "modulate_quantize",
    "decode8",
    "gemm_w8a8",
    "gemm_w4a8",
    "gemm_w4a16",
)  # gemm_w8a16 is a product of 16 bits, which torch has
for _name in ON_CUDA:
    torch.library.impl(_library, _name, "CUDA")(_on_cuda(_name))
