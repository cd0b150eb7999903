"""`fp8_e4m3`: `I` is the stored OCP e4m3 number itself (sign 1, exponent 4 with bias 7, mantissa 3; largest 448; no infinity).

Stored: `data` float8_e4m3fn `[out, in]`. Codes 0x7f and 0xff are NaN and are refused in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantdit.formats.format import Field, Format, QSpec

LARGEST = 448.0


def _check(f: Format, s: QSpec, t: Mapping[str, Tensor]) -> str | None:
    nan = int(((t["data"].view(torch.uint8) & 0x7F) == 0x7F).sum())
    return f"{nan} entries are NaN" if nan else None


FP8_E4M3 = Format(
    "fp8_e4m3",
    "whole",
    8,
    1,
    fields=lambda f, s: {"data": Field(torch.float8_e4m3fn, (s.out_features, s.in_features))},
    pack=lambda f, codes: codes.view(torch.float8_e4m3fn),
    unpack=lambda f, data, n: data.view(torch.uint8),
    decode8=lambda f, s, t: t["data"],
    check=_check,
    decoded_dtype=torch.float8_e4m3fn,
)
