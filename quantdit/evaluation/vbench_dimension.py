"""Scores a folder of clips by one dimension of VBench. A script for VBench's own environment, so it imports nothing of ours.

    DIR/bin/python -I vbench_dimension.py VIDEOS RESULTS DIMENSION [WEIGHTS]

The package's own command demands a GPU of Nvidia's, starts whichever `python` is on the path, and returns 0 when it fails; its
class does without. WEIGHTS: all networks are there, nothing is fetched.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

NAME = "clips"  # of the results: `clips_eval_results.json`
DINO = "dino_vitbase16_pretrain.pth"


def score(videos: str, results: str, dimension: str, weights: str | None = None) -> None:
    """Write the results of a folder of clips."""
    if weights is not None:
        os.environ["VBENCH_CACHE_DIR"] = weights  # read when vbench is imported
    import torch
    import vbench

    with tempfile.TemporaryDirectory() as hub:
        if weights is not None:
            # DINO's code, which VBench loads through torch.hub, looks for its weights among those that the hub fetched before.
            found = Path(hub, "checkpoints", DINO)
            found.parent.mkdir()
            found.symlink_to(Path(weights, "dino_model", DINO))
            torch.hub.set_dir(hub)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        known = str(Path(vbench.__path__[0], "VBench_full_info.json"))
        judge = vbench.VBench(device, known, results)
        judge.evaluate(videos, NAME, dimension_list=[dimension], local=weights is not None, mode="custom_input")


if __name__ == "__main__":
    score(*sys.argv[1:])
