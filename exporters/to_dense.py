"""Dense export: a quantized folder whose transformers and text encoders become ordinary ones that need no quantdit."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from quantdit.checkpoints import checkpoint
from quantdit.compiling.report import REPORT
from quantdit.compiling.work_folder import copy_rest
from quantdit.layers.quant_embedding import put_dense
from quantdit.pipelines.arguments import dtype_of
from quantdit.pipelines.components import COMPONENTS
from quantdit.system import files


def to_dense(folder: Path, output: Path, dtype: torch.dtype | str = torch.bfloat16, accept_config: bool = False) -> None:
    """Write the pipeline of `folder`, or the transformer alone that lies in it, dequantized, rotations undone, as `dtype`.

    Weights are quantized ones; activations are no longer quantized. A transformer or text encoder that is not quantized is
    copied as it is. `dtype`: as `pipeline.dtype_of` takes it. `accept_config`: as `checkpoint.read_transformer` takes it.

    Raises:
        ValueError: `folder` is no quantdit checkpoint (CheckpointError), another dtype, or `output` is not empty.
        OSError: the output cannot be written.
    """
    dtype = dtype_of(dtype)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} exists and is not an empty folder; choose another")
    bare = (folder / "config.json").exists()
    if not bare and not (folder / "transformer").is_dir():
        raise files.CheckpointError(f"{folder} has no transformer folder; give the folder that quantdit calibrate wrote")
    parts = ("",) if bare else tuple(part for part in COMPONENTS if (folder / part).is_dir())
    quantized = tuple(part for part in parts if checkpoint.is_quantized(folder / part)) or parts[:1]  # which is then refused
    transformers = {part: _dense(checkpoint.read_transformer(folder / part, accept_config=accept_config)) for part in quantized}
    output.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: OUTPUT.partial may hold an interrupted calibration.
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        partial.chmod(0o755)
        if not bare:
            copy_rest(folder, partial, (*quantized, REPORT))
        for part, transformer in transformers.items():
            for parameter in transformer.parameters():
                parameter.data = parameter.data.to(dtype)
            transformer.save_pretrained(partial / part)
        if output.exists():
            output.rmdir()
        os.replace(partial, output)
    except SafetensorError as error:
        raise OSError(f"cannot write {output}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _dense(transformer: nn.Module) -> Any:  # a ModelMixin or a PreTrainedModel
    put_dense(transformer, torch.float32)
    return transformer
