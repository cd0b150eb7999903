"""Does an exported graph compute what PyTorch computes? The whole of it, and every part of it on PyTorch's own values.

Rounding activations to 8 bits makes a transformer chaotic in the small: a difference in the last bit of a float32 puts a few
values on the other side of a rounding tie, each of which is an error of a whole step, which puts more values across. PyTorch
itself, its inputs changed by one part in a million, moves its output by `ties`, often more than TOLERANCE. So the graph is
also cut at every quantized layer, each part is given what PyTorch gave it, and each must agree within TOLERANCE; the output of
the whole may then differ by TIES times what PyTorch's own does.
"""

from __future__ import annotations

import gc
import inspect
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from quantdit.calibration import errors
from quantdit.checkpoints import checkpoint
from quantdit.exporters import onnx_session
from quantdit.exporters.onnx_session import OnnxForward, arguments_of
from quantdit.models.adapter import adapter_for
from quantdit.models.prediction import prediction_of
from quantdit.pipelines.sampling import sample
from quantdit.pipelines.source import BareTransformer
from quantdit.recipes.sampling_plan import SamplingPlan, Size
from quantdit.system import memory

TOLERANCE = 1e-3
TIES = 4.0
# Of layers whose 8-bit activations ONNX Runtime rounds its own way: both ways are off by 0.5 to 2 %, independently. What a whole
# transformer makes of that depends on the transformer; the limit only catches what is plainly wrong.
LOSSY = 5e-2
LOSSY_OUTPUT = 0.2
LAST_BITS = 1e-6  # what a transformer's float32 arithmetic in another order amounts to, relative
KEEP_DECODED_WEIGHTS = 2**28


@dataclass(frozen=True)
class Recorded:
    """One call of the transformer: its arguments by name, what PyTorch returned, and how long it took."""

    arguments: dict[str, object]
    output: Tensor
    seconds: float


@dataclass(frozen=True)
class Cut:
    """Names of the values that enter and leave a layer in the graph."""

    entering: str
    leaving: str


def recorded_calls(pipeline: object, part: str) -> list[Recorded]:
    """Return the calls of a transformer while samples are made in two steps, each with what PyTorch returned.

    Two samples; one where the weights are decoded at every call, which then takes long.
    """
    transformer = getattr(pipeline, part)
    adapter = adapter_for(transformer)
    signature = inspect.signature(type(transformer).forward)
    started: list[tuple[float, dict]] = []
    calls: list[Recorded] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        started.append((time.perf_counter(), arguments_of(signature, (module, *args), kwargs)))

    def after(module: nn.Module, args: tuple, output: object) -> None:
        begun, arguments = started[-1]
        calls.append(Recorded(arguments, _predicted(output).clone(), time.perf_counter() - begun))

    handles = [transformer.register_forward_pre_hook(before, with_kwargs=True), transformer.register_forward_hook(after)]
    video = any("frames" in spec.shape for spec in adapter.inputs)
    kept = all(layer.cache_decoded for layer in checkpoint.quant_layers(transformer).values())
    # A class with a table of positions is traced at its own size, the one that its graph can be used with.
    own = getattr(transformer.config, "sample_size", None)
    side = own if isinstance(own, int) else 8
    settings = SamplingPlan(samples=2 if kept else 1, steps=2, latent=Size(1, 3 if video else 1, side, side, 16))
    try:
        with torch.no_grad():
            parts = [part] if isinstance(pipeline, BareTransformer) else []
            sample(pipeline, settings, dict.fromkeys(parts, adapter))
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise ValueError(f"the pipeline never called its {part} while sampling, so there is nothing to trace")
    return calls


def keep_decoded(transformer: nn.Module, kept: bool | None = None) -> None:
    """Let layers keep their decoded weights between calls, or not; None: if they are few."""
    layers = checkpoint.quant_layers(transformer).values()
    if kept is None:
        kept = sum(layer.in_features * layer.out_features for layer in layers) <= KEEP_DECODED_WEIGHTS
    for layer in layers:
        layer.cache_decoded = kept
        layer.forget()


def verified(
    transformer: nn.Module, path: Path, calls: list[Recorded], cuts: Mapping[str, Cut], lossy: Sequence[str], save_memory: bool
) -> dict:
    """Return how far the graph is from PyTorch and how fast it is.

    PyTorch computes first; then the transformer gives up its weights, so that they and ONNX Runtime's are not in memory together.

    Returns:
        `rel_rmse` of the output over all calls, `parts_rel_rmse` of the worst part on PyTorch's values and its name, `ties`
        (what PyTorch's output moves when its inputs' last bits change), milliseconds of the last call.

    Raises:
        ValueError: the graph computes something else.
    """
    import onnx
    import onnxruntime

    onnx.checker.check_model(path)
    entered, left = _layer_values(transformer, calls[0])
    ties = rel_rmse((_moved(transformer, call), call.output) for call in calls)
    transformer.to("meta")
    gc.collect()  # what was traced hangs together in cycles, and on the weights
    memory.give_back()
    forward = OnnxForward(transformer, path, *onnx_session.open_graph(path, save_memory=save_memory))
    outputs, seconds = [], 0.0
    for call in calls:
        begun = time.perf_counter()
        outputs.append(forward.run(call.arguments))
        seconds = time.perf_counter() - begun
    found = rel_rmse((got, call.output) for got, call in zip(outputs, calls, strict=True))
    del forward
    # The values of the graph by name: what PyTorch has in their place. Layers with one input (q, k, v) share its value.
    known = {cuts[name].entering: x for name, x in entered.items()} | {cuts[name].leaving: y for name, y in left.items()}
    parts = _parts(path, calls[0], cuts, known, save_memory)
    rounded = {cuts[name].leaving for name in lossy}
    worst = max(parts, key=lambda name: parts[name] / (LOSSY if name in rounded else TOLERANCE))
    error, allowed = parts[worst], LOSSY if worst in rounded else TOLERANCE
    if not all(part <= (LOSSY if name in rounded else TOLERANCE) for name, part in parts.items()):  # NaN is not
        raise ValueError(
            f"{worst} differs from PyTorch by {error:.2g} (rel_rmse; at most {allowed:.0e}), so the graph was not written; this"
            " is a defect of quantdit, please report it with the model's class and the recipe"
        )
    if not found <= max(TOLERANCE, TIES * ties, LOSSY_OUTPUT if lossy else 0):
        raise ValueError(
            f"the graph's output differs from PyTorch's by {found:.2g} (rel_rmse), more than rounding ties explain ({ties:.2g}),"
            " so it was not written; this is a defect of quantdit, please report it with the model's class and the recipe"
        )
    return {
        "rel_rmse": found,
        "parts_rel_rmse": error,
        "worst_part": worst,
        "ties": ties,
        "calls": len(calls),
        "milliseconds": round(seconds * 1e3, 2),
        "milliseconds_torch": round(calls[-1].seconds * 1e3, 2),
        "threads": torch.get_num_threads(),
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
    }


def rel_rmse(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return ||got - expected|| / ||expected|| over all pairs; inf where only errors are not zero, 0 where nothing is."""
    error = power = 0.0
    for got, expected in pairs:
        squares = errors.squares(got.double(), expected.double())
        error, power = error + squares[0], power + squares[1]
    return math.inf if error and not power else errors.relative(error, power)


def _moved(transformer: nn.Module, call: Recorded) -> Tensor:
    """Return PyTorch's output for the same call with other last bits of its inputs, times excepted."""
    generator = torch.Generator().manual_seed(0)

    def moved(name: str, value: object) -> object:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
            return value * (1 + LAST_BITS * torch.randn(value.shape, generator=generator))
        return value

    with torch.no_grad():
        return _predicted(transformer(**{name: moved(name, value) for name, value in call.arguments.items()}))


def _predicted(output: object) -> Tensor:
    tensor = prediction_of(output)
    assert tensor is not None  # a transformer returns one
    return tensor


def _parts(
    path: Path, call: Recorded, cuts: Mapping[str, Cut], known: Mapping[str, Tensor], save_memory: bool
) -> dict[str, float]:
    """Return rel_rmse of every part of the graph on PyTorch's own values, those `known`, by the value that leaves it."""
    cut = path.with_name(f"cut-{path.name}")
    fed = _cut_graph(path, cut, cuts)
    opened = onnx_session.session(cut, save_memory=save_memory)
    inputs = {i.name for i in opened.get_inputs()}
    feeds = {f"given {name}": known[name].float().numpy() for name in fed}
    arguments = {name: value for name, value in onnx_session.leaves(call.arguments) if name in inputs}
    feeds |= {i.name: onnx_session.as_numpy(arguments[i.name], i.type) for i in opened.get_inputs() if i.name in arguments}
    expected = {**known, opened.get_outputs()[0].name: call.output}
    names = [o.name for o in opened.get_outputs()]
    outputs = {name: np.asarray(got) for name, got in zip(names, opened.run(names, feeds), strict=True)}
    cut.unlink()
    return {name: rel_rmse([(torch.from_numpy(got), expected[name].reshape(got.shape))]) for name, got in outputs.items()}


def _layer_values(transformer: nn.Module, call: Recorded) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what enters and leaves every quantized layer in PyTorch."""
    entered: dict[str, Tensor] = {}
    left: dict[str, Tensor] = {}

    def hook(name: str):
        def after(module: nn.Module, args: tuple, output: Tensor) -> None:
            if name not in entered:  # of a layer that is called twice, the first call is compared
                entered[name], left[name] = args[0], output

        return after

    layers = checkpoint.quant_layers(transformer)
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            transformer(**call.arguments)
    finally:
        for handle in handles:
            handle.remove()
    return entered, left


def _cut_graph(path: Path, cut: Path, cuts: Mapping[str, Cut]) -> list[str]:
    """Write the graph cut at its layers: their values become outputs, and whoever used them is given an input instead.

    Returns:
        The names of the values that are given, as `given NAME`.
    """
    import onnx_ir as ir

    model = ir.load(path)
    graph = model.graph
    values = {output.name: output for node in graph for output in node.outputs} | {v.name: v for v in graph.inputs}
    fed = []
    for name in dict.fromkeys(name for c in cuts.values() for name in (c.entering, c.leaving)):
        value = values[name]
        given = ir.Value(name=f"given {name}", shape=value.shape, type=value.type)
        if any(value is output for output in graph.inputs):
            continue  # a layer that takes an argument of the call as it is
        ir.convenience.replace_all_uses_with([value], [given], replace_graph_outputs=False)
        if given.uses():
            graph.inputs.append(given)
            fed.append(name)
        if all(value is not output for output in graph.outputs):
            graph.outputs.append(value)
    model.metadata_props.clear()  # with the digest of the whole graph
    ir.save(model, cut)
    return fed
