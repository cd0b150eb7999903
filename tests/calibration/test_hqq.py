"""HQQ's zero point: its equations, its robustness, and what the integer form keeps of it."""

from __future__ import annotations

import pytest
import torch

from quantdit.calibration.grids import GRIDS, affine_fit, hqq_fit
from quantdit.calibration.hqq import BETA, ITERATIONS, KAPPA, P, hqq_zero_point


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_zero_point(w: list[float], step: float, levels: int) -> float:
    """The paper's two half steps for one group in plain Python, residuals in steps."""
    u = [x / step for x in w]
    zero, beta, best, least = -min(u), BETA, 0.0, float("inf")
    for _ in range(ITERATIONS):
        codes = [min(max(round(x + zero), 0), levels - 1) for x in u]
        residual = [x - (c - zero) for x, c in zip(u, codes, strict=True)]
        norm = sum(abs(r) ** P for r in residual)
        if norm < least:
            best, least = zero, norm
        outlier = [0 if r == 0 else (1 if r > 0 else -1) * max(abs(r) - abs(r) ** (P - 1) / beta, 0) for r in residual]
        zero = sum(c - (x - e) for c, x, e in zip(codes, u, outlier, strict=True)) / len(u)
        beta *= KAPPA
    return best


@pytest.mark.parametrize("levels", [4, 8, 16])
def test_zero_point_is_that_of_the_equations(levels: int):
    """In float32 against float64: a code may differ at a tie, which moves the mean of 32 by 1/32; most rows have none."""
    w = random(64, 32)
    step = (w.amax(dim=1) - w.amin(dim=1)) / (levels - 1)
    found = hqq_zero_point(w, step, levels)
    expected = torch.tensor([slow_zero_point(row, s, levels) for row, s in zip(w.tolist(), step.tolist(), strict=True)])
    off = (found - expected).abs()
    assert float((off < 1e-4).float().mean()) > 0.9
    assert float(off.max()) < 1 / 4


def test_norm_is_no_worse_than_at_the_start():
    """The start is the zero point of the group's minimum, what plain min-max rounding uses."""
    w = random(200, 64, seed=1)
    step = (w.amax(dim=1) - w.amin(dim=1)) / 7

    def norm(zero: torch.Tensor) -> torch.Tensor:
        u = w / step[:, None]
        codes = (u + zero[:, None]).round().clamp(0, 7)
        return (u - codes + zero[:, None]).abs().pow(P).sum(dim=1)

    before, after = norm(-w.amin(dim=1) / step), norm(hqq_zero_point(w, step, 8))
    assert bool((after <= before).all())
    assert float(after.sum()) < 0.99 * float(before.sum())


@pytest.mark.parametrize("factor", [2.0**-30, 2.0**20])
def test_zero_point_knows_no_unit(factor: float):
    w = random(8, 64)
    step = (w.amax(dim=1) - w.amin(dim=1)) / 15
    assert torch.equal(hqq_zero_point(w * factor, step * factor, 16), hqq_zero_point(w, step, 16))


@pytest.mark.parametrize("levels", [4, 8, 16, 64])
def test_integers_are_legal_and_no_better_than_the_search(levels: int):
    """The search minimises the error that HQQ, which sees no importance, does not: it must win on it."""
    importance = torch.logspace(-1, 1, 64)
    for w in (random(64, 64) * 20, random(64, 64).abs() * 30, random(64, 64) + 100, torch.zeros(4, 64)):
        errors = []
        for m, offset in (hqq_fit(w, importance, levels), affine_fit(w, importance, levels)):
            assert bool((m >= 1).all() and (offset >= -128).all() and (offset + (levels - 1) * m <= 127).all())
            assert torch.equal(m, m.round()) and torch.equal(offset, offset.round())
            codes = ((w - offset[:, None]) / m[:, None]).round().clamp(0, levels - 1)
            errors.append(float(((w - codes * m[:, None] - offset[:, None]).square() * importance).sum()))
        assert errors[1] <= errors[0]


@pytest.mark.parametrize("format", ["int2", "int3", "int4", "int6"])
@pytest.mark.parametrize("group", [64, 256])
def test_grids_take_it(format: str, group: int):
    """As `fit="hqq"`, per group and per channel: close to least squares on plain Gaussian weights, another result."""
    w, importance = random(32, 256) * 0.02, torch.ones(256)
    errors = {}
    for fit in ("hqq", "search"):
        grid = GRIDS[format](w, importance, group, format, "", fit=fit)
        parts = (w / grid.scale[:, None]).split(group, dim=1)
        fitted = [grid.fit(part, importance[:group]) for part in parts]
        values = [grid.value(grid.encode(part, p), p) for part, p in zip(parts, fitted, strict=True)]
        errors[fit] = float(((torch.cat(values, dim=1) * grid.scale[:, None] - w) / w.norm()).norm())
    assert errors["search"] < errors["hqq"] < 1
