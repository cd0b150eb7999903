"""Compiled code runs where nothing can be kept of it, too."""

from __future__ import annotations

import pytest

pytest.importorskip("numba")
from quantdit.system import compiled as module


def test_it_is_compiled_anew_where_there_is_no_place_for_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    njit, asked = module.njit, []

    def refusing(cache: bool = False, **options: object):
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function 'double': no locator available for file")
        return njit(**options)

    monkeypatch.setattr(module, "njit", refusing)

    @module.compiled
    def double(x: float) -> float:
        return 2 * x

    assert double(3.0) == 6.0 and asked == [True, False]
    assert len(double.signatures) == 1, "it is numba's"
