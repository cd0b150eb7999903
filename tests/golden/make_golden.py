"""Remake formats.json: sha256 of packed bytes per format. Run `python -P tests/golden/make_golden.py` and say why they changed.

The codes come from SHAKE-256 of the format's name, so that no library's random numbers can change them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from quantdit.formats import FORMATS

FILE = Path(__file__).with_name("formats.json")
ROWS, CODES = 7, 300  # two blocks of 128 and a remainder that is no multiple of 8


def digests() -> dict[str, str]:
    """Return format name -> sha256 of the bytes that `pack` makes of the seeded codes `[ROWS, CODES]`."""
    result = {}
    for name, f in FORMATS.items():
        noise = hashlib.shake_256(f"quantdit {name}".encode()).digest(ROWS * CODES)
        codes = torch.tensor([byte % f.levels for byte in noise], dtype=torch.uint8).reshape(ROWS, CODES)
        packed = f.pack(f, codes).contiguous().view(torch.uint8)
        result[name] = hashlib.sha256(packed.numpy().tobytes()).hexdigest()
    return result


if __name__ == "__main__":
    FILE.write_text(json.dumps(digests(), indent=2) + "\n")
