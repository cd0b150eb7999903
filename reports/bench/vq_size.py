"""What DiT-XL/2 takes as codebooks of vectors, counted from the written file, next to the sizes of the VQ4DiT paper.

    python reports/bench/vq_size.py [WORK]

Made-up weights of the true shapes (28 blocks, width 1152), no data: the size does not depend on them. Counted are the linears
that the paper counts: attention, feed-forward and modulation of each block. diffusers' class has an embedder of the timestep in
every block, which the original model has once; it is left out. A finished output in WORK is counted again, not made again.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from quantdit.cli import main as quantdit
from quantdit.system.files import tensor_bytes

HERE = Path(__file__).parent
PAPER = {"w2a16": 162.08, "w3a16": 241.14}  # MiB: codes, codebooks and biases (VQ4DiT, arXiv 2408.17131, table 1)
ROLES = {"data": "codes", "codebook": "codebooks", "bias": "biases", "scale": "scales", "premultiplier": "signs"}


def count(folder: Path) -> dict[str, int]:
    """Return the bytes of each kind of tensor in the file."""
    found, sizes = dict.fromkeys(ROLES.values(), 0), tensor_bytes(folder / "transformer")
    for name, size in sizes.items():
        layer, _, kind = name.rpartition(".")
        if ".emb." not in layer and layer.startswith("transformer_blocks.") and f"{layer}.data" in sizes:
            found[ROLES[kind]] += size
    return found


def main() -> None:
    """Make the two checkpoints and the table."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary)
        lines = [
            "# DiT-XL/2 in codebooks of vectors",
            "",
            "MiB of the linears of 28 blocks, counted from the file; made by `python reports/bench/vq_size.py`. The paper counts",
            "codes, codebooks and biases; scales and the signs of the rotation are ours besides.",
            "",
            "| | codes | codebooks | biases | scales | signs | all | the paper |",
            "|---|---|---|---|---|---|---|---|",
        ]
        rows = {}
        for bits, paper in PAPER.items():
            folder = work / f"dit-xl-2-{bits}"
            if not folder.exists():
                command = ["calibrate", "--model", "dit-xl-2-256", "--random-weights", "--bits", bits, "--weight-format", "vq"]
                command += ["--samples", "0", "--output", str(folder)]
                if quantdit(command):
                    raise SystemExit(f"{bits}: calibration failed")
            rows[bits] = found = count(folder)
            cells = [f"{found[kind] / 2**20:.3f}" for kind in ROLES.values()]
            lines.append(f"| {bits} | {' | '.join(cells)} | **{sum(found.values()) / 2**20:.2f}** | {paper:.2f} |")
        (HERE / "vq-size.md").write_text("\n".join(lines) + "\n")
        (HERE / "vq-size.json").write_text(json.dumps(rows, indent=2) + "\n")
        print("\n".join(lines))


if __name__ == "__main__":
    main()
