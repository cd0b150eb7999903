"""`compiled`: numba's `njit` as calibration uses it. What it compiles is kept for the next process where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, compiled at its first call or read from numba's cache; arithmetic is neither fused nor reordered."""
    try:
        return njit(**OPTIONS, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written to
        return njit(**OPTIONS)(function)
