"""Capture: run a pipeline, record what reaches its transformer, and feed it to the transformer's blocks one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quantdit.calibration import stats as statistics
from quantdit.calibration.stats import Stats
from quantdit.timesteps import timestep_of


@dataclass(frozen=True)
class Call:
    """One recorded call of a module, the timestep bucket it belongs to, and of a whole transformer what it returned."""

    args: tuple
    kwargs: dict
    bucket: int
    output: Tensor | None = None


class _Enough(Exception):
    """Ends a forward pass once the first block's inputs are known."""


def transformer_calls(run: Callable[[], object], transformer: nn.Module, steps: int, buckets: int) -> list[Call]:
    """Record the transformer's calls while `run()` samples from its pipeline.

    The calls of one sampling step (one or two, as the pipeline does its guidance) share a timestep; `steps` sampling steps are
    cut into `buckets` of equal length, the noisiest first.

    Raises:
        ValueError: `run` never called the transformer.
    """
    seen: list[tuple[tuple, dict, object]] = []
    outputs: list[Tensor | None] = []

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        timestep = timestep_of(args, kwargs)
        seen.append((_detached(args), _detached(kwargs), ("call", len(seen)) if timestep is None else timestep))

    def record_output(module: nn.Module, args: tuple, output: object) -> None:
        outputs.append(_detached(first_tensor(output)))

    handles = [
        transformer.register_forward_pre_hook(record, with_kwargs=True),
        transformer.register_forward_hook(record_output),
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError("the pipeline never called its transformer while sampling, so there is nothing to calibrate on")
    order = {t: i for i, t in enumerate(dict.fromkeys(t for *_, t in seen))}
    bucket = {t: min(i * buckets // max(steps, len(order)), buckets - 1) for t, i in order.items()}
    return [Call(args, kwargs, bucket[t], output) for (args, kwargs, t), output in zip(seen, outputs, strict=True)]


def first_tensor(output: object) -> Tensor | None:
    """Return the first tensor of a transformer's output: itself, the first of a tuple, or of a diffusers output's fields."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return next((v for v in values if isinstance(v, Tensor)), None)


def model_error(transformer: nn.Module, calls: list[Call]) -> float | None:
    """Return rel_rmse of the transformer's output against what `calls` recorded; None if they recorded nothing."""
    error = power = 0.0
    for call in calls:
        if call.output is not None:
            got = first_tensor(run_call(transformer, call))
            error += float((got.float() - call.output.float()).square().sum())
            power += float(call.output.float().square().sum())
    return (error / power) ** 0.5 if power > 0 else None


def first_block_calls(transformer: nn.Module, block: nn.Module, calls: list[Call]) -> list[Call]:
    """Return the calls that reach the first block when `calls` are made of the transformer."""
    found: list[Call] = []

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append(Call(_detached(args), _detached(kwargs), bucket))
        raise _Enough

    handle = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for call in calls:
            bucket = call.bucket
            try:
                run_call(transformer, call)
            except _Enough:
                continue
    finally:
        handle.remove()
    return found


def next_block_call(call: Call, output: object, carry: tuple[str, ...]) -> Call:
    """Return the call of the next block: what this one returned, in place of the arguments named `carry`."""
    outputs = output if isinstance(output, tuple) else (output,)
    if len(outputs) != len(carry):
        raise ValueError(f"a block returned {len(outputs)} values, its adapter carries {carry}; this class needs an adapter")
    args, kwargs = list(call.args), dict(call.kwargs)
    for position, (name, value) in enumerate(zip(carry, outputs, strict=True)):
        if name in kwargs:
            kwargs[name] = value
        else:
            args[position] = value
    return replace(call, args=tuple(args), kwargs=kwargs)


def run_call(module: nn.Module, call: Call) -> object:
    """Make a recorded call, without gradients."""
    with torch.no_grad():
        return module(*call.args, **call.kwargs)


@contextmanager
def collecting(linears: dict[str, nn.Linear], buckets: int, result: dict[str, Stats]) -> Iterator[Callable[[int], None]]:
    """Collect the Stats of every linear into `result` while the body runs; yields a setter for the current bucket.

    Linears called with the very same tensor (q, k and v) share one Stats object, so its Gram matrix is summed once.

    Raises:
        ValueError: an input has NaN or infinite entries; the layer is named.
    """
    bucket = 0
    owner: dict[str, str] = {}
    latest: tuple[Tensor, str] | None = None

    def hook(name: str) -> Callable[[nn.Module, tuple], None]:
        def collect(module: nn.Module, args: tuple) -> None:
            nonlocal latest
            x = args[0]
            if name not in owner:
                owner[name] = latest[1] if latest is not None and latest[0] is x else name
                if owner[name] == name:
                    result[name] = statistics.init(module.in_features, buckets)
            latest = (x, owner[name])
            if owner[name] == name:
                try:
                    result[name] = statistics.update(result[name], x, bucket)
                except ValueError as error:
                    raise ValueError(
                        f"calibration: layer {name}: {error}; the model itself is broken, or its dtype too narrow"
                    ) from error

        return collect

    def set_bucket(value: int) -> None:
        nonlocal bucket
        bucket = value

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        yield set_bucket
    finally:
        for handle in handles:
            handle.remove()
    for name, first in owner.items():
        result[name] = result[first]


def _detached(value):
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _detached(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_detached(v) for v in value)
    return value
