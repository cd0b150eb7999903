"""The largest text encoder that pipelines have, UMT5-XXL of Wan (11.4 GB in bfloat16, made-up weights), quantized within 8 GiB.

    python reports/bench/encoder.py [--work DIR]

A tiny Wan pipeline gets the encoder in its true shapes; `quantdit calibrate --components text_encoder --memory-budget 8GiB` runs
on it in a process of its own. Without data the whole encoder; with data (two prompts) its first two blocks of 24, from which the
seconds of all follow. Rows that are there are kept. Writes encoder.jsonl and encoder.md. Needs the extra `text`, 16 GB of disk.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from quantdit.checkpoints.random_weights import write_random_transformer
from quantdit.compiling.report import REPORT
from quantdit.models.known_models import CONFIGS
from quantdit.system import files

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "encoder.jsonl", HERE / "encoder.md"
sys.path += [str(HERE.parents[1] / "tests" / "models"), str(HERE.parent / "study")]
import measure  # noqa: E402
import tiny_pipelines  # noqa: E402

BUDGET, BITS, BLOCKS = "8GiB", "w4a16", 24
RUNS = {"no data": (BLOCKS, ("--samples", "0")), "two prompts": (2, ("--samples", "2", "--steps", "1"))}
SIZE = ("--height", "32", "--width", "32", "--frames", "5")


def encoder_config(blocks: int) -> dict:
    """Return UMT5-XXL's config.json, of so many blocks."""
    config = files.read_json(CONFIGS / "parts" / "umt5-xxl.json")
    return config | {"num_layers": blocks, "num_decoder_layers": blocks}


def pipeline(blocks: int, work: Path) -> Path:
    """Return the folder of a tiny Wan whose text encoder is UMT5-XXL, of so many blocks; written if it is missing."""
    folder = work / f"pipeline-{blocks}"
    if not (folder / "whole").exists():
        shutil.rmtree(folder, ignore_errors=True)
        tiny_pipelines.write_tiny("WanPipeline", folder)
        # The transformer reads states of the encoder's width.
        transformer = files.read_json(folder / "transformer" / "config.json") | {"text_dim": encoder_config(1)["d_model"]}
        for part, config in (("transformer", transformer), ("text_encoder", encoder_config(blocks))):
            shutil.rmtree(folder / part)
            write_random_transformer(config, folder / part, 0)
        (folder / "whole").touch()
    return folder


def make_row(name: str, work: Path) -> dict:
    """Calibrate; the process's own report says what it took."""
    blocks, how = RUNS[name]
    folder, output = pipeline(blocks, work), work / "out"
    shutil.rmtree(output, ignore_errors=True)
    command = ["calibrate", "--model", str(folder), "--bits", "w4a8", "--components", "text_encoder", "--encoder-bits", BITS]
    command += [*how, *SIZE, "--memory-budget", BUDGET, "--seed", "0", "--output", str(output)]
    call = "import sys; from quantdit.cli import main; sys.exit(main(sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", call, *command], check=True)
    report = files.read_json(output / REPORT)
    size = sum(path.stat().st_size for path in (output / "text_encoder").glob("*.safetensors"))
    source = sum(path.stat().st_size for path in (folder / "text_encoder").glob("*.safetensors"))
    errors = [v for layer in report["layers"].values() for k, v in layer.items() if k in ("rel_rmse", "weight_rel_rmse")]
    shutil.rmtree(output)
    return {
        "run": name,
        "blocks": blocks,
        "bits": BITS,
        "budget": BUDGET,
        "peak_bytes": report["memory"]["peak_bytes"],
        "source_bytes": source,
        "file_bytes": size,
        "seconds": report["seconds"],
        "mean_error": sum(errors) / len(errors),
        "machine": measure.machine(),
    }


def write_page(rows: list[dict]) -> None:
    """Write the table."""
    lines = [
        "# A text encoder larger than memory",
        "",
        f"UMT5-XXL's encoder in its true shapes with made-up weights, to {BITS} within {BUDGET}, one thread; seed 0. Made by"
        " `python reports/bench/encoder.py`.",
        "",
        "| calibration | blocks | source | file | peak memory | minutes | of all 24 blocks |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        minutes = sum(row["seconds"].values()) / 60
        whole = "" if row["blocks"] == BLOCKS else f"{minutes * BLOCKS / row['blocks']:.0f} minutes, extrapolated"
        sizes = [f"{row[key] / 1e9:.2f} GB" for key in ("source_bytes", "file_bytes")]
        cells = [row["run"], f"{row['blocks']}", *sizes, f"{row['peak_bytes'] / 2**30:.2f} GiB", f"{minutes:.1f}", whole]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"{row['run']}: {row['note']}." for row in rows if "note" in row)]
    PAGE.write_text("\n".join([*lines, ""]))


def main() -> None:
    """Make the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "quantdit-encoder", help="(%(default)s)")
    work = parser.parse_args().work
    rows = measure.read_rows(ROWS)
    for name in RUNS:
        if all(row["run"] != name for row in rows):
            rows.append(make_row(name, work))
            measure.write_rows(rows, ROWS)
    write_page(rows)


if __name__ == "__main__":
    main()
