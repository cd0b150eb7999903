"""Codebooks: `I[o, i*d:(i+1)*d] = codebook[assignment[o, i]]`, every entry an 8-bit number.

* `table2`, `table3`, `table4`, `table6` (d = 1): a `codebook` int8 `[1, 2**bits]` (per weight) or `[out, 2**bits]`
  (per output channel). Twin-log, Lloyd-Max and any other set of numbers are choices of entries, not formats.
* `table2_e4m3` ... `table6_e4m3`: the same with entries, and so `I`, in OCP e4m3 (float8.py), NaN refused: entries that span
  more octaves than int8 does, for fp8 tensor cores.
* `vq256x4` (2 bits a weight), `vq64x2` (3 bits), `vq256x2` (4 bits), `vq256x8` (1 bit): a codebook int8 `[k, d]` of vectors of
  d consecutive inputs (VQ4DiT, arXiv 2408.17131).

* `ssvq256x8` (2 bits), `ssvq256x4` (3 bits): the signs split off (SSVQ, arXiv 2503.08668). A code is an entry of a codebook of
  magnitudes int8 `[256, d]`, none negative, in the low 8 bits, and above them a bit for each of the d weights, set where it is
  negative: 65,536 or 4,096 different vectors of 256 entries.

Stored: `data` (packed assignments, packing.py) and `codebook`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quantdit.formats.format import Field, Format, QSpec
from quantdit.formats.packing import packed_bytes, unpack_codes

DECODED_AT_ONCE = 1 << 18  # weights: what fits a cache


def _fields(f: Format, s: QSpec) -> dict[str, Field]:
    codebook = (s.codebook_rows, f.code_count) if f.dim == 1 else (f.codewords, f.dim)
    return {
        "data": Field(torch.uint8, (s.out_features, packed_bytes(s.in_features // f.dim, f.code_bits))),
        "codebook": Field(f.decoded_dtype, codebook),
    }


def _decode8(f: Format, s: QSpec, t: Mapping[str, Tensor]) -> Tensor:
    data, codebook = t["data"], t["codebook"]
    decoded = torch.empty(s.out_features, s.in_features, dtype=codebook.dtype, device=data.device)
    rows = max(1, DECODED_AT_ONCE // s.in_features)
    for start in range(0, s.out_features, rows):
        codes = unpack_codes(data[start : start + rows], f.code_bits, s.in_features // f.dim).int()
        if f.dim > 1:
            entries = entries_of(codebook, codes, f.sign_split).flatten(1)
        else:
            if s.codebook_rows > 1:  # one codebook behind the other
                codes = (
                    codes + f.code_count * torch.arange(start, start + len(codes), dtype=torch.int32, device=data.device)[:, None]
                )
            # As bytes, whatever they mean: selection knows no float8.
            entries = codebook.view(torch.uint8).flatten().index_select(0, codes.flatten()).view(codes.shape).view(codebook.dtype)
        decoded[start : start + rows] = entries
    return decoded


def entries_of(codebook: Tensor, codes: Tensor, sign_split: bool = False) -> Tensor:
    """Return the vectors `[..., d]` of codes `[...]` int32 or int64: entries of the codebook `[k, d]`.

    With `sign_split` it is entry `code mod k`, whose number j is negated where bit j of `code div k` is set.
    """
    if not sign_split:
        return codebook.index_select(0, codes.flatten()).view(*codes.shape, -1)
    k, d = codebook.shape
    negative = (codes // k)[..., None] >> torch.arange(d, dtype=codes.dtype, device=codes.device) & 1
    return codebook[(codes % k).int()] * (1 - 2 * negative).to(codebook.dtype)


def _check_magnitudes(f: Format, s: QSpec, t: Mapping[str, Tensor]) -> str | None:
    negative = int((t["codebook"] < 0).sum())
    return f"{negative} entries of a codebook of magnitudes are negative" if negative else None


def _check(f: Format, s: QSpec, t: Mapping[str, Tensor]) -> str | None:
    return None  # every code has an entry and every entry is an int8: there is nothing that can be out of range


def _check_e4m3(f: Format, s: QSpec, t: Mapping[str, Tensor]) -> str | None:
    nan = int(((t["codebook"].view(torch.uint8) & 0x7F) == 0x7F).sum())
    return f"{nan} codebook entries are NaN" if nan else None


TABLE2, TABLE3, TABLE4, TABLE6 = (Format(f"table{b}", "codebook", b, 1, _fields, _decode8, _check) for b in (2, 3, 4, 6))
TABLE2_E4M3, TABLE3_E4M3, TABLE4_E4M3, TABLE6_E4M3 = (
    replace(f, name=f"{f.name}_e4m3", check=_check_e4m3, decoded_dtype=torch.float8_e4m3fn)
    for f in (TABLE2, TABLE3, TABLE4, TABLE6)
)
VQ256X4 = Format("vq256x4", "vectors", 8, 4, _fields, _decode8, _check)
VQ64X2 = Format("vq64x2", "vectors", 6, 2, _fields, _decode8, _check)
VQ256X2 = Format("vq256x2", "vectors", 8, 2, _fields, _decode8, _check)
VQ256X8 = Format("vq256x8", "vectors", 8, 8, _fields, _decode8, _check)
SSVQ256X8 = Format("ssvq256x8", "vectors", 16, 8, _fields, _decode8, _check_magnitudes, sign_split=True)
SSVQ256X4 = Format("ssvq256x4", "vectors", 12, 4, _fields, _decode8, _check_magnitudes, sign_split=True)
