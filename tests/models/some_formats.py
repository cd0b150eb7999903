"""Formats that stand for all of FORMATS in tests of what is not the formats' own: tests/formats has every row."""

from __future__ import annotations

from quantdit.formats import FORMATS

# One trellis of each width, and the largest window once: the others differ in a number.
SOME = tuple(name for name, f in FORMATS.items() if f.state_bits in (0, 12) or name == "trellis4_l16")
# One for each way to decode: groups, plain numbers, tables (integers and e4m3), vectors, vectors of magnitudes, windows.
EACH_KIND = ("int4", "int8", "fp8_e4m3", "table4", "table4_e4m3", "vq64x2", "ssvq256x4", "trellis3_l12")
