"""quantdit in a script: load a quantized folder in one line, or quantize a transformer that is in memory."""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from quantdit.calibration.observe import capture
from quantdit.calibration.observe.recorded_calls import StoredCalls
from quantdit.checkpoints import checkpoint, class_tree
from quantdit.checkpoints.libraries import TRANSFORMERS, Library, library_of
from quantdit.compiling import quantize_blocks
from quantdit.compiling.job import Job
from quantdit.compiling.plan import Plan, check, check_finite, component
from quantdit.integrations.attaching import attach
from quantdit.models.text_encoders import without_cache
from quantdit.pipelines.arguments import checked_numbers, dtype_of, guesses_options
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.pipelines.source import MODEL, BareTransformer
from quantdit.recipes.presets import BEST, encoder_preset, finetuning_for, finetuning_of, from_any, is_bits
from quantdit.recipes.resolve import without_data
from quantdit.recipes.rules import AUTO, Recipe
from quantdit.recipes.sampling_plan import SamplingPlan
from quantdit.system import files
from quantdit.system.threads import one_thread
from quantdit.system.version import VERSION

BUCKETS = SamplingPlan.buckets
ERRORS = ("rel_rmse", "weight_only_rel_rmse", "rms", "weight_rel_rmse")  # of a layer's report, those that a folder keeps
# What a model raises that is called with what it does not take.
MISFITS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError)


@guesses_options
def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    accept_config: bool = False,
):
    """Return the diffusers pipeline of a folder, quantized or not; of the folder of a transformer alone, that transformer.

    Args:
        folder: of a pipeline or a transformer; or, as text, a hub id or a name that `quantdit models` lists.
        device: where to.
        dtype: of what is not quantized: torch.float32, torch.bfloat16, torch.float16, or the name of one of them.
        accept_config: take a quantized model whose config.json, or whose scheduler's, was changed after it was calibrated.

    Raises:
        ValueError: no diffusers folder, a damaged checkpoint (files.CheckpointError), no such device, another dtype.
    """
    wanted = dtype_of(dtype)
    files.check_path("folder", folder, MODEL)
    if isinstance(folder, Path) and not folder.expanduser().exists():
        raise ValueError(f"folder {folder} does not exist; give one that quantdit calibrate or save_pretrained wrote")
    pipeline, source = load_pipeline(str(folder), wanted, device, accept_config=accept_config)
    if isinstance(pipeline, BareTransformer):
        return getattr(pipeline, source.components[0]).to(device)
    return pipeline


@guesses_options
def quantize(
    transformer: nn.Module,
    recipe: Recipe | Mapping | str | Path,
    inputs: Iterable[Mapping[str, object]] | Callable[[], object] | None = None,
    seed: int = 0,
    tokens: int = 0,
    finetune_steps: int | None = None,
    method: str = BEST,
) -> nn.Module:
    """Quantize a transformer of diffusers, or a text encoder of transformers, in place, as `quantdit calibrate` does; returns it.

    Its outputs are those of the folder that `save_pretrained` then writes, bit for bit. One that torch.compile wrapped is
    quantized inside, and compiled anew when it is called next.

    Args:
        transformer: in full precision, all of it in memory.
        recipe: bits such as `w4a8`, of a text encoder those of presets.ENCODER_BITS; the path of a TOML file, or a Recipe.
        inputs: what to calibrate on: a function that has the transformer called, such as
            `lambda: pipeline("a fox", num_inference_steps=20)`; or the calls themselves in the order of sampling, each a
            dictionary of the keyword arguments of `transformer.forward`, tensors of the shapes, dtype and device that the
            transformer is used with, in any number (a generator does). None: no data, round to nearest.
        seed: of random signs, k-means and the choice of rows.
        tokens: rows of each call that statistics are made of, evenly spread; 0 for all.
        finetune_steps: of the optimizer that trains scales, biases and codebooks on each block's outputs; None: as many as
            the method takes for these bits (`best`: w2 with inputs 300, others none; `vq4dit` 500).
        method: with bits, whose: `best`, today's presets, or a paper's of presets.METHODS, which needs inputs.

    Raises:
        ValueError: a recipe that does not fit or leaves widths open (`auto`), steps without inputs or with nothing to train,
            inputs that the transformer cannot be called with or that never call it, weights that are NaN, infinite, not in
            memory or quantized already, by quantdit or by another tool; an option that there is not, or a number that is none;
            adapters, fused projections or anything else that the
            class does not build from its config. Its weights are then as they were. If activations turn out NaN or infinite, the
            blocks before are quantized: load it again.
    """
    asked = {"seed": seed, "tokens": tokens, "finetune_steps": finetune_steps}
    checked = checked_numbers(asked, optional=("finetune_steps",))
    given, transformer = transformer, getattr(transformer, "_orig_mod", transformer)  # of torch.compile
    _check_transformer(transformer)
    chosen = _recipe(recipe, method, inputs is not None, library_of(transformer))
    finetuning = finetuning_for(chosen, finetuning_of(recipe, method), inputs is not None, steps=checked["finetune_steps"])
    if finetuning is not None and inputs is None:
        raise ValueError(f"finetune_steps = {finetune_steps} needs inputs to train on; give quantdit.quantize some inputs=")
    plan = Plan(chosen, SamplingPlan(seed=seed, tokens=tokens), finetuning)
    part = component(transformer, chosen)
    check(plan, {"transformer": part})
    _cast_up(transformer)
    if away := [key for key, tensor in transformer.state_dict().items() if tensor.device.type == "meta"]:
        raise ValueError(f"{away[0]} is not in memory; remove what offloads the transformer, or use quantdit calibrate")
    check_finite(transformer)
    transformer.requires_grad_(False).eval()
    dtypes = {name: transformer.get_parameter(f"{name}.weight").dtype for name in part.plans}
    with _eager(), without_cache((transformer,)), tempfile.TemporaryDirectory(prefix="quantdit-") as name:
        folder = Path(name)
        calls = StoredCalls(()) if inputs is None else _record(transformer, inputs, folder / "calls", chosen.edge_steps)
        with torch.no_grad(), one_thread():
            made = quantize_blocks.quantize(Job(transformer, part.blocks, calls, plan, folder), part.plans, folder / "blocks")
    for name, layer in checkpoint.quant_layers(transformer).items():
        layer.weight_dtype = dtypes[name]
    attach(transformer, checkpoint.describe(transformer, chosen.to_dict(), _provenance(plan, len(calls), made.reports)))
    return given


def _provenance(plan: Plan, calls: int, reports: Mapping[str, dict]) -> dict:
    """Return what a folder says of how it was made; of its layers what `inspect` shows where there is no calibration report."""
    found = {
        "quantdit": VERSION,
        "calibration": {"calls": calls, "seed": plan.sampling.seed, "tokens": plan.sampling.tokens},
        "layers": {name: {k: v for k, v in report.items() if k in ERRORS} for name, report in reports.items()},
    }
    return found if plan.finetuning is None else found | {"training": asdict(plan.finetuning)}


def _check_transformer(transformer: object) -> None:
    """Refuse what is no transformer in full precision, as its class builds it."""
    cls = type(transformer).__name__
    if not isinstance(transformer, nn.Module):
        raise ValueError(f"quantize takes a transformer, got a {cls}; give pipeline.transformer")
    if checkpoint.quant_layers(transformer):
        raise ValueError(f"this {cls} is quantized already; quantize the full-precision model")
    if (tool := class_tree.quantized_by(transformer)) is not None:
        raise ValueError(
            f"this {cls} is quantized by {tool}; dequantize() it first where the tool can, or quantize the full-precision model"
        )
    if (wrong := class_tree.difference(transformer)) is not None:
        raise ValueError(f"this {cls} is not as its class builds it: {wrong}")


def _recipe(given: Recipe | Mapping | str | Path, method: str, has_inputs: bool, library: Library) -> Recipe:
    """Return the recipe that is meant, with what needs data left out of it where there are no inputs."""
    is_encoder = library is TRANSFORMERS
    if is_encoder and method != BEST:
        raise ValueError(f"method {method!r} is of transformers, not of text encoders; leave out method=")
    recipe = encoder_preset(given) if is_encoder and is_bits(given) else from_any(given, method)
    if not has_inputs and method != BEST:
        raise ValueError(f"method {method!r} calibrates; give quantdit.quantize some inputs=, or leave out method=")
    if any(rule.weight == AUTO for rule in recipe.rules):
        raise ValueError(
            f"recipe {recipe.name} leaves widths open, which quantdit.quantize does not choose; give bits such as 'w4a8', or have"
            " the command line choose: quantdit calibrate --bits auto --max-output-error 0.02"
        )
    if recipe.steps is not None:
        raise ValueError(
            f"recipe {recipe.name} asks for a step plan, which is chosen by sampling with the whole pipeline: use"
            " quantdit.calibrate, or leave out [steps]"
        )
    return recipe if has_inputs else without_data(recipe, "give quantdit.quantize some inputs=")


def _cast_up(transformer: nn.Module) -> None:
    """Cast float8 tensors, which nothing computes with, to the dtype of the others."""
    tensors = [t for t in (*transformer.parameters(), *transformer.buffers()) if t.is_floating_point()]
    wide = next((t.dtype for t in tensors if t.dtype.itemsize > 1), torch.float32)
    for tensor in tensors:
        if tensor.dtype.itemsize == 1:
            tensor.data = tensor.data.to(wide)


def _eager() -> AbstractContextManager:
    """Return a context in which compiled modules run as they were written: calibration looks at what passes through them."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes a second
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _record(
    transformer: nn.Module, inputs: Iterable[Mapping[str, object]] | Callable[[], object], folder: Path, edge_steps: int
) -> StoredCalls:
    if callable(inputs):
        _check_takes_nothing(inputs)
    given = inputs if callable(inputs) else lambda: _call(transformer, inputs)
    # Timesteps are counted as they come, so the number of sampling steps need not be known.
    found = capture.transformer_calls(given, {"transformer": transformer}, 1, BUCKETS, folder, edge_steps=edge_steps)
    return found["transformer"]


def _check_takes_nothing(inputs: Callable) -> None:
    """Refuse a function, a pipeline or a module that cannot be called without arguments.

    Raises:
        ValueError: naming the first argument that it needs.
    """
    try:
        signature = inspect.signature(inputs.forward if isinstance(inputs, nn.Module) else inputs)
    except ValueError:  # some functions of C have none
        return
    try:
        signature.bind()
    except TypeError as error:
        name = getattr(inputs, "__name__", type(inputs).__name__)
        raise ValueError(
            f"inputs= is a function without arguments, but {name} is {error}; give inputs=lambda: pipeline(...)"
        ) from error


def _call(transformer: nn.Module, inputs: Iterable[Mapping[str, object]]) -> None:
    """Call the transformer with each of the inputs.

    Raises:
        ValueError: it cannot be called with one of them, or there is none.
    """
    cls = type(transformer).__name__
    takes = ", ".join(inspect.signature(transformer.forward).parameters)
    expected = f"inputs= is a function, or a list with a dictionary for each call of {cls}, which takes {takes}"
    if isinstance(inputs, str | Mapping) or not isinstance(inputs, Iterable):
        raise ValueError(f"{expected}; got a {type(inputs).__name__}")
    number = -1
    for number, call in enumerate(inputs):
        if not isinstance(call, Mapping):
            raise ValueError(f"{expected}; inputs[{number}] is a {type(call).__name__}")
        try:
            transformer(**call)
        except MISFITS as error:
            reason = str(error).partition("\n")[0][:300]
            raise ValueError(f"{cls}, which takes {takes}, cannot be called with inputs[{number}]: {reason}") from error
    if number < 0:
        raise ValueError(f"{expected}; got an empty one")
