"""Made-up weights in the true shapes of a model, to measure time, memory and size without the download.

Heavy tails (Student's t) and a few output channels of far larger size, as trained transformers have, so that methods which look
for outliers find some. The pictures of such a model mean nothing.
"""

from __future__ import annotations

import math
import shutil
import zlib
from pathlib import Path

import torch
from torch import Tensor

from quantdit.checkpoints.checkpoint import build_on_meta, stored_state
from quantdit.checkpoints.libraries import library_of
from quantdit.system.files import read_json, write_json, write_tensors

TAIL = 5  # degrees of freedom
OUTLIER_EVERY, OUTLIER_SCALE = 256, 8.0
TABLE_BITS = 16
MARK = ".made-up.json"


def open_scratch(folder: Path, identity: dict) -> None:
    """Begin a folder for made-up weights, or go on with one of the same identity (the model, the seed).

    Raises:
        ValueError: the folder holds something else.
    """
    mark = folder / MARK
    if folder.exists() and not (mark.exists() and read_json(mark) == identity):
        if not folder.is_dir() or (not mark.exists() and any(p.name != f"{MARK}.part" for p in folder.iterdir())):
            raise ValueError(f"{folder} is where made-up weights would go, but holds something else; move it away")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(mark, identity)


def write_random_transformer(config: dict, folder: Path, seed: int) -> None:
    """Write a transformer's or a text encoder's folder, weights bfloat16; one that has its config.json is left as it is.

    Args:
        config: the content of config.json.
        folder: to write.
        seed: the same seed and config give the same bytes.

    Raises:
        CheckpointError: a config that no model can be built from.
        OSError: the folder cannot be written.
    """
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    model = build_on_meta(config, folder)
    norms = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    table, state = _quantiles(), stored_state(model)

    def read(name: str) -> Tensor:
        tensor = state[name]
        if tensor.device.type != "meta":
            return tensor  # computed by the class, such as a table of positions
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        return _random(name, tuple(tensor.shape), name.rpartition(".")[0] in norms, table, generator).to(torch.bfloat16)

    write_tensors(folder, state, read, {"format": "pt"}, weights=library_of(model).weights)
    write_json(folder / "config.json", config)


def _random(name: str, shape: tuple[int, ...], of_norm: bool, table: Tensor, generator: torch.Generator) -> Tensor:
    if of_norm and name.endswith("weight"):
        return 1 + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float32)
    if len(shape) < 2 or name.endswith("bias"):
        return 0.02 * torch.randn(shape, generator=generator, dtype=torch.float32)
    numbers = torch.randint(len(table), shape, generator=generator, dtype=torch.int32)
    weight = table[numbers] / math.sqrt(math.prod(shape[1:]))
    # Rows of a weight are its output channels: the next layer meets them as outliers of its input.
    weight[::OUTLIER_EVERY] *= OUTLIER_SCALE
    return weight


def _quantiles() -> Tensor:
    """Return the quantiles of Student's t of TAIL degrees of freedom, scaled to variance 1, `[2^TABLE_BITS]` float32.

    Drawing from this table costs a tenth of drawing from the distribution.
    """
    from scipy.stats import t

    count = 2**TABLE_BITS
    levels = t.ppf((torch.arange(count).double().numpy() + 0.5) / count, TAIL)
    return torch.from_numpy(levels / math.sqrt(TAIL / (TAIL - 2))).float()
