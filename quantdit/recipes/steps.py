"""`Steps`: the section `[steps]` of a recipe: how much of a trajectory is computed, and how the rest is forecast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

FORECASTS = ("reuse", "taylor1", "taylor2", "fit")
AUTO_FORECAST = "auto"
MOST_STEPS = 1000


@dataclass(frozen=True)
class Steps:
    """What step plan calibration chooses.

    Attributes:
        compute: share of the steps that are computed; 0.5 is about twice as fast.
        count: steps of the trajectory; 0 for as many as calibration samples with.
        forecast: of the others: `reuse` the latest output, `taylor1` or `taylor2`, `fit` (least squares), or `auto`: what
            measures best.
    """

    compute: float
    count: int = 0
    forecast: str = AUTO_FORECAST

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: one is not possible.
        """
        if isinstance(self.compute, bool) or not isinstance(self.compute, int | float) or not 0 < self.compute < 1:
            raise ValueError(
                f"steps: compute is {self.compute!r:.40}, expected a share of the steps above 0 and below 1, such as 0.5"
            )
        if isinstance(self.count, bool) or not isinstance(self.count, int) or not 0 <= self.count <= MOST_STEPS:
            raise ValueError(f"steps: count is {self.count!r:.40}, expected a number of steps up to {MOST_STEPS}, or 0")
        if self.forecast not in (AUTO_FORECAST, *FORECASTS):
            known = ", ".join((AUTO_FORECAST, *FORECASTS))
            raise ValueError(f"steps: forecast is {self.forecast!r:.40}, expected one of {known}")

    def to_dict(self) -> dict:
        """Return the section as `from_dict` reads it."""
        return {"compute": self.compute, "count": self.count, "forecast": self.forecast}

    @classmethod
    def from_dict(cls, table: object, where: str) -> Steps:
        """Return what a section says.

        Raises:
            ValueError: it is no table, has an unknown key, lacks `compute`, or as the class.
        """
        known = [each.name for each in fields(cls)]
        if not isinstance(table, Mapping) or "compute" not in table:
            raise ValueError(f"{where}: [steps] needs compute = 0.5, the share of the steps that are computed")
        if unknown := sorted(table.keys() - set(known)):
            raise ValueError(f"{where}: [steps] has an unknown key {unknown[0]!r}; known: {', '.join(known)}")
        try:
            return cls(**table)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
