"""Where computed steps lie, and the weights that forecast the others: of polynomials, or of least squares."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quantdit.step_plans.step_plan import HISTORY, StepPlan

LEAST = 3  # computed steps
ORDERS = {"reuse": 0, "taylor1": 1, "taylor2": 2}
# Of the power of the outputs: keeps the weights of nearly parallel outputs small, which others than the fitted samples have too.
RIDGE = 1e-6


def placed(steps: int, computed: int, ends: float = 0.0, lean: float = 1.0) -> tuple[int, ...]:
    """Return the numbers of the steps that are computed, the first and the last among them.

    Args:
        steps: of the trajectory.
        computed: how many of them.
        ends: 0 spaces them evenly, 1 as a cosine does: densely at both ends of the trajectory; between, a mixture.
        lean: above 1 has them denser at the noisy end, below 1 at the clean end.

    Raises:
        ValueError: fewer than LEAST computed.
    """
    if computed < min(LEAST, steps):
        raise ValueError(f"{computed} of {steps} steps computed is too few; at least {LEAST} are")
    if computed >= steps:
        return tuple(range(steps))
    parts = [(i / (computed - 1)) ** lean for i in range(computed)]
    found = sorted({round((steps - 1) * ((1 - ends) * u + ends * (1 - math.cos(math.pi * u)) / 2)) for u in parts})
    while len(found) < computed:  # where two fell on one, the largest gap is halved
        gap = max(range(len(found) - 1), key=lambda i: found[i + 1] - found[i])
        found.insert(gap + 1, (found[gap] + found[gap + 1]) // 2)
    return tuple(found)


def polynomial(name: str, times: Sequence[float], computed: Sequence[int]) -> StepPlan:
    """Return the plan that extrapolates a polynomial of the step's number through the latest computed outputs (Lagrange)."""
    rows = []
    for step in range(len(times)):
        points = _latest(step, computed)[: ORDERS[name] + 1]
        rows.append(() if step in computed else tuple(_lagrange(step, points)))
    return StepPlan(name, tuple(times), tuple(rows))


def fit(
    times: Sequence[float],
    computed: Sequence[int],
    wanted: Sequence[Sequence[Tensor]],
    known: Sequence[Sequence[Tensor]] | None = None,
) -> StepPlan:
    """Return the plan whose weights have the least squared error on trajectories.

    Args:
        times: of the calls.
        computed: numbers of the calls that are computed.
        wanted: of each trajectory the output of every call, all of one shape: what forecasts are to be.
        known: what they are made of, if that is another trajectory from the same noise, such as one that followed a plan; only
            computed calls of it are looked at.

    Solved in float64, with a ridge of RIDGE times the outputs' mean power towards the weights of a first-order Taylor series.
    """
    rows: list[tuple[float, ...]] = []
    towards = polynomial("taylor1", times, computed)
    for step in range(len(times)):
        if step in computed:
            rows.append(())
            continue
        points = _latest(step, computed)[:HISTORY]
        start = torch.tensor([*towards.weights[step], *[0.0] * HISTORY][: len(points)], dtype=torch.float64)
        gram = torch.zeros(len(points), len(points), dtype=torch.float64)
        missed = torch.zeros(len(points), dtype=torch.float64)
        for of, target in zip(wanted if known is None else known, wanted, strict=True):
            x = torch.stack([of[point].double().flatten() for point in points])
            gram += x @ x.T
            missed += x @ (target[step].double().flatten() - start @ x)
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(points), dtype=torch.float64)
        rows.append(tuple((start + torch.linalg.solve(gram + ridge, missed)).tolist()))
    return StepPlan("fit", tuple(times), tuple(rows))


def _latest(step: int, computed: Sequence[int]) -> list[int]:
    """Return the computed steps before one, the latest first."""
    return list(computed[: bisect.bisect_left(computed, step)])[::-1]


def _lagrange(at: int, points: Sequence[int]) -> list[float]:
    """Return the weights of the values at some points in their polynomial's value at another."""
    weights = []
    for point in points:
        weight = 1.0
        for other in points:
            if other != point:
                weight *= (at - other) / (point - other)
        weights.append(weight)
    return weights
