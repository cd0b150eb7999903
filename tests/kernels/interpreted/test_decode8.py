"""decode8_kernel and decode_trellis_kernel: the bytes of the definition, for every format and every kind of last block."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quantdit.formats import FORMATS
from quantdit.kernels.triton_ops import decode8 as module
from quantdit.kernels.triton_ops.decode_trellis import decode_trellis

WIDTHS = {128: 64, 384: 128, 64: 32, 44: 44, 300: 300, 704: 32}  # and a group size; 704 = 5.5 blocks
# One format of each number of bits at every width; the others at those that end in, with and between blocks.
EVERY_WIDTH = ("int3", "int4", "table2", "table6", "vq256x2", "ssvq256x4", "int8")
CASES = [
    (name, k, group)
    for name, f in FORMATS.items()
    for k, group in WIDTHS.items()
    if k % f.dim == 0 and not f.state_bits and (name in EVERY_WIDTH or k in (384, 300, 704))
]
# Windows that end in the middle of a code, tables in and out of shared memory, fewer outputs than a window reaches back to.
TRELLIS = (
    ("trellis4_l10", 37, 300),
    ("trellis4_l12", 64, 256),
    ("trellis3_l10", 37, 44),
    ("trellis3_l16", 33, 300),
    ("trellis2_l12", 37, 128),
    ("trellis2_l16", 5, 136),
    ("trellis2_l14", 1, 64),
)


@pytest.mark.parametrize(("name", "k", "group"), CASES)
def test_every_format_is_the_definition(name: str, k: int, group: int, weight: Callable):
    rows = {1, 37} if FORMATS[name].dim == 1 and "table" in name else {1}
    for codebook_rows in rows:
        q = weight(name, 37, k, group, codebook_rows)
        decoded = module.decode8(q)
        expected = q.decode8()
        assert decoded.dtype == expected.dtype
        assert torch.equal(decoded.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(("name", "n", "k"), TRELLIS)
def test_trellis_is_the_definition(name: str, n: int, k: int, weight: Callable):
    q = weight(name, n, k)
    assert torch.equal(decode_trellis(q), q.decode8())
