"""decode8_kernel: the bytes of the definition, for every format and every kind of last block."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quantdit.formats import FORMATS
from quantdit.kernels.triton_ops import decode8 as module

WIDTHS = {128: 64, 384: 128, 64: 32, 44: 44, 300: 300, 704: 32}  # and a group size; 704 = 5.5 blocks
CASES = [(name, k, group) for name, f in FORMATS.items() for k, group in WIDTHS.items() if k % f.dim == 0]


@pytest.mark.parametrize(("name", "k", "group"), CASES)
def test_every_format_is_the_definition(name: str, k: int, group: int, weight: Callable):
    rows = {1, 37} if FORMATS[name].dim == 1 and "table" in name else {1}
    for codebook_rows in rows:
        q = weight(name, 37, k, group, codebook_rows)
        decoded = module.decode8(q.data, q.multiplier, q.offset, q.codebook, name, k, group)
        expected = q.decode8()
        assert decoded.dtype == expected.dtype
        assert torch.equal(decoded.view(torch.uint8), expected.view(torch.uint8))
