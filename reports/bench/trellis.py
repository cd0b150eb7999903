"""Trellis codes on a CPU: their error on Gaussian weights, how long they take to find, how fast they decode.

    python reports/bench/trellis.py

Error: NMSE without feedback of a Gaussian weight of 1536 outputs, in the unit that calibration takes. Layers are quantized as
`quantize_weight` does: round to nearest, GPTQ in act-order, the same and two passes of coordinate descent. Seconds are of the
process, so that neighbours on a shared machine do not count. Writes trellis.jsonl and trellis.md.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from quantdit.calibration import viterbi
from quantdit.calibration.grids import SPREAD
from quantdit.calibration.quantize import WeightOptions, quantize_weight
from quantdit.formats import FORMATS, QSpec, trellis

HERE = Path(__file__).parent
ROWS, TABLE = HERE / "trellis.jsonl", HERE / "trellis.md"
SEED, OUT, WIDE = 0, 1536, 8960
COLUMNS = {10: 64, 12: 64, 14: 24, 16: 12}  # encoded, by L
TORCH_COLUMNS = 4
DECODED = 25  # times, of which the fastest counts
FEEDBACK = {"act_order": True}
LAYERS = ((OUT, "rtn", {}), (WIDE, "rtn", {}), (OUT, "gptq", FEEDBACK), (OUT, "gptq", FEEDBACK | {"cd_passes": 2}))


def seconds(run: Callable[[], object]) -> float:
    """Return the CPU seconds of one run."""
    began = time.process_time()
    run()
    return time.process_time() - began


def of_format(name: str) -> dict:
    """Return error and speeds of one format."""
    f, generator = FORMATS[name], torch.Generator().manual_seed(SEED)
    weight = torch.randn(OUT, COLUMNS[f.state_bits], generator=generator)
    unit = SPREAD[f.code_bits] * trellis.unit(f.state_bits)
    viterbi.encode(weight[:64, :1], f)  # compiled, table made
    codes = []
    encoding = seconds(lambda: codes.append(viterbi.encode(weight / unit, f)))
    error = (trellis.decode(codes[0], f) * unit - weight).square().sum() / weight.square().sum()
    spec = QSpec(name, OUT, OUT, OUT)
    data = f.pack(f, torch.randint(f.code_count, (OUT, OUT), generator=generator).to(torch.uint8))
    decoding = min(seconds(lambda: f.decode8(f, spec, {"data": data})) for _ in range(DECODED))
    return {
        "format": name,
        "nmse": float(f"{float(error):.4g}"),
        "encoded_per_second": round(weight.numel() / encoding),
        "decoded_per_second": round(OUT * OUT / decoding),
    }


def without_numba(name: str) -> dict:
    """Return the speed of the way in torch alone."""
    f, weight = FORMATS[name], 20 * torch.randn(OUT, TORCH_COLUMNS, generator=torch.Generator().manual_seed(SEED))
    installed, viterbi.numba_is_installed = viterbi.numba_is_installed, lambda: False
    took = seconds(lambda: viterbi.encode(weight, f))
    viterbi.numba_is_installed = installed
    return {"format": f"{name}, torch alone", "encoded_per_second": round(weight.numel() / took)}


def of_layer(out: int, method: str, options: dict) -> dict:
    """Return how long a layer of 4 bits and L = 12 takes."""
    generator = torch.Generator().manual_seed(SEED)
    weight, inputs = (torch.randn(rows, OUT, generator=generator) for rows in (out, 2 * OUT))
    gram = inputs.T @ inputs
    took = seconds(lambda: quantize_weight(weight, gram, "trellis4_l12", OUT, method, WeightOptions(**options)))
    return {"layer": f"{out} x {OUT}", "method": method, **options, "seconds": round(took, 1)}


def markdown(rows: list[dict]) -> str:
    """Return the rows as tables."""
    lines = [
        "# Trellis codes on a CPU",
        "",
        f"{rows[0]['cpu']}, {rows[0]['threads']} thread, numba {rows[0]['numba']}; CPU seconds. Made by"
        " `python reports/bench/trellis.py`, which says what is measured.",
        "",
        "| format | NMSE | thousand weights encoded a second | million weights decoded a second |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if "format" in row:
            decoded = f"{row['decoded_per_second'] / 1e6:.0f}" if "decoded_per_second" in row else ""
            encoded = f"{row['encoded_per_second'] / 1e3:.0f}"
            lines.append(f"| {row['format']} | {row.get('nmse', '')} | {encoded} | {decoded} |")
    lines += ["", "| layer, trellis4_l12 | method | seconds |", "|---|---|---|"]
    for row in rows:
        if "layer" in row:
            words = [row["method"], *(["act-order"] if row.get("act_order") else [])]
            words += [f"{row['cd_passes']} passes of descent"] if "cd_passes" in row else []
            lines.append(f"| {row['layer']} | {', '.join(words)} | {row['seconds']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure everything and write rows and table."""
    machine = {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numba": version("numba"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    rows = [of_format(name) for name, f in FORMATS.items() if f.state_bits]
    rows += [without_numba(name) for name in ("trellis2_l12", "trellis3_l12", "trellis4_l12")]
    rows += [of_layer(*layer) for layer in LAYERS]
    rows = [row | machine for row in rows]
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    TABLE.write_text(markdown(rows))
    print(TABLE.read_text())


def _cpu() -> str:
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
