"""Which timesteps to calibrate on: those that move the sample most and that suffer most from quantized weights.

After S2Q-VDiT (Feng et al. 2025, arXiv 2508.04016, Hessian-aware salient data selection): a timestep's salience is its
diffusion salience, how far the sample moves there, times its quantization salience `dW H dW^T` with `H = x x^T`, the output error
of rounded weights on its activations. Ours measures the second at the first block alone, so that it costs one block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from quantdit.calibration.observe.block_order import first_call, run_call
from quantdit.calibration.observe.recorded_calls import Call, StoredCalls
from quantdit.models.call_view import times_rise, view
from quantdit.system.threads import one_thread
from quantdit.tensors.timesteps import rising

LEVELS = 7  # of symmetric int4, to each side


@one_thread()
def salient_calls(transformer: nn.Module, first_block: str, calls: StoredCalls, count: int) -> StoredCalls:
    """Return the calls of the `count` timesteps of the largest salience, in the order they were made.

    Args:
        transformer: the model, its first block in memory.
        first_block: path of the block that runs first.
        calls: of the transformer, in the order they were made.
        count: how many timesteps; all if there are no more.
    """
    moved, harmed = defaultdict(list), defaultdict(list)
    deltas = _rounding_errors(transformer.get_submodule(first_block))
    times = [_time_and_sample(transformer, call)[0] for call in calls]
    rise = times_rise(transformer)
    sign = -1 if (rising(times) if rise is None else rise) else 1
    latest: tuple[float, Tensor] | None = None
    for time, call in zip(times, calls, strict=True):
        sample = _time_and_sample(transformer, call)[1].float()
        # The calls of one step share the sample; a time back towards noise begins another trajectory.
        if latest is not None and sign * time < sign * latest[0] and sample.shape == latest[1].shape:
            moved[latest[0]].append(float((sample - latest[1]).square().mean()))
        latest = time, sample
        harmed[time].append(_harm(transformer, first_block, call, deltas))
    # The last step has no next sample: it counts as the mean of the others.
    usual = _mean([m for values in moved.values() for m in values])
    salience = {time: (_mean(moved[time]) if moved[time] else usual) * _mean(harm) for time, harm in harmed.items()}
    chosen = sorted(salience, key=lambda time: -salience[time])[:count]
    return replace(calls, entries=tuple(entry for entry, time in zip(calls.entries, times, strict=True) if time in chosen))


def _time_and_sample(transformer: nn.Module, call: Call) -> tuple[float, Tensor]:
    found = view(transformer, call.args, call.kwargs)
    if found.time is None or found.latent is None:
        raise ValueError("the transformer's calls have no timestep or no sample to choose by; use --timestep-choice even")
    return found.time, found.latent


def _rounding_errors(block: nn.Module) -> dict[nn.Linear, Tensor]:
    """Return `W - round(W)` `[out, in]` of each linear, rounded to int4 per output channel."""
    errors = {}
    for module in block.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach().float()
            step = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / LEVELS
            errors[module] = weight - (weight / step).round() * step
    return errors


def _harm(transformer: nn.Module, first_block: str, call: Call, deltas: dict[nn.Linear, Tensor]) -> float:
    """Return the mean over the block's linears of the mean square of `dW x` on one call."""
    found: list[float] = []

    def measure(module: nn.Linear, args: tuple, output: Tensor) -> None:
        x = args[0].float().reshape(-1, module.in_features)
        found.append(float((x @ deltas[module].T).square().mean()))

    handles = [module.register_forward_hook(measure) for module in deltas]
    try:
        run_call(transformer.get_submodule(first_block), first_call(transformer, first_block, call))
    finally:
        for handle in handles:
            handle.remove()
    return _mean(found)


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean()) if len(values) else 0.0
