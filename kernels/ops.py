"""Every op of a quantized layer: schema, shapes (fake), and the reference that defines it. Faster kernels only agree with it.

Letters: m, n, k = tokens, out, in. The ops live in `torch.ops.quantdit`:

    rotate(x, sign, block)                                     x R, block-Hadamard (hadamard.py)
    quantize_tokens(x, bits)                                   per-token symmetric codes and scales
    decode8(data, multiplier, offset, codebook, ...)           any stored weight -> I [n, k]
    gemm_w8a8(codes, token_scale, weight, scale, bias, dtype)  token_scale[m] scale[n] (codes I^T)[m, n] + bias
    gemm_w8a16(x, weight, scale, bias)                         x (scale I)^T + bias
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantdit import hadamard
from quantdit.formats import FORMATS, QSpec
from quantdit.kernels import cpu

_library = torch.library.Library("quantdit", "DEF")
_library.define("rotate(Tensor x, Tensor sign, int block) -> Tensor")
_library.define("quantize_tokens(Tensor x, int bits) -> (Tensor, Tensor)")
_library.define(
    "decode8(Tensor data, Tensor? multiplier, Tensor? offset, Tensor? codebook,"
    " str format, int in_features, int group_size) -> Tensor"
)
_library.define(
    "gemm_w8a8(Tensor codes, Tensor token_scale, Tensor weight, Tensor scale, Tensor? bias, ScalarType dtype) -> Tensor"
)
_library.define("gemm_w8a16(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor")

_EVERYWHERE = "CompositeExplicitAutograd"


# x :: [..., k] float, sign :: [k] int8  ->  [..., k] like x
@torch.library.impl(_library, "rotate", _EVERYWHERE)
def _rotate(x: Tensor, sign: Tensor, block: int) -> Tensor:
    _check_rotate(x, sign, block)
    return hadamard.rotate(x, sign, block)


@torch.library.register_fake("quantdit::rotate")
def _(x: Tensor, sign: Tensor, block: int) -> Tensor:
    _check_rotate(x, sign, block)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# x :: [m, k] float  ->  codes :: [m, k] int8 in -L..L, scale :: [m] f32 with L = 2^(bits-1) - 1;  x ~= scale[:, None] * codes
@torch.library.impl(_library, "quantize_tokens", _EVERYWHERE)
def _quantize_tokens(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    _check_tokens(x, bits)
    x = x.float().contiguous()
    # Two reductions and an in-place rounding: temporaries the size of x cost more than arithmetic here.
    scale = torch.maximum(x.amax(dim=1), -x.amin(dim=1)) / (2 ** (bits - 1) - 1)
    # A token of zeros gets scale 0 and codes 0: dividing by 1 instead keeps NaN out.
    codes = (x / scale.masked_fill(scale == 0, 1.0)[:, None]).round_().to(torch.int8)  # ties to even
    return codes, scale


@torch.library.register_fake("quantdit::quantize_tokens")
def _(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    _check_tokens(x, bits)
    return torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format), x.new_empty(
        x.shape[0], dtype=torch.float32
    )


# stored tensors of a QTensor  ->  I :: [n, k] int8 or e4m3
@torch.library.impl(_library, "decode8", _EVERYWHERE)
def _decode8(
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


@torch.library.register_fake("quantdit::decode8")
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
    element = torch.float8_e4m3fn if data.dtype == torch.float8_e4m3fn else torch.int8
    return data.new_empty((data.shape[0], in_features), dtype=element)


# codes :: [m, k] int8, token_scale :: [m] f32, weight :: [n, k] int8 or e4m3, scale :: [n] f32, bias :: [n]  ->  [m, n] dtype
@torch.library.impl(_library, "gemm_w8a8", _EVERYWHERE)
def gemm_w8a8_reference(
    codes: Tensor, token_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Define `gemm_w8a8`: float64 holds every sum of up to 2^39 int8 products exactly."""
    _check_codes(codes, token_scale, weight, scale)
    product = codes.double() @ weight.to(torch.float32).double().T
    return _epilogue(product.float() * scale, token_scale, bias, dtype)


@torch.library.impl(_library, "gemm_w8a8", "CPU")
def _gemm_w8a8_cpu(
    codes: Tensor, token_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    _check_codes(codes, token_scale, weight, scale)
    if weight.dtype != torch.int8:
        product = torch.nn.functional.linear(codes.float(), weight.float()) * scale
    else:
        product = cpu.scaled_int8_product(codes, weight, scale)
    return _epilogue(product, token_scale, bias, dtype)


def _epilogue(product: Tensor, token_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    product *= token_scale[:, None]
    if bias is not None:
        product += bias.float()
    return product.to(dtype)


@torch.library.register_fake("quantdit::gemm_w8a8")
def _(codes: Tensor, token_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    _check_codes(codes, token_scale, weight, scale)
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=dtype)


# x :: [m, k] float, weight :: [n, k] int8 or e4m3, scale :: [n] f32, bias :: [n]  ->  [m, n] like x
@torch.library.impl(_library, "gemm_w8a16", _EVERYWHERE)
def _gemm_w8a16(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    _check_gemm("gemm_w8a16", x, weight, scale)
    # The weight is scaled before the product: x I^T alone would overflow float16.
    dense = (weight.float() * scale[:, None]).to(x.dtype)
    return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))


@torch.library.register_fake("quantdit::gemm_w8a16")
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    _check_gemm("gemm_w8a16", x, weight, scale)
    return x.new_empty((x.shape[0], weight.shape[0]))


def _check_rotate(x: Tensor, sign: Tensor, block: int) -> None:
    torch._check(x.shape[-1] == sign.shape[0], lambda: f"rotate: x has width {x.shape[-1]}, sign {sign.shape[0]}")
    torch._check(x.shape[-1] % block == 0, lambda: f"rotate: block {block} does not divide the width {x.shape[-1]}")


def _check_tokens(x: Tensor, bits: int) -> None:
    torch._check(x.dim() == 2, lambda: f"quantize_tokens: x must be [m, k], got {tuple(x.shape)}")
    torch._check(2 <= bits <= 8, lambda: f"quantize_tokens: bits must be 2..8, got {bits}")


def _check_codes(codes: Tensor, token_scale: Tensor, weight: Tensor, scale: Tensor) -> None:
    _check_gemm("gemm_w8a8", codes, weight, scale)
    torch._check(codes.dtype == torch.int8, lambda: f"gemm_w8a8: codes must be int8, got {codes.dtype}")
    torch._check(token_scale.shape == codes.shape[:1], lambda: "gemm_w8a8: one token_scale per token is needed")


def _check_gemm(op: str, x: Tensor, weight: Tensor, scale: Tensor) -> None:
    torch._check(x.dim() == 2 and weight.dim() == 2, lambda: f"{op}: operands must be matrices")
    torch._check(x.shape[1] == weight.shape[1], lambda: f"{op}: k differs, {x.shape[1]} and {weight.shape[1]}")
    torch._check(scale.shape == weight.shape[:1], lambda: f"{op}: one scale per output channel is needed")
