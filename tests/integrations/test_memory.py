"""Memory after loading, measured from outside: what the process holds more than before is the file and the dense remainder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from quantdit.checkpoints.random_weights import write_random_transformer
from quantdit.system import files

WIDTH, BLOCKS = 1536, 2
CONFIG = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": WIDTH // 128,
    "attention_head_dim": 128,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 64,
    "freq_dim": 16,
    "ffn_dim": 2 * WIDTH,
    "num_layers": BLOCKS,
}

CHILD = """
import gc, json, sys, torch, quantdit
from diffusers import WanTransformer3DModel
from quantdit.system import memory
def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4096
small, large, how = sys.argv[1:]
read = quantdit.load if how == "load" else WanTransformer3DModel.from_pretrained
option = {"dtype" if how == "load" else "torch_dtype": torch.bfloat16}
read(small, **option)  # what only the first load imports and builds
before = resident()
model = read(large, **option)
after = resident()
held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
print(json.dumps({"grown": after - before, "held": held, "peak": memory.peak() - before}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small and a large checkpoint of made-up weights, 8 bits."""
    from quantdit.cli import main

    place, made = tmp_path_factory.mktemp("memory"), []
    for name, config in (("small", CONFIG | {"num_layers": 1, "num_attention_heads": 1, "ffn_dim": 128}), ("large", CONFIG)):
        write_random_transformer(config, place / name, seed=0)
        output = place / f"{name}-w8a8"
        assert main(["calibrate", "--model", str(place / name), "--bits", "w8a8", "--samples", "0", "--output", str(output)]) == 0
        made.append(output / "transformer")
    return made[0], made[1]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures resident memory as Linux counts it")
@pytest.mark.parametrize("how", ["load", "from_pretrained"])
def test_memory_after_loading_is_the_file_and_the_dense_remainder(folders: tuple[Path, Path], how: str):
    small, large = folders
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, str(small), str(large), how], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    stored = sum(path.stat().st_size for path in files.weight_files(large))
    # The dense remainder: what the file does not hold, or narrower. Tables of positions; what Wan keeps in float32.
    remainder = found["held"] - stored
    assert stored > 60e6 and remainder > 0
    assert 0.95 < found["grown"] / (stored + remainder) < 1.05, found
