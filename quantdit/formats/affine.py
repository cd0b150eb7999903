"""Affine integers: `I = code * multiplier + offset`, both integers per group (two-level scales, QServe, arXiv 2405.04532).

Stored: `data` (packed codes, packing.py), `multiplier` uint8 `[out, groups]`, `offset` int8 `[out, groups]`. Every `I` lies in
-128..127 by the choice of multiplier and offset; a group that would leave the range is refused, never clipped.
`int8` is the format whose code is `I` itself: `data` int8 `[out, in]`, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantdit.formats.format import Field, Format, QSpec
from quantdit.formats.packing import packed_bytes, unpack_codes


def _fields(f: Format, s: QSpec) -> dict[str, Field]:
    return {
        "data": Field(torch.uint8, (s.out_features, packed_bytes(s.in_features, f.code_bits))),
        "multiplier": Field(torch.uint8, (s.out_features, s.groups)),
        "offset": Field(torch.int8, (s.out_features, s.groups)),
    }


def _decode8(f: Format, s: QSpec, t: Mapping[str, Tensor]) -> Tensor:
    # uint8 arithmetic wraps modulo 256, which is int8 arithmetic once viewed as int8: the range is checked, so exact.
    codes = unpack_codes(t["data"], f.code_bits, s.in_features).reshape(s.out_features, s.groups, s.group_size)
    offset = t["offset"].view(torch.uint8)[..., None]
    return (codes * t["multiplier"][..., None] + offset).view(torch.int8).reshape(s.out_features, s.in_features)


def _check(f: Format, s: QSpec, t: Mapping[str, Tensor]) -> str | None:
    top = t["offset"].int() + (f.code_count - 1) * t["multiplier"].int()
    if top.numel() and int(top.max()) > 127:
        return f"offset + {f.code_count - 1} * multiplier reaches {int(top.max())}, above the int8 range"
    return None


def _identity_fields(f: Format, s: QSpec) -> dict[str, Field]:
    return {"data": Field(torch.int8, (s.out_features, s.in_features))}


INT2, INT3, INT4, INT6 = (Format(f"int{b}", "affine", b, 1, _fields, _decode8, _check) for b in (2, 3, 4, 6))
INT8 = Format(
    "int8",
    "whole",
    8,
    1,
    fields=_identity_fields,
    pack=lambda f, codes: codes.view(torch.int8),
    unpack=lambda f, data, n: data.view(torch.uint8),
    decode8=lambda f, s, t: t["data"],
    check=lambda f, s, t: None,
)
