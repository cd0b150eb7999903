"""`StepPlan`: which calls of a trajectory are computed, and the weights that forecast the others from computed outputs.

Every forecast here is a weighted sum of the latest computed outputs, so a plan is a table of weights: `reuse` is the weight 1,
Taylor series (TaylorSeer, arXiv 2503.06923, section 3) are the weights of polynomials through the latest computed steps, and
`fit` has weights of least squares on the model's own trajectories (forecasts.py). One way through the code runs them all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quantdit.recipes.steps import FORECASTS, MOST_STEPS

SPEC = 1
HISTORY = 4  # computed outputs at most that a forecast is made of
MOST_WEIGHT = 1e3
MOST_TIME = 1e9
# What the times of a run may differ by from those of the plan, beside rounding to the dtype that the pipeline keeps them in.
NEAR = 1e-5
_KEYS = ("spec", "forecast", "times", "weights")
_ROUNDED = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class StepPlan:
    """What of a trajectory is computed.

    Attributes:
        forecast: the name of the forecast, one of FORECASTS.
        times: of the trajectory's calls, in their order, in the transformer's own units.
        weights: for each call () if it is computed, else the weights of the latest computed outputs, the newest first, HISTORY at
            most. The first and the last call are computed.
    """

    forecast: str
    times: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        """Check that it can be followed.

        Raises:
            ValueError: says what is wrong.
        """
        if self.forecast not in FORECASTS:
            raise ValueError(f"forecast is {self.forecast!r:.40}, expected one of {', '.join(FORECASTS)}")
        steps = len(self.times)
        if not 2 <= steps <= MOST_STEPS or len(self.weights) != steps:
            raise ValueError(f"it has {steps} times and {len(self.weights)} rows of weights, expected 2 to {MOST_STEPS} of both")
        if not all(math.isfinite(time) and abs(time) <= MOST_TIME for time in self.times):
            raise ValueError("a time is no finite number")
        if self.weights[0] or self.weights[-1]:
            raise ValueError("the first and the last step are always computed, and one of them has weights")
        computed = 0
        for step, row in enumerate(self.weights):
            computed += not row
            if len(row) > min(computed, HISTORY):
                raise ValueError(f"step {step} has {len(row)} weights, and {min(computed, HISTORY)} outputs to weigh")
            if not all(abs(weight) <= MOST_WEIGHT for weight in row):  # NaN is not
                raise ValueError(f"step {step} has a weight that is no number within {MOST_WEIGHT:g}")

    @property
    def computed(self) -> tuple[int, ...]:
        """Return the numbers of the calls that are computed."""
        return tuple(step for step, row in enumerate(self.weights) if not row)

    @property
    def share(self) -> float:
        """Return the share of calls that are computed."""
        return len(self.computed) / len(self.times)

    def is_at(self, step: int, time: float) -> bool:
        """Return whether a call at a time, in whatever dtype the pipeline keeps it, can be that of a step."""
        expected = self.times[step]
        if abs(time - expected) <= NEAR * max(abs(expected), NEAR):
            return True
        return time == round(expected) or any(time == float(torch.tensor(expected, dtype=dtype)) for dtype in _ROUNDED)

    def __str__(self) -> str:
        """Say in a line what it does."""
        return f"{len(self.computed)} of {len(self.times)} steps computed, the others forecast ({self.forecast})"

    def to_dict(self) -> dict:
        """Return the plan as config.json holds it."""
        weights = [list(row) for row in self.weights]
        return {"spec": SPEC, "forecast": self.forecast, "times": list(self.times), "weights": weights}

    @classmethod
    def from_dict(cls, content: object) -> StepPlan:
        """Return the plan that `to_dict` gave.

        Raises:
            ValueError: it is none, or of a later version.
        """
        if not isinstance(content, Mapping) or sorted(content) != sorted(_KEYS):
            raise ValueError(f"expected a table of {', '.join(_KEYS)}, got {content!r:.80}")
        if content["spec"] != SPEC:
            raise ValueError(f"spec is {content['spec']!r:.20}, this version reads {SPEC}; update quantdit")
        times, weights = content["times"], content["weights"]
        if not _numbers(times) or not isinstance(weights, list) or not all(_numbers(row) for row in weights):
            raise ValueError("times must be a list of numbers, weights a list of lists of numbers")
        forecast = content["forecast"]
        if not isinstance(forecast, str):
            raise ValueError(f"forecast is {forecast!r:.40}, expected one of {', '.join(FORECASTS)}")
        return cls(forecast, tuple(map(float, times)), tuple(tuple(map(float, row)) for row in weights))


def _numbers(value: object) -> bool:
    """Return whether a value is a list of numbers that a float can hold."""
    return isinstance(value, list) and all(
        type(each) is float or (type(each) is int and abs(each) <= MOST_TIME) for each in value
    )
