"""quantdit in a script: load a quantized folder in one line, or quantize a transformer that is in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

import quantdit
from quantdit import block_by_block, checkpoint, files
from quantdit import recipe as recipes
from quantdit.block_by_block import Job
from quantdit.calibration import capture
from quantdit.calibration.calls import StoredCalls
from quantdit.diffusers_quantizer import attach
from quantdit.models import adapter as adapters
from quantdit.pipeline import BareTransformer, load_pipeline
from quantdit.recipe import Recipe
from quantdit.sampling import Settings

BUCKETS = Settings().buckets


def load(folder: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Return the diffusers pipeline of a folder that `quantdit calibrate` wrote, or the transformer of one that has no more.

    Args:
        folder: of the pipeline, or of a transformer alone.
        device: where to.
        dtype: of what is not quantized.

    Raises:
        ValueError: no diffusers folder, or a damaged checkpoint (files.CheckpointError).
    """
    pipeline, source = load_pipeline(str(folder), dtype, device)
    if isinstance(pipeline, BareTransformer):
        return getattr(pipeline, source.parts[0]).to(device)
    return pipeline


def quantize(
    transformer: nn.Module,
    recipe: Recipe | Mapping | str | Path,
    inputs: Iterable[Mapping[str, object]] | Callable[[], object] | None = None,
    seed: int = 0,
    tokens: int = 0,
) -> nn.Module:
    """Quantize a diffusers transformer in place, as `quantdit calibrate` does, and return it.

    Its outputs are those of the folder that `save_pretrained` then writes, bit for bit.

    Args:
        transformer: in full precision, all of it in memory.
        recipe: bits such as `w4a8`, the path of a TOML file, or a Recipe.
        inputs: what to calibrate on: a list of the keyword arguments of calls, in the order of sampling; or a function that has
            the transformer called, such as `lambda: pipeline("a fox", num_inference_steps=20)`. None: no data, round to nearest.
        seed: of random signs, k-means and the choice of rows.
        tokens: rows of each call that statistics are made of, evenly spread; 0 for all.

    Raises:
        ValueError: a recipe that does not fit, weights or activations with NaN or infinite entries, a transformer that is
            quantized already or that `inputs` never calls, `weight = "auto"`.
    """
    if not isinstance(transformer, nn.Module):
        raise ValueError(f"quantize takes a transformer, got a {type(transformer).__name__}; give pipeline.transformer")
    if checkpoint.quant_layers(transformer):
        raise ValueError(f"this {type(transformer).__name__} is quantized already; quantize the full-precision model")
    plan = recipes.from_any(recipe) if inputs is not None else recipes.without_data(recipes.from_any(recipe))
    adapter = adapters.adapter_for(transformer)
    plans = recipes.resolve(plan, adapters.layers(transformer, adapter))
    if not plans:
        raise ValueError(f"recipe {plan.name} leaves every layer dense, so there is nothing to quantize")
    for name, tensor in transformer.state_dict().items():
        files.check_finite(name, tensor)
    transformer.requires_grad_(False).eval()
    with tempfile.TemporaryDirectory(prefix="quantdit-") as folder:
        calls = StoredCalls(()) if inputs is None else _record(transformer, inputs, Path(folder) / "calls")
        blocks = block_by_block.blocks_of(transformer, adapter)
        job = Job(transformer, blocks, calls, BUCKETS, seed, Path(folder), tokens=tokens)
        with torch.no_grad():
            block_by_block.quantize(job, plans, Path(folder) / "blocks")
    provenance = {"quantdit": quantdit.__version__, "calibration": {"calls": len(calls), "seed": seed, "tokens": tokens}}
    return attach(transformer, checkpoint.describe(transformer, plan.to_dict(), provenance))


def _record(transformer: nn.Module, inputs: Iterable[Mapping[str, object]] | Callable[[], object], folder: Path) -> StoredCalls:
    def run() -> None:
        for call in inputs:
            transformer(**call)

    given = inputs if callable(inputs) else run
    # Timesteps are counted as they come, so the number of sampling steps need not be known.
    return capture.transformer_calls(given, {"transformer": transformer}, 1, BUCKETS, folder)["transformer"]
