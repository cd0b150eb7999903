"""The error of a transformer's output where it reads what quantized text encoders return: `model_rel_rmse_together`.

The quantized pipeline samples once more. At each call the transformer gets the latent that the pipeline in full precision gave it
then, but the quantized encoders' embeddings, and its output is held against the recorded one. So errors do not add up along the
trajectory.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any

from torch import nn

from quantdit.calibration import errors
from quantdit.compiling.job import Job
from quantdit.models.call_view import arguments_of
from quantdit.models.prediction import prediction_of

CALLS = 64  # that are compared, at most


class _Enough(Exception):
    """Ends the sampling."""


class _Comparison:
    """What is added up over the calls of one transformer."""

    def __init__(self, job: Job) -> None:
        self._job, self._next = job, 0
        self.error = self.power = 0.0
        self._expected: Any = None

    def before(self, transformer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Put the recorded latent, and time, in the place of the call's own."""
        if self._next == min(len(self._job.calls), CALLS):
            raise _Enough
        recorded = self._job.calls[self._next]
        self._next += 1
        self._expected = recorded.output
        known = arguments_of(type(transformer))
        names = [name for name in (known.latent, known.time) if name]
        then = known.signature.bind_partial(transformer, *recorded.args, **recorded.kwargs).arguments
        now = known.signature.bind_partial(transformer, *args, **kwargs)
        now.arguments.update({name: then[name] for name in names if name in then})
        return now.args[1:], now.kwargs

    def after(self, transformer: nn.Module, args: tuple, output: object) -> None:
        """Compare the output with the recorded one."""
        found = prediction_of(output)
        if found is None or self._expected is None or found.shape != self._expected.shape:
            raise _Enough
        squares = errors.squares(found.float(), self._expected.float())
        self.error, self.power = self.error + squares[0], self.power + squares[1]


def together(jobs: Mapping[str, Job], sample: Any) -> dict[str, float]:
    """Return the relative error of each transformer's output with all components quantized.

    Args:
        jobs: of the transformers, whose calls were recorded in the order of sampling, none left out.
        sample: samples from the quantized pipeline as calibration did from that in full precision.
    """
    comparisons = {part: _Comparison(job) for part, job in jobs.items()}
    with ExitStack() as stack:
        for part, job in jobs.items():
            one = comparisons[part]
            stack.callback(job.model.register_forward_pre_hook(one.before, with_kwargs=True).remove)
            stack.callback(job.model.register_forward_hook(one.after).remove)
        with suppress(_Enough):
            sample()
    return {part: errors.relative(one.error, one.power) for part, one in comparisons.items() if one.power > 0}
