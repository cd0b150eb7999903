"""Compiled histograms against those of torch: the same bits."""

from __future__ import annotations

import pytest
import torch

from quantdit.calibration import lloyd_max

pytest.importorskip("numba")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 5])
def test_bits_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    values = torch.randn(rows, 3000, generator=generator).to(dtype)
    values[:, :5] *= 100
    values[0, 7:9] = 0
    for weights in (torch.rand(3000, generator=generator), torch.rand(rows, 3000, generator=generator)):
        made = []
        for is_installed in (True, False):
            monkeypatch.setattr(lloyd_max, "numba_is_installed", lambda is_installed=is_installed: is_installed)
            made.append(lloyd_max.histogram(values, weights))
        assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
    zeros = lloyd_max.histogram(torch.zeros(2, 10, dtype=dtype), torch.ones(10))
    assert bool((zeros[1].sum(dim=1) == 10).all())


def test_compiled_code_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would compare torch with torch."""
    from quantdit.calibration import histogram_numba

    called = []
    sums = histogram_numba.sums
    monkeypatch.setattr(histogram_numba, "sums", lambda *given: called.append(1) or sums(*given))
    lloyd_max.histogram(torch.ones(1, 3), torch.ones(3))
    assert called
