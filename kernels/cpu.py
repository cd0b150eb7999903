"""The int8 x int8 product on a CPU: exact on every machine, fast where the machine allows.

oneDNN multiplies uint8 by int8. With AVX512-VNNI or AMX the sums are exact. Before those, `vpmaddubsw` adds two neighbouring
products in 16 bits and saturates: `255 (w[2j] + w[2j+1])` fits only while two neighbours of one sign add up to at most 128 in
magnitude. So a row of weights whose pairs keep that bound ("pair-safe") goes through oneDNN on any machine, and the other rows,
on machines without VNNI, through float32 in chunks short enough for float32 to be exact. reports/bench has the measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

PAIR_LIMIT = 128  # 255 * 128 = 32640, the last multiple of 255 below 2^15
EXACT_K = 2**24 // (128 * 127)  # float32 adds this many products of a code (<= 127) and a weight (<= 128) exactly


@dataclass(frozen=True)
class _Prepared:
    """A weight `[n, k]` made ready once: what oneDNN multiplies, and the rows it may not touch on this machine."""

    version: int
    packed: Tensor | None
    zero_points: Tensor
    unsafe_rows: Tensor  # [u] int64
    unsafe_weight: Tensor  # [u, k] float32


_PREPARED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def unsafe_rows(weight: Tensor) -> Tensor:
    """Return `[n]` bool: the rows of `weight` `[n, k]` int8 with two same-signed neighbours beyond `PAIR_LIMIT` in sum."""
    w = torch.nn.functional.pad(weight, (0, weight.shape[1] % 2)).to(torch.int16)
    return ((w[:, ::2] + w[:, 1::2]).abs() > PAIR_LIMIT).any(dim=1)


def scaled_int8_product(codes: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return `(codes weight^T) * scale` `[m, n]` float32, int8 codes `[m, k]` and weight `[n, k]`; the integer sum is exact."""
    ready = _prepare(weight)
    if ready.packed is None:
        return exact_float_product(codes, weight.float()) * scale
    shifted = (codes.contiguous().view(torch.uint8)) ^ 0x80  # codes + 128: oneDNN's left operand is unsigned
    product = torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, 128, ready.packed, scale, ready.zero_points, None, 1.0, 0, torch.float32, "none", [], ""
    )
    if len(ready.unsafe_rows):
        product[:, ready.unsafe_rows] = exact_float_product(codes, ready.unsafe_weight) * scale[ready.unsafe_rows]
    return product


def exact_float_product(codes: Tensor, weight: Tensor) -> Tensor:
    """Return `codes weight^T` float32 for int8 codes `[m, k]` and integer-valued float32 weight `[n, k]`, summed exactly."""
    x = codes.float()
    k = x.shape[1]
    if k <= EXACT_K:
        return torch.nn.functional.linear(x, weight)
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32)
    for start in range(0, k, EXACT_K):
        part = slice(start, start + EXACT_K)
        total += torch.nn.functional.linear(x[:, part], weight[:, part]).to(torch.int32)
    return total.float()


def _prepare(weight: Tensor) -> _Prepared:
    ready = _PREPARED.get(weight)
    if ready is None or ready.version != version_of(weight):
        ready = _PREPARED[weight] = _make_ready(weight)
    return ready


def _make_ready(weight: Tensor) -> _Prepared:
    n = weight.shape[0]
    rows = torch.zeros(0, dtype=torch.int64) if _onednn_is_exact() else unsafe_rows(weight).nonzero()[:, 0]
    # Past a quarter of the rows the second product costs more than oneDNN saves.
    packed = None if len(rows) > n // 4 else torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
    return _Prepared(version_of(weight), packed, torch.zeros(n, dtype=torch.int32), rows, weight[rows].float())


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written to; -1 for inference tensors, which do not count and are not to be written to."""
    return -1 if tensor.is_inference() else tensor._version


@lru_cache(maxsize=1)
def _onednn_is_exact() -> bool:
    """Multiply the largest operands once and see whether oneDNN saturates on this machine."""
    weight = torch.full((64, 256), 127, dtype=torch.int8)
    codes = torch.full((64, 256), 255, dtype=torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    zero_points = torch.zeros(64, dtype=torch.int32)
    product = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 128, packed, torch.ones(64, dtype=torch.float32), zero_points, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return bool((product == 127 * 127 * 256).all())
