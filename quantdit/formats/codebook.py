"""Codebooks: `I[o, i*d:(i+1)*d] = codebook[assignment[o, i]]`, every entry on the int8 grid.

* `table2`, `table3`, `table4` (d = 1): a level table `codebook` int8 `[1, 2**bits]` (per weight) or `[out, 2**bits]` (per output
  channel). Twin-log, Lloyd-Max and any other set of levels are choices of entries, not formats.
* `vq256x4` (2 bits a weight), `vq64x2` (3 bits): a codebook int8 `[k, d]` of vectors of d consecutive inputs (VQ4DiT,
  arXiv 2408.17131).

Stored: `data` (packed assignments, packing.py) and `codebook`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantdit.formats.format import Field, Format, QSpec
from quantdit.formats.packing import pack_codes, packed_bytes, unpack_codes


def _fields(f: Format, s: QSpec) -> dict[str, Field]:
    codebook = (s.codebook_rows, f.levels) if f.dim == 1 else (f.levels, f.dim)
    return {
        "data": Field(torch.uint8, (s.out_features, packed_bytes(s.in_features // f.dim, f.code_bits))),
        "codebook": Field(torch.int8, codebook),
    }


def _pack(f: Format, codes: Tensor) -> Tensor:
    return pack_codes(codes, f.code_bits)


def _unpack(f: Format, data: Tensor, n: int) -> Tensor:
    return unpack_codes(data, f.code_bits, n)


def _decode8(f: Format, s: QSpec, t: Mapping[str, Tensor]) -> Tensor:
    assignments = unpack_codes(t["data"], f.code_bits, s.in_features // f.dim)
    codebook = t["codebook"]
    if f.dim > 1:
        return codebook.view(torch.int8)[assignments.int()].reshape(s.out_features, s.in_features)
    if s.codebook_rows == 1:
        return codebook[0][assignments.int()]
    return torch.gather(codebook, 1, assignments.long())


def _check(f: Format, s: QSpec, t: Mapping[str, Tensor]) -> str | None:
    return None  # every code has an entry and every entry is an int8: there is nothing that can be out of range


TABLE2, TABLE3, TABLE4 = (Format(f"table{b}", b, 1, _fields, _pack, _unpack, _decode8, _check) for b in (2, 3, 4))
VQ256X4 = Format("vq256x4", 8, 4, _fields, _pack, _unpack, _decode8, _check)
VQ64X2 = Format("vq64x2", 6, 2, _fields, _pack, _unpack, _decode8, _check)
