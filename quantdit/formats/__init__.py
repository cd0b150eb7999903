"""Every number format quantdit can store a weight in. A new format is one file here and one row of this table."""

from __future__ import annotations

from quantdit.formats.affine import INT2, INT3, INT4, INT6, INT8
from quantdit.formats.codebook import (
    SSVQ256X4,
    SSVQ256X8,
    TABLE2,
    TABLE2_E4M3,
    TABLE3,
    TABLE3_E4M3,
    TABLE4,
    TABLE4_E4M3,
    TABLE6,
    TABLE6_E4M3,
    VQ64X2,
    VQ256X2,
    VQ256X4,
    VQ256X8,
)
from quantdit.formats.float8 import FP8_E4M3
from quantdit.formats.format import Field, Format, QSpec
from quantdit.formats.trellis import TRELLIS

FORMATS: dict[str, Format] = {
    "int2": INT2,
    "int3": INT3,
    "int4": INT4,
    "int6": INT6,
    "int8": INT8,
    "table2": TABLE2,
    "table3": TABLE3,
    "table4": TABLE4,
    "table6": TABLE6,
    "table2_e4m3": TABLE2_E4M3,
    "table3_e4m3": TABLE3_E4M3,
    "table4_e4m3": TABLE4_E4M3,
    "table6_e4m3": TABLE6_E4M3,
    "vq256x4": VQ256X4,
    "vq64x2": VQ64X2,
    "vq256x2": VQ256X2,
    "vq256x8": VQ256X8,
    "ssvq256x8": SSVQ256X8,
    "ssvq256x4": SSVQ256X4,
    "fp8_e4m3": FP8_E4M3,
    **TRELLIS,
}

__all__ = ["FORMATS", "Field", "Format", "QSpec"]
