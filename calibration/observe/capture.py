"""Capture: run a pipeline, keep what reaches its transformers on disk, and collect what reaches the linears of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from quantdit.calibration import errors
from quantdit.calibration import stats as statistics
from quantdit.calibration.observe import recorded_calls as call_files
from quantdit.calibration.observe.block_order import predict, run_call
from quantdit.calibration.observe.recorded_calls import Call, StoredCalls
from quantdit.calibration.stats import Stats
from quantdit.models.call_view import times_rise, view
from quantdit.models.prediction import predicting, prediction_of
from quantdit.tensors.timesteps import buckets_of, rising


def transformer_calls(
    run: Callable[[], object],
    transformers: Mapping[str, nn.Module],
    steps: int,
    buckets: int,
    folder: Path,
    keep: int = 0,
    edge_steps: int = 0,
) -> dict[str, StoredCalls]:
    """Record the transformers' calls while `run()` samples from their pipeline; what `folder` holds already is not run again.

    The calls of one sampling step (one or two, as the pipeline does its guidance) share a timestep; `steps` sampling steps are
    cut into `buckets` of equal length, the noisiest first. Calls without a time count as one step.

    Args:
        run: samples from the pipeline.
        transformers: by the names that their calls are kept under.
        steps: sampling steps.
        buckets: parts of a trajectory.
        folder: where the calls are kept.
        keep: timesteps of each transformer that are kept, evenly spread; 0 for all.
        edge_steps: steps at each end of the trajectory, which all transformers share, that are a bucket of their own; 0 for none.

    Raises:
        ValueError: `run` never called one of the transformers, or in too few steps to have such edges.
    """
    places = {name: folder / name for name in transformers}
    found = {name: calls for name, place in places.items() if (calls := call_files.recorded(place)) is not None}
    if len(found) == len(places):
        return found
    seen: dict[str, list[float | None]] = {name: [] for name in transformers}
    handles = []
    for name, transformer in transformers.items():
        places[name].mkdir(parents=True, exist_ok=True)
        handles += _recording(transformer, places[name], seen[name])
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    for name, timesteps in seen.items():
        if not timesteps:
            raise ValueError(f"the pipeline never called its {name} while sampling, so there is nothing to calibrate on")
        order = _from_noise(transformers[name], timesteps)
        # Two transformers may share a trajectory, each with a part of its steps.
        edges = edge_steps if order != [None] else 0  # a text encoder has none
        times = [time for of in seen.values() if set(of) != {None} for time in of]
        whole = _from_noise(transformers[name], times) if edges else order
        bucket, levels = buckets_of(whole, steps, buckets, edges)
        kept = set(_spread(order, keep))
        for number, time in enumerate(timesteps):
            if time not in kept:
                call_files.forget_recorded(places[name], number)
        numbers = {number: bucket[time] for number, time in enumerate(timesteps) if time in kept}
        found[name] = call_files.finish_recorded(places[name], numbers, levels)
    return found


def _from_noise(transformer: nn.Module, timesteps: list[float | None]) -> list[float | None]:
    """Return the different timesteps of some calls, the noisiest first; None, of calls without a time, counts as the last."""
    times = [time for time in timesteps if time is not None]
    rise = times_rise(transformer)
    ordered: list[float | None] = [*sorted(set(times), reverse=not (rising(times) if rise is None else rise))]
    return [*ordered, None] if None in timesteps else ordered


def _recording(transformer: nn.Module, folder: Path, timesteps: list[float | None]) -> list:
    """Write each call of the transformer into the folder, and its timestep into the list; returns the hooks' handles."""

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        call_files.save_recorded(folder, len(timesteps), args, kwargs)
        timesteps.append(view(module, args, kwargs).time)

    def after(module: nn.Module, args: tuple, output: object) -> None:
        if (tensor := prediction_of(output)) is not None:
            call_files.save_returned(folder, len(timesteps) - 1, tensor)

    return [transformer.register_forward_pre_hook(before, with_kwargs=True), predicting(transformer).register_forward_hook(after)]


def _spread(items: list, count: int) -> list:
    """Return `count` of the items, evenly spread with both ends; all of them for 0."""
    if not 0 < count < len(items):
        return items
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def relative_error(pairs: Iterable[tuple[Tensor | None, Tensor | None]]) -> float | None:
    """Return rel_rmse over pairs of (what a transformer predicted, what was recorded); None if nothing was recorded."""
    error = power = 0.0
    for predicted, expected in pairs:
        if expected is not None:
            assert predicted is not None  # what was recorded is such a tensor
            squares = errors.squares(predicted.float(), expected.float())
            error, power = error + squares[0], power + squares[1]
    return errors.relative(error, power) if power > 0 else None


def model_error(transformer: nn.Module, calls: Iterable[Call]) -> float | None:
    """Return rel_rmse of the transformer's output against what `calls` recorded; None if they recorded nothing."""
    return relative_error((predict(transformer, call), call.output) for call in calls)


def run_block(module: nn.Module, call: Call) -> object:
    """Make a recorded call of a part of a model, static activation scales at the call's bucket."""
    set_bucket(module, call.bucket)
    return run_call(module, call)


def set_bucket(module: nn.Module, bucket: int) -> None:
    """Tell the layers with static activation scales which timestep bucket the next call is of."""
    for part in module.modules():
        if hasattr(part, "bucket"):
            part.bucket = bucket  # pyright: ignore[reportArgumentType] - its stub knows tensors and modules alone


@contextmanager
def collecting(
    linears: Mapping[str, nn.Linear], buckets: int, result: dict[str, Stats], tokens: int = 0
) -> Iterator[Callable[[int], None]]:
    """Collect the Stats of every linear into `result` while the body runs; yields a setter for the current bucket.

    Of each call at most `tokens` rows are taken, evenly spread (0: all of them). Linears called with the very same tensor (q, k
    and v) share one Stats object, so its Gram matrix is summed once.

    Raises:
        ValueError: an input has NaN or infinite entries; the layer is named.
    """
    bucket = 0
    owner: dict[str, str] = {}
    latest: tuple[Tensor, str] | None = None

    def hook(name: str) -> Callable[[nn.Linear, tuple], None]:
        def collect(module: nn.Linear, args: tuple) -> None:
            nonlocal latest
            x = args[0]
            if not x.numel():
                return  # an expert that no token was sent to
            if name not in owner:
                owner[name] = latest[1] if latest is not None and latest[0] is x else name
                if owner[name] == name:
                    result[name] = statistics.init(module.in_features, buckets)
            latest = (x, owner[name])
            if owner[name] == name:
                try:
                    result[name] = statistics.update(result[name], _thinned(x, tokens, result[name].count), bucket)
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


def _thinned(x: Tensor, tokens: int, start: int) -> Tensor:
    """Return at most `tokens` of the rows of x `[..., k]`, as one tensor `[r, k]`."""
    x = x.reshape(-1, x.shape[-1])
    return x[statistics.spread(len(x), start, tokens)] if 0 < tokens < len(x) else x
