"""Which way a quantized linear goes on a GPU, and what each op of torch.ops.quantdit runs there. Imports no triton.

    prepare   fused     Hadamard, rank up to LARGEST_RANK, quantized activations  rotate_quantize, the branch's `thin` with it
              separate  otherwise                                                 rotate or torch, then quantize_tokens
    product   w8a8      the weight is 8 bits as stored                            gemm_w8a8
              w4a8      packed weight, m below `decode_from_m`                    gemm_w4a8, decoded in registers
              decode    packed weight, m from there on; e4m3 activations; trellis decode8 to scratch, then gemm_w8a8
              w4a16     16-bit activations, m up to `w4a16_up_to_m`               gemm_w4a16
              dense     the same, more tokens, float32, split signs or a trellis  decode8, then torch's product

From `torch_from_m` on, gemm_w8a8 is torch._int_mm or torch._scaled_mm with the rest of the epilogue after it. `QUANTDIT_KERNELS`
or `using(mode)` chooses otherwise: `packed` and `decode` fix the product of packed weights with quantized activations, `torch`
takes torch's products for w8a8 at any m, `reference` runs the definitions of kernels/ops.py. The crossover points are in
crossover.json. What the kernels do not take runs as its definition, on the same device:

    everything    without triton, before Ampere (compute capability 8.0)
    tokens        wider than LARGEST_WIDTH, in groups LARGEST_GROUPED_WIDTH; float64; activation groups other than GROUPS;
                  Hadamard blocks above LARGEST_BLOCK
    rotations     of tokens wider than LARGEST_ROTATED_WIDTH, but on sm_90 of 16 bits with signs alone; of float32 or smoothed
                  tokens on sm_80, 89 and 120 (the rotation alone: its codes are the kernel's)
    e4m3 codes    before compute capability 8.9
    gemm_w4a16    of formats with signs of their own, whose tile spills: `choose` never takes it for those
    thin          of float16 and float32 tokens, and where the codes are not the kernel's: a product of its own, by torch
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from quantdit.formats import FORMATS
from quantdit.kernels import ops
from quantdit.tensors.layer_spec import ActivationSpec, LayerSpec

MODES = ("auto", "packed", "decode", "torch", "reference")
ARCHITECTURES = (80, 89, 90, 100, 120)  # compute capability; others take the rows of the nearest below
LARGEST_BLOCK = 128  # of a Hadamard
LARGEST_WIDTH = 16384  # of a token in the registers of one program
LARGEST_GROUPED_WIDTH = 8192  # the same in groups, which need more registers
LARGEST_ROTATED_WIDTH = 8192
LARGEST_RANK = 64  # of a low-rank branch that begins in the kernel of the tokens
GROUPS = (0, 32, 64, 128)  # of activations
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WHOLE = ("int8", "fp8_e4m3")  # formats that store `I` itself


def _mode(text: str) -> str:
    if text not in MODES:
        raise ValueError(f"QUANTDIT_KERNELS = {text!r} is unknown; known: {', '.join(MODES)}")
    return text


mode = _mode(os.environ.get("QUANTDIT_KERNELS", "auto"))
CROSSOVER_FILE = Path(__file__).with_name("crossover.json")
CROSSOVER = json.loads(CROSSOVER_FILE.read_text())


@contextmanager
def using(chosen: str) -> Iterator[None]:
    """Choose the way for all layers while the context lasts: a name of MODES.

    Raises:
        ValueError: unknown mode.
    """
    global mode
    before, mode = mode, _mode(chosen)
    try:
        yield
    finally:
        mode = before


@dataclass(frozen=True)
class Way:
    """How one linear runs: `prepare` and `product` are words of the table above."""

    prepare: str
    product: str


def choose(m: int, layer: LayerSpec, dtype: torch.dtype, capability: int, activation: ActivationSpec | None = None) -> Way:
    """Return the way of a layer with m tokens of a dtype on a GPU of this compute capability (90 for 9.0).

    `activation`: how its inputs are quantized, where that is not as the layer says throughout.
    """
    a, weight = activation or layer.activation, layer.weight
    if a.bits == 16:
        few = m <= CROSSOVER["w4a16_up_to_m"][architecture(capability)] and dtype != torch.float32 and mode != "reference"
        few = few and multiplies_packed(weight.format)
        return Way("separate", "w4a16" if few else "dense")
    prepare = "fused" if layer.rotation == "hadamard" and layer.rank <= LARGEST_RANK else "separate"
    if weight.format in WHOLE:
        return Way(prepare, "w8a8")
    if a.format == "fp8" or FORMATS[weight.format].state_bits:
        return Way(prepare, "decode")
    if mode in ("packed", "decode"):
        return Way(prepare, "w4a8" if mode == "packed" else "decode")
    decode = mode == "torch" or _from("decode_from_m", m, capability)
    return Way(prepare, "decode" if decode else "w4a8")


def multiplies_packed(format: str) -> bool:
    """Whether gemm_w4a16 decodes weights of this format in registers: not split signs, which spill, nor a trellis."""
    return not FORMATS[format].sign_split and not FORMATS[format].state_bits


def _from(point: str, m: int, capability: int) -> bool:
    """Return whether m is beyond a crossover point; null is beyond every m."""
    start = CROSSOVER[point][architecture(capability)]
    return start is not None and m >= start


def architecture(capability: int) -> str:
    """Return the row of CROSSOVER for a compute capability."""
    return str(max((a for a in ARCHITECTURES if a <= capability), default=ARCHITECTURES[0]))


def on_gpu(tokens: Tensor) -> bool:
    """Return whether tokens go the ways of this table rather than the CPU's."""
    return tokens.is_cuda


@lru_cache(maxsize=8)
def capability_of(device: torch.device) -> int:
    """Return the compute capability of a device, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def kernels_run(x: Tensor) -> bool:
    """Return whether Triton kernels can take x."""
    return mode != "reference" and _triton_is_installed() and capability_of(x.device) >= ARCHITECTURES[0]


@lru_cache(maxsize=1)
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None


def rotates_in_registers(k: int, dtype: torch.dtype, premultiplier: torch.dtype, capability: int) -> bool:
    """Return whether the kernel rotates tokens: where matrix and tokens leave registers enough, twice or thrice cut ones too."""
    fits, whole = k <= LARGEST_ROTATED_WIDTH, dtype != torch.float32 and premultiplier == torch.int8
    if architecture(capability) in ("90", "100"):  # whose tensor cores read the matrix from shared memory, not from registers
        return fits or (whole and capability < 100)
    return fits and whole


def _takes_rotation(x: Tensor, premultiplier: Tensor, block: int) -> bool:
    fits = rotates_in_registers(x.shape[-1], x.dtype, premultiplier.dtype, capability_of(x.device))
    return block <= LARGEST_BLOCK and fits


def _takes_tokens(x: Tensor, fp8: bool, group_size: int) -> bool:
    largest = LARGEST_GROUPED_WIDTH if group_size else LARGEST_WIDTH
    fits = x.shape[-1] <= largest and group_size in GROUPS
    return kernels_run(x) and x.dtype in FLOATS and fits and (not fp8 or capability_of(x.device) >= 89)


def _takes_projection(x: Tensor, block: int, fp8: bool, group_size: int, rank: int) -> bool:
    """Return whether one kernel rotates, quantizes and multiplies by `down`: it holds 128 inputs at a time, of any width."""
    fits = 1 <= rank <= LARGEST_RANK and block <= LARGEST_BLOCK and group_size in GROUPS
    return kernels_run(x) and x.dtype == torch.bfloat16 and fits and (not fp8 or capability_of(x.device) >= 89)


def _takes_codes(codes: Tensor) -> bool:
    return kernels_run(codes) and (codes.dtype == torch.int8 or capability_of(codes.device) >= 89)


def rotate(x: Tensor, premultiplier: Tensor, block: int) -> Tensor:
    """Run `rotate`."""
    ops.check_rotate(x, premultiplier, block)
    if not _takes_tokens(x, False, 0) or not _takes_rotation(x, premultiplier, block):
        return ops.rotate_reference(x, premultiplier, block)
    from quantdit.kernels.triton_ops.quantize_tokens import quantize_tokens as kernel

    return kernel(x.reshape(-1, x.shape[-1]), premultiplier, block, "none", capability=capability_of(x.device))[0].reshape(
        x.shape
    )


def quantize_tokens(
    x: Tensor, bits: int, group_size: int = 0, affine: bool = False, static_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run `quantize_tokens`."""
    ops.check_tokens("quantize_tokens", x, bits, group_size)
    ops.check_static(static_scale, affine)
    if not _takes_tokens(x, False, group_size):
        return ops.quantize_tokens_reference(x, bits, group_size, affine, static_scale)
    from quantdit.kernels.triton_ops.quantize_tokens import quantize_tokens as kernel

    return kernel(x, None, 1, "affine" if affine else "int", bits, group_size, static_scale, capability=capability_of(x.device))


def quantize_tokens_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Run `quantize_tokens_fp8`."""
    ops.check_tokens("quantize_tokens_fp8", x, 8, 0)
    if not _takes_tokens(x, True, 0):
        return ops.quantize_tokens_fp8_reference(x)
    from quantdit.kernels.triton_ops.quantize_tokens import quantize_tokens as kernel

    return kernel(x, None, 1, "fp8", capability=capability_of(x.device))


def rotate_quantize(
    x: Tensor,
    premultiplier: Tensor,
    block: int,
    format: str,
    bits: int,
    group_size: int = 0,
    static_scale: Tensor | None = None,
    down: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `rotate_quantize`."""
    ops.check_rotate_quantize(x, premultiplier, block, format, bits, group_size)
    ops.check_static(static_scale, format == "affine")
    ops.check_down(x, down)
    rest = (format, bits, group_size, static_scale)
    if down is not None and _takes_projection(x, block, format == "fp8", group_size, down.shape[0]):
        from quantdit.kernels.triton_ops.quantize_tokens import quantize_project

        return quantize_project(x, premultiplier, block, *rest, down)
    fits = _takes_tokens(x, format == "fp8", group_size) and _takes_rotation(x, premultiplier, block)
    if down is not None or not fits:
        rotated = rotate(x, premultiplier, block)
        return *_quantize(rotated, *rest), ops.project(rotated, down)
    from quantdit.kernels.triton_ops.quantize_tokens import quantize_tokens as kernel

    return *kernel(x, premultiplier, block, *rest, capability=capability_of(x.device)), ops.project(x, None)


def _quantize(rotated: Tensor, format: str, bits: int, group_size: int, static_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    if format == "fp8":
        return quantize_tokens_fp8(rotated)
    return quantize_tokens(rotated, bits, group_size, format == "affine", static_scale)


def modulate_quantize(
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
    """Run `modulate_quantize`."""
    ops.check_modulate(x, shift, modulation)
    ops.check_rotate_quantize(x, premultiplier, block, format, bits, group_size)
    ops.check_static(static_scale, format == "affine")
    rest = (premultiplier, block, format, bits, group_size, static_scale)
    if not _takes_tokens(x, format == "fp8", group_size) or not _takes_rotation(x, premultiplier, block):
        return ops.modulate_quantize_reference(x, shift, modulation, eps, *rest)
    from quantdit.kernels.triton_ops.quantize_tokens import quantize_tokens as kernel

    return kernel(x, *rest, shift, modulation, eps, capability=capability_of(x.device))


def decode8(
    data: Tensor,
    multiplier: Tensor | None,
    offset: Tensor | None,
    codebook: Tensor | None,
    format: str,
    in_features: int,
    group_size: int,
) -> Tensor:
    """Run `decode8`."""
    stored = (data, multiplier, offset, codebook, format, in_features, group_size)
    if format in WHOLE or not kernels_run(data):
        return ops.decode8_reference(*stored)
    if FORMATS[format].state_bits:
        from quantdit.kernels.triton_ops.decode_trellis import decode_trellis

        return decode_trellis(data, format, in_features)
    from quantdit.kernels.triton_ops.decode8 import decode8 as kernel

    return kernel(*stored)


def gemm_w8a8(
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
    """Run `gemm_w8a8`."""
    ops.check_codes(codes, token_scale, weight, scale)
    after = (thin, up, activation, gate, residual)
    ops.check_after(codes, weight.shape[0], *after)
    if not _takes_codes(codes):
        return ops.gemm_w8a8_reference(codes, token_scale, weight, scale, bias, dtype, *after)
    torchs = mode == "torch" or (mode == "auto" and _from("torch_from_m", len(codes), capability_of(codes.device)))
    if torchs and (product := _torch_product(codes, weight)) is not None:
        return ops.after_product(product.float() * scale, token_scale, bias, dtype, *after)
    from quantdit.kernels.triton_ops.gemm_w8a8 import gemm_w8a8 as kernel

    return kernel(codes, token_scale, weight, scale, bias, dtype, *after, capability=capability_of(codes.device))


def _torch_product(codes: Tensor, weight: Tensor) -> Tensor | None:
    """Return `codes weight^T` by cuBLASLt, or None where it does not take the shapes."""
    m, k, n = *codes.shape, weight.shape[0]
    if k % 16 or n % 16 or m <= 16 or codes.dtype != weight.dtype:
        return None
    codes, weight = codes.contiguous(), weight.contiguous()
    if codes.dtype == torch.int8:
        return torch._int_mm(codes, weight.T)
    one = torch.ones((), dtype=torch.float32, device=codes.device)
    return torch._scaled_mm(codes, weight.T, scale_a=one, scale_b=one, out_dtype=torch.float32)


def gemm_w4a8(
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
    """Run `gemm_w4a8`."""
    stored = (data, multiplier, offset, codebook, format, group_size)
    after = (thin, up, activation, gate, residual)
    ops.check_after(codes, data.shape[0], *after)
    # Decoded in registers, sums of e4m3 would have to wait for each other on Hopper; a trellis needs the codes of other outputs.
    if codes.dtype == torch.float8_e4m3fn or FORMATS[format].state_bits:
        weight = decode8(data, multiplier, offset, codebook, format, codes.shape[1], group_size)
        return gemm_w8a8(codes, token_scale, weight, scale, bias, dtype, *after)
    if not _takes_codes(codes):
        return ops.gemm_w4a8_reference(codes, token_scale, *stored, scale, bias, dtype, *after)
    from quantdit.kernels.triton_ops.gemm_w4 import gemm_w4 as kernel

    return kernel(codes, token_scale, *stored, scale, bias, dtype, *after, capability=capability_of(codes.device))


def gemm_w4a16(
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
    """Run `gemm_w4a16`."""
    stored = (data, multiplier, offset, codebook, format, group_size)
    after = (thin, up, activation, gate, residual)
    ops.check_after(x, data.shape[0], *after)
    if not kernels_run(x) or x.dtype not in (torch.float16, torch.bfloat16) or not multiplies_packed(format):
        return ops.gemm_w4a16_reference(x, *stored, scale, bias, *after)
    from quantdit.kernels.triton_ops.gemm_w4 import gemm_w4 as kernel

    return kernel(x, None, *stored, scale, bias, x.dtype, *after, capability=capability_of(x.device))
