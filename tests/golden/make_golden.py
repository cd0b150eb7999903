"""Remake formats.json and errors.json. Run `python -P tests/golden/make_golden.py` and say why they changed.

formats.json: sha256 of packed bytes per format, and of the tables that trellis formats do not store. errors.json: NMSE of
rounding one weight to nearest, per format and way to fit.
Codes and weights come from SHAKE-256, so that no library's random numbers can change them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from quantdit.calibration.gptq import rtn
from quantdit.calibration.grids import AFFINE_FITS, GRIDS, TABLES, Grid
from quantdit.formats import FORMATS, trellis

FILE = Path(__file__).with_name("formats.json")
ERRORS = Path(__file__).with_name("errors.json")
ROWS, CODES = 7, 300  # two blocks of 128 and a remainder that is no multiple of 8
OUT, IN, GROUP = 8, 384, 64


def digests() -> dict[str, str]:
    """Return format name -> sha256 of the bytes that `pack` makes of the seeded codes `[ROWS, CODES]`."""
    result = {}
    for name, f in FORMATS.items():
        width = f.code_dtype.itemsize
        noise = hashlib.shake_256(f"quantdit {name}".encode()).digest(ROWS * CODES * width)
        numbers = [int.from_bytes(noise[i : i + width], "little") for i in range(0, len(noise), width)]
        codes = torch.tensor([number % f.code_count for number in numbers], dtype=f.code_dtype).reshape(ROWS, CODES)
        packed = f.pack(f, codes).contiguous().view(torch.uint8)
        result[name] = hashlib.sha256(packed.numpy().tobytes()).hexdigest()
        if f.state_bits:
            entries = trellis.codebook(f.state_bits, f.code_bits)
            result[f"{name} table"] = hashlib.sha256(entries.numpy().tobytes()).hexdigest()
    return result


def errors() -> dict[str, float]:
    """Return format and options -> NMSE, to five digits, of a weight `[OUT, IN]` of nearly Gaussian numbers.

    Of trellis formats, whose sequences go along the outputs, it is that of the weight's transpose.
    """
    noise = torch.tensor(list(hashlib.shake_256(b"quantdit weight").digest(OUT * IN * 12)), dtype=torch.float32)
    weight = (noise.reshape(OUT, IN, 12) - 127.5).sum(dim=-1) / 256  # variance 1, exact in float32
    importance = torch.ones(IN)
    cases, tall = {}, {name: grid for name, grid in GRIDS.items() if FORMATS[name].state_bits}
    for name, grid in GRIDS.items():
        if name in tall:
            continue
        if name.startswith("table"):
            cases |= {
                f"{name} {t} {r}": grid(weight, importance, IN, name, t, rows=r) for t in TABLES for r in ("layer", "channel")
            }
        elif FORMATS[name].code_bits < 8:
            cases |= {
                f"{name} {fit} {g}": grid(weight, importance, g, name, "", fit=fit) for fit in AFFINE_FITS for g in (GROUP, IN)
            }
        else:
            cases[name] = grid(weight, importance, IN, name, "")
    result = {}

    def error(W: torch.Tensor, grid: Grid, group: int) -> float:
        codes, groups = rtn(W / grid.scale[:, None], torch.ones(W.shape[1]), grid, group)
        values = [grid.value(c, p) for c, p in zip(codes.split(group, dim=1), groups, strict=True)]
        delta = (torch.cat(values, dim=1) * grid.scale[:, None] - W).double()
        return float(f"{float(delta.square().sum() / W.double().square().sum()):.4e}")

    for name, grid in cases.items():
        result[name] = error(weight, grid, GROUP if name.endswith(f" {GROUP}") else IN)
    W = weight.T.contiguous()
    for name, make in tall.items():
        result[name] = error(W, make(W, torch.ones(OUT), OUT, name, ""), OUT)
    return result


if __name__ == "__main__":
    FILE.write_text(json.dumps(digests(), indent=2) + "\n")
    ERRORS.write_text(json.dumps(errors(), indent=2) + "\n")
