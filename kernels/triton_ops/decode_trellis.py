"""`decode8` of trellis formats (quantdit/formats/trellis.py): states from codes of several outputs, looked up in the codebook.

Codebooks of up to SHARED entries lie in shared memory; larger ones stay where they are, behind the caches.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantdit.formats import FORMATS, Format
from quantdit.formats.packing import BLOCK, packed_bytes
from quantdit.formats.trellis import codebook
from quantdit.kernels.triton_ops.decode8 import narrow_codes
from quantdit.tensors.qtensor import QTensor

BN = 32
SHARED = 4096
# grid: (cdiv(N, BN), tiles); data u8 [N, row_bytes]; codebook i8 [2^STATE_BITS]; y i8 [N, K]


@triton.jit
def decode_trellis_kernel(
    data_ptr,
    codebook_ptr,
    y_ptr,
    N,
    K,
    row_bytes,
    first_tile,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    IN_SHARED: tl.constexpr,
    T: tl.constexpr,
    BN: tl.constexpr,
):
    PIECES: tl.constexpr = (STATE_BITS + BITS - 1) // BITS
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tile = first_tile + tl.program_id(1)
    column = tile * 128 + tl.arange(0, 128)
    ok = (rows < N)[:, None] & (column < K)[None, :]
    state = tl.zeros((BN, 128), tl.int32)
    for j in tl.static_range(PIECES):
        row = ((rows + (PIECES * N - j)) % N).to(tl.int64)  # before the first comes the last
        base = data_ptr + row[:, None] * row_bytes + tile * (128 * BITS // 8)
        code = narrow_codes(base, tl.arange(0, 128)[None, :], ok, BITS, T)
        if BITS * (j + 1) <= STATE_BITS:
            state |= code << (STATE_BITS - BITS * (j + 1))
        else:
            state |= code >> (BITS * (j + 1) - STATE_BITS)
    if IN_SHARED:
        entries = tl.load(codebook_ptr + tl.arange(0, 1 << STATE_BITS))
        value = tl.reshape(tl.gather(entries, tl.reshape(state, (BN * 128,)), axis=0), (BN, 128))
    else:
        value = tl.load(codebook_ptr + state, mask=ok, other=0)
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * K + column[None, :], value, mask=ok)


def decode_trellis(weight: QTensor) -> Tensor:
    """Return `I` int8 `[n, k]` as `torch.ops.quantdit.decode8` does."""
    f, n, k, data = FORMATS[weight.spec.format], weight.spec.out_features, weight.spec.in_features, weight.data.contiguous()
    y = data.new_empty((n, k), dtype=f.decoded_dtype)
    entries = _codebook_on(f.state_bits, f.code_bits, data.device)
    full, rest = divmod(k, BLOCK)
    for first, tiles, t in ((0, full, BLOCK), (full, int(rest > 0), -(-rest // 8) * 8)):
        if tiles:
            decode_trellis_kernel[(triton.cdiv(n, BN), tiles)](
                data, entries, y, n, k, packed_bytes(k, f.code_bits), first, **constants(f), T=t, BN=BN, num_warps=4
            )
    return y


def constants(f: Format) -> dict:
    """Return the constexpr arguments that follow from the format."""
    return {"BITS": f.code_bits, "STATE_BITS": f.state_bits, "IN_SHARED": 2**f.state_bits <= SHARED}


@lru_cache
def _codebook_on(state_bits: int, bits: int, device: torch.device) -> Tensor:
    return codebook(state_bits, bits).to(device)
