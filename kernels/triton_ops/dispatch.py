"""What each op of torch.ops.quantdit runs on a GPU: one decision for each call, made here. Imports no triton.

    rotate_quantize   one kernel          Hadamard, rank up to LARGEST_RANK, what fits its registers
                      the parts           otherwise: rotate, then quantize_tokens, and the product by `down`; without `down`
                                          some tokens at a time (row_chunks.py), as `rotate`'s definition does
    gemm_packed_a8    the weight as it is 8 bits as stored: gemm_w8a8
                      in registers        packed weight, m below `decode_from_m`
                      decoded first       from there on; e4m3 codes; a trellis: decode8 to scratch, then gemm_w8a8
    gemm_packed_a16   in registers        m up to `w4a16_up_to_m`
                      decoded first       more tokens, float32, split signs or a trellis: decode8, then torch's product
    attention8        a kernel            heads of 32, 64, 128 channels; its definition otherwise
    gemm_w8a8         a kernel            m below `torch_from_m`
                      torch's product     from there on: torch._int_mm or torch._scaled_mm, the epilogue after it

`QUANTDIT_KERNELS` or `using(mode)` chooses otherwise: `packed` and `decode` say whether weights are decoded first, `torch` takes
torch's products for gemm_w8a8 at any m, `reference` runs the definitions of kernels/ops.py. The crossover points are in
crossover.json. What the kernels do not take runs as its definition, on the same device:

    everything    without triton, before Ampere (compute capability 8.0)
    tokens        wider than LARGEST_WIDTH, in groups LARGEST_GROUPED_WIDTH; float64; activation groups other than GROUPS;
                  Hadamard blocks above LARGEST_BLOCK
    rotations     of tokens wider than LARGEST_ROTATED_WIDTH, but on sm_90 of 16 bits with signs alone; of float32 or smoothed
                  tokens on sm_80, 89 and 120 (the rotation alone: its codes are the kernel's)
    e4m3 codes    before compute capability 8.9
    low rank      the product by `down` of float16 and float32 tokens, and where the codes are not the kernel's: torch's
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from quantdit.formats import FORMATS, Format
from quantdit.kernels import attention, ops
from quantdit.kernels.ops import Epilogue
from quantdit.tensors.qtensor import QTensor
from quantdit.tensors.row_chunks import in_row_chunks

MODES = ("auto", "packed", "decode", "torch", "reference")
ARCHITECTURES = (80, 89, 90, 100, 120)  # compute capability; others take the rows of the nearest below
LARGEST_BLOCK = 128  # of a Hadamard
LARGEST_WIDTH = 16384  # of a token in the registers of one program
LARGEST_GROUPED_WIDTH = 8192  # the same in groups, which need more registers
LARGEST_ROTATED_WIDTH = 8192
LARGEST_RANK = 64  # of a low-rank branch that begins in the kernel of the tokens
GROUPS = (0, 32, 64, 128)  # of activations
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _known(mode: str) -> str:
    if mode not in MODES:
        raise ValueError(f"QUANTDIT_KERNELS = {mode!r} is unknown; known: {', '.join(MODES)}")
    return mode


_GIVEN = _known(os.environ.get("QUANTDIT_KERNELS", "auto"))
MODE = ContextVar("QUANTDIT_KERNELS", default=_GIVEN)
CROSSOVER_FILE = Path(__file__).with_name("crossover.json")
CROSSOVER = json.loads(CROSSOVER_FILE.read_text())


@contextmanager
def using(mode: str) -> Iterator[None]:
    """Choose the way of this thread's calls while the context lasts: a name of MODES.

    Raises:
        ValueError: unknown mode.
    """
    before = MODE.set(_known(mode))
    try:
        yield
    finally:
        MODE.reset(before)


def decodes_first(m: int, format: Format, x: torch.dtype, capability: int) -> bool:
    """Return whether a packed weight is decoded to scratch for m tokens or codes x, rather than in the registers of the product.

    On a GPU of this compute capability (90 for 9.0). In registers sums of e4m3 would have to wait for each other on Hopper, and
    split signs spill beside 16-bit tokens; a trellis needs the codes of other outputs.
    """
    coded = x == torch.int8
    if x not in (torch.int8, torch.float16, torch.bfloat16) or format.kind == "trellis" or (format.sign_split and not coded):
        return True
    if (mode := MODE.get()) in ("packed", "decode"):
        return mode == "decode"
    if coded:
        return mode == "torch" or _from("decode_from_m", m, capability)
    return m > CROSSOVER["w4a16_up_to_m"][architecture(capability)]


def _from(point: str, m: int, capability: int) -> bool:
    """Return whether m is beyond a crossover point; null is beyond every m."""
    start = CROSSOVER[point][architecture(capability)]
    return start is not None and m >= start


def architecture(capability: int) -> str:
    """Return the row of CROSSOVER for a compute capability."""
    return str(max((a for a in ARCHITECTURES if a <= capability), default=ARCHITECTURES[0]))


def on_gpu(tokens: Tensor) -> bool:
    """Return whether tokens go to the ops of this file rather than the CPU's."""
    return tokens.is_cuda


@lru_cache(maxsize=8)
def capability_of(device: torch.device) -> int:
    """Return the compute capability of a device, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def kernels_run(x: Tensor) -> bool:
    """Return whether Triton kernels can take x."""
    return MODE.get() != "reference" and _triton_is_installed() and capability_of(x.device) >= ARCHITECTURES[0]


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
    if not _takes_tokens(x, False, 0) or not _takes_rotation(x, premultiplier, block):
        return ops.rotate_reference(x, premultiplier, block)
    from quantdit.kernels.triton_ops.quantize_tokens import quantize_tokens as kernel

    flat = x.reshape(-1, x.shape[-1])
    return kernel(flat, premultiplier, block, "none", capability=capability_of(x.device))[0].reshape(x.shape)


def quantize_tokens(
    x: Tensor, bits: int, group_size: int = 0, affine: bool = False, static_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run `quantize_tokens`."""
    if not _takes_tokens(x, False, group_size):
        return ops.quantize_tokens_reference(x, bits, group_size, affine, static_scale)
    from quantdit.kernels.triton_ops.quantize_tokens import quantize_tokens as kernel

    return kernel(x, None, 1, "affine" if affine else "int", bits, group_size, static_scale, capability=capability_of(x.device))


def quantize_tokens_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Run `quantize_tokens_fp8`."""
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
    group_size: int,
    static_scale: Tensor | None,
    down: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `rotate_quantize`."""
    rest = (format, bits, group_size, static_scale)
    if down is not None and _takes_projection(x, block, format == "fp8", group_size, down.shape[0]):
        from quantdit.kernels.triton_ops.quantize_tokens import quantize_project

        return quantize_project(x, premultiplier, block, *rest, down)
    fits = _takes_tokens(x, format == "fp8", group_size) and _takes_rotation(x, premultiplier, block)
    if down is not None:
        rotated = rotate(x, premultiplier, block)
        return *_quantize(rotated, *rest), ops.project(rotated, down)
    if not fits:  # no rotated token outlives its codes
        codes, scale = in_row_chunks(lambda rows: _quantize(rotate(rows, premultiplier, block), *rest), x)
        return codes, scale, ops.project(x, None)
    from quantdit.kernels.triton_ops.quantize_tokens import quantize_tokens as kernel

    return *kernel(x, premultiplier, block, *rest, capability=capability_of(x.device)), ops.project(x, None)


def _quantize(rotated: Tensor, format: str, bits: int, group_size: int, static_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    if format == "fp8":
        return quantize_tokens_fp8(rotated)
    return quantize_tokens(rotated, bits, group_size, format == "affine", static_scale)


def decode8(weight: QTensor) -> Tensor:
    """Run `decode8`."""
    kind = FORMATS[weight.spec.format].kind
    if kind == "whole" or not kernels_run(weight.data):
        return ops.decode8_reference(weight)
    if kind == "trellis":
        from quantdit.kernels.triton_ops.decode_trellis import decode_trellis

        return decode_trellis(weight)
    from quantdit.kernels.triton_ops.decode8 import decode8 as kernel

    return kernel(weight)


def gemm_w8a8(codes: Tensor, decoded: Tensor, scale: Tensor, after: Epilogue) -> Tensor:
    """Run `gemm_w8a8`."""
    if not _takes_codes(codes):
        return ops.gemm_w8a8_reference(codes, decoded, scale, after)
    capability = capability_of(codes.device)
    torchs = MODE.get() == "torch" or (MODE.get() == "auto" and _from("torch_from_m", len(codes), capability))
    if torchs and (product := _torch_product(codes, decoded)) is not None:
        return ops.finished(product.float() * scale, after)
    from quantdit.kernels.triton_ops.gemm_w8a8 import gemm_w8a8 as kernel

    return kernel(codes, decoded, scale, after, capability=capability)


def _torch_product(codes: Tensor, weight: Tensor) -> Tensor | None:
    """Return `codes weight^T` by cuBLASLt, or None where it does not take the shapes."""
    m, k, n = *codes.shape, weight.shape[0]
    if k % 16 or n % 16 or m <= 16 or codes.dtype != weight.dtype:
        return None
    codes, weight = codes.contiguous(), weight.contiguous()
    if codes.dtype == torch.int8:
        return torch._int_mm(codes, weight.T)  # pyright: ignore[reportPrivateImportUsage] - the only way to it
    one = torch.ones((), dtype=torch.float32, device=codes.device)
    return torch._scaled_mm(codes, weight.T, scale_a=one, scale_b=one, out_dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage] - the only way to it


def gemm_packed_a8(codes: Tensor, weight: QTensor, after: Epilogue) -> Tensor:
    """Run `gemm_packed_a8`."""
    format, capability = FORMATS[weight.spec.format], capability_of(codes.device)
    if format.kind == "whole":
        return gemm_w8a8(codes, weight.data, weight.scale, after)
    if decodes_first(len(codes), format, codes.dtype, capability):
        return gemm_w8a8(codes, decode8(weight), weight.scale, after)
    if not _takes_codes(codes):
        return ops.gemm_packed_a8_reference(codes, weight, after)
    from quantdit.kernels.triton_ops.gemm_packed import gemm_packed as kernel

    return kernel(codes, weight, after, capability=capability)


def gemm_packed_a16(x: Tensor, weight: QTensor, after: Epilogue) -> Tensor:
    """Run `gemm_packed_a16`."""
    capability = capability_of(x.device)
    if kernels_run(x) and not decodes_first(len(x), FORMATS[weight.spec.format], x.dtype, capability):
        from quantdit.kernels.triton_ops.gemm_packed import gemm_packed as kernel

        return kernel(x, weight, after, capability=capability)
    y = ops.gemm_w8a16_reference(x, decode8(weight), weight.scale, after.bias)
    if after.low_rank_hidden is not None and after.up is not None:
        hidden = after.low_rank_hidden
        y = y + torch.nn.functional.linear(hidden, after.up.to(hidden.dtype)).to(y.dtype)
    return y.to(after.dtype)


def attention8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    mask: Tensor | None,
    causal: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Run `attention8`."""
    capability = capability_of(q.device)
    if kernels_run(q):
        from quantdit.kernels.triton_ops import attention8 as kernel

        if kernel.takes(q, v, capability):
            return kernel.attention8(q, k, v, q_scale, k_scale, v_scale, mask, causal, dtype, capability=capability)
    return attention.attention8_reference(q, k, v, q_scale, k_scale, v_scale, mask, causal, dtype)


# gemm_w8a16 is a product of 16 bits, which torch has.
KERNELS = (
    rotate,
    quantize_tokens,
    quantize_tokens_fp8,
    rotate_quantize,
    decode8,
    gemm_w8a8,
    gemm_packed_a8,
    gemm_packed_a16,
    attention8,
)
for _kernel in KERNELS:
    ops.OPS[_kernel.__name__].implement(_kernel, "CUDA")
