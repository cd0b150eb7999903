"""Trellis codes: the best sequence of all, the same by either way, and errors that no scalar format reaches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from quantdit.calibration import viterbi
from quantdit.calibration.errors import output_error
from quantdit.calibration.gptq import descend, gptq
from quantdit.calibration.grids import GRIDS, SPREAD
from quantdit.calibration.quantize import WeightOptions, quantize_weight
from quantdit.formats import FORMATS, trellis

pytest.importorskip("numba")
pytestmark = pytest.mark.filterwarnings("ignore:trellis codes take")
TRELLIS = [name for name, f in FORMATS.items() if f.state_bits]
# NMSE of Gaussian rows with the table in random order, L = 12 (the figures of QTIP's construction as we measured it).
RANDOM_ORDER = {4: 0.0051, 3: 0.0194, 2: 0.0723}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["torch", "numba"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(viterbi, "numba_is_installed", lambda: request.param == "numba")
    return request.param


def nmse(name: str, out: int, columns: int) -> float:
    """Of Gaussian weights of variance 1, without feedback, in the unit that the grid takes for them."""
    f, W = FORMATS[name], random(out, columns, seed=3)
    unit = SPREAD[f.code_bits] * trellis.unit(f.state_bits)
    values = trellis.decode(viterbi.encode(W / unit, f), f)
    assert int(values.abs().max()) <= trellis.PEAK
    return float((values * unit - W).square().sum() / W.square().sum())


@pytest.mark.parametrize("ends", [(None, None), (5, None), (None, 9), (37, 60)])
@pytest.mark.parametrize(("bits", "length"), [(2, 6), (3, 4), (4, 3)])
def test_no_other_sequence_is_nearer(way: str, bits: int, length: int, ends: tuple):
    """Of all codes, from all pasts or one, to all or one: 2^(bits length) of them, times the pasts."""
    window = 10
    entries = trellis.codebook(window, bits).float()
    pasts = 2 ** (window - bits)
    x = 20 * random(3, length, seed=bits)
    first, last = (None if end is None else torch.full((3,), end) for end in ends)
    found = viterbi.solve(x, entries, bits, first, last, viterbi.MEMORY)
    everything = torch.tensor(list(itertools.product(range(2**bits), repeat=length)))  # [codes, length]
    start = torch.arange(pasts) if ends[0] is None else torch.tensor([ends[0]])
    past, cost = start.repeat(len(everything), 1), torch.zeros(3, len(everything), len(start))
    for t in range(length):
        state = everything[:, t, None] * pasts + past
        cost += (x[:, t, None, None] - entries[state]).square()
        past = state >> bits
    cost = cost if ends[1] is None else torch.where(past == ends[1], cost, torch.inf)
    best, place = cost.flatten(1).min(dim=1)
    assert torch.equal(everything[place // len(start)].to(torch.uint8), found)
    assert bool(best.isfinite().all())


@pytest.mark.parametrize("name", ["trellis4_l10", "trellis4_l12", "trellis3_l10", "trellis3_l12", "trellis2_l12"])
@pytest.mark.parametrize("out", [1, 2, 9, 90])
def test_both_ways_find_the_same_codes(name: str, out: int, monkeypatch: pytest.MonkeyPatch):
    """Zeros among the targets: costs that tie, as the table is symmetric."""
    targets = 20 * random(out, 5, seed=out)
    targets[:, 1] = 0
    targets[::2, 2] = 0
    fast = viterbi.encode(targets, FORMATS[name])
    monkeypatch.setattr(viterbi, "numba_is_installed", lambda: False)
    assert torch.equal(viterbi.encode(targets, FORMATS[name]), fast)
    assert torch.equal(viterbi.encode(targets, FORMATS[name], memory=1), fast)  # one sequence at a time


def test_threads_and_neighbours_change_nothing(monkeypatch: pytest.MonkeyPatch):
    targets, f = 20 * random(900, 6, seed=1), FORMATS["trellis3_l10"]
    alone = torch.cat([viterbi.encode(column, f) for column in targets.split(1, dim=1)], dim=1)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(viterbi.encode(targets, f), alone)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_on_gaussian_rows(bits: int):
    """At L = 12 below those of a table in random order, at L = 16 lower still; a column of 1536 is cut into four."""
    ten, twelve, sixteen = (nmse(f"trellis{bits}_l{window}", 1536, 3) for window in (10, 12, 16))
    assert 1.01 * sixteen < twelve < 0.99 * ten
    assert twelve < RANDOM_ORDER[bits]


def test_short_columns_cost_little():
    """A circle of 48 against one of 1536, 9216 weights each, whose error is known to 1.5 %; three of those."""
    assert nmse("trellis4_l12", 48, 192) < 1.06 * nmse("trellis4_l12", 1536, 6)


@pytest.mark.parametrize(("bits", "scalar"), [(4, "table4"), (3, "table3"), (2, "table2")])
def test_with_feedback_a_fifth_below_the_best_scalar_format(bits: int, scalar: str):
    """Output error, all inputs correlated; and descent never makes it worse."""
    W, x = random(96, 128), random(512, 128, seed=1) @ (random(128, 128, seed=2) * torch.linspace(2, 0.05, 128))
    H = x.T @ x
    errors = {}
    for name in (scalar, f"trellis{bits}_l12"):
        for method, descent in (("rtn", 0), ("gptq", 0), ("gptq", 2)):
            q = quantize_weight(W, H, name, 128, method, WeightOptions(act_order=True, cd_passes=descent))
            errors[name, method, descent] = output_error(q.dequantize() - W, W, H)
    made = [errors[f"trellis{bits}_l12", *how] for how in (("rtn", 0), ("gptq", 0), ("gptq", 2))]
    assert made == sorted(made, reverse=True)
    assert made[2] < 0.8 * errors[scalar, "gptq", 2]


def test_descent_never_makes_it_worse():
    """Pass after pass, the boundary of the circle where it was or not."""
    W, H = 20 * random(40, 48, seed=4), (lambda x: x.T @ x)(random(96, 48, seed=5) @ random(48, 48, seed=6))
    grid = GRIDS["trellis3_l10"](W, torch.ones(48), 48, "trellis3_l10", "")
    W = W / grid.scale[:, None]
    codes, groups = gptq(W, H, grid, 48)
    errors = []
    for _ in range(5):
        D = (grid.value(codes, ()) - W).double()
        errors.append(float(((D @ H.double()) * D).sum()))
        codes = descend(codes, W, H, grid, groups, 48, 1)
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]


@pytest.mark.parametrize("name", TRELLIS)
def test_scales_take_16_bits(name: str):
    q = quantize_weight(random(33, 8) * torch.logspace(-2, 2, 33)[:, None], torch.eye(8), name, 8, "rtn")
    assert torch.equal(q.scale.half().float(), q.scale)
