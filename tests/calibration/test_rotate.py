"""Rotations by the rules of LRQ-DiT and DuQuant: orthogonal, never worse than nothing on their own objective, repeatable."""

from __future__ import annotations

import itertools

import pytest
import torch

from quantdit import transform
from quantdit.calibration import rotate
from quantdit.hadamard import block_size, random_sign
from quantdit.transform import KINDS, Transform

STEPS = 24  # enough to see every rule at work


def planted(rows: int, width: int, channels: int = 3, size: float = 30.0, seed: int = 0) -> torch.Tensor:
    """Gaussian rows `[rows, width]`, some channels of which are `size` times as large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    x[:, torch.randperm(width, generator=generator)[:channels]] *= size
    return x


def quantized(x: torch.Tensor, bits: int = 4) -> torch.Tensor:
    scale = x.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (x / scale.masked_fill(scale == 0, 1)).round() * scale


def output_error(x: torch.Tensor, w: torch.Tensor):
    """rel_rmse of the output with 4-bit activations."""
    y = x @ w.T

    def error(t: Transform) -> float:
        return float((quantized(transform.apply(t, x)) @ transform.apply_to_weight(t, w).T - y).norm() / y.norm())

    return error


@pytest.mark.parametrize("width", [60, 100, 192, 384, 1152])
def test_outlier_rotation_is_orthogonal_and_lowers_planted_outliers(width: int):
    x = planted(64, width)
    t = rotate.build("outlier", x, 0, steps=STEPS)
    assert t.kind == "outlier"
    assert t.rotation_block == block_size(width)
    assert transform.check_values(t) is None
    for blocks in (t.rotation1, t.rotation2):
        excess = blocks.double().mT @ blocks.double() - torch.eye(blocks.shape[-1], dtype=torch.float64)
        assert float(excess.abs().max()) <= 1e-5
    # Three outliers spread over a block: even blocks of 4 must halve the peak or nearly so.
    assert float(transform.apply(t, x).abs().max()) < 0.7 * float(x.abs().max())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.ones(8, 64), id="constant"),
        pytest.param(torch.randn(200, 64, generator=torch.Generator().manual_seed(1)), id="gaussian"),
        pytest.param(torch.randint(0, 2, (50, 64), generator=torch.Generator().manual_seed(2)) * 2.0 - 1, id="already-flat"),
    ],
)
def test_outlier_rotation_never_raises_the_peak(x: torch.Tensor, seed: int):
    t = rotate.outlier_rotation(x, 32, seed, STEPS)
    # Two products over 32 entries in float32.
    assert float(transform.apply(t, x).abs().max()) <= float(x.abs().max()) * (1 + 2 * 34 * torch.finfo(torch.float32).eps)


def test_more_steps_are_no_worse():
    x = planted(64, 128)
    peaks = []
    for steps in (0, 1, 8, 64):
        peaks.append(float((x @ rotate.greedy_blocks(x, 128, 0, steps)[0]).abs().max()))
    assert peaks[0] == float(x.abs().max())
    assert all(later <= earlier * (1 + 1e-4) for earlier, later in itertools.pairwise(peaks))
    assert peaks[-1] < peaks[0] / 3


def test_one_step_spreads_the_largest_channel_evenly():
    """d1 is the column of the largest entry, not its row."""
    x = torch.zeros(20, 16)
    x[3, 11] = 8.0
    rotated = x @ rotate.greedy_blocks(x, 16, 0, 1)[0]
    torch.testing.assert_close(rotated[3].abs(), torch.full((16,), 2.0))


def test_blocks_are_rotated_on_their_own():
    x = planted(32, 128, channels=1)
    x[:, 64:] = 1.0
    first = rotate.greedy_blocks(x, 64, 0, STEPS)[0]
    x[:, 64:] = planted(32, 64, seed=9)
    assert torch.equal(rotate.greedy_blocks(x, 64, 0, STEPS)[0], first)


@pytest.mark.parametrize(("width", "block"), [(60, 4), (192, 64), (1152, 128)])
def test_zigzag_balances_the_blocks(width: int, block: int):
    peak = torch.rand(width, generator=torch.Generator().manual_seed(0)).exp() ** 3
    permutation = rotate.zigzag(peak, block)
    assert torch.equal(permutation.sort().values, torch.arange(width))
    means = peak[permutation].reshape(-1, block).mean(dim=1)
    assert float(means.max() - means.min()) <= float(peak.max() - peak.min()) / block * (1 + 1e-5)
    unsorted = peak.sort().values.reshape(-1, block).mean(dim=1)
    assert float(means.max() - means.min()) < float(unsorted.max() - unsorted.min()) / 3


def test_zigzag_by_hand():
    peak = torch.tensor([1.0, 9.0, 3.0, 8.0, 7.0, 2.0])
    assert rotate.zigzag(peak, 2).tolist() == [1, 0, 3, 5, 4, 2]  # 9 8 7 one way, 3 2 1 the other


@pytest.mark.parametrize(
    ("rms", "kind"), [(0.0, "hadamard"), (0.9999, "hadamard"), (1.0, "outlier"), (1.0001, "outlier"), (50.0, "outlier")]
)
def test_ars_threshold(rms: float, kind: str):
    assert rotate.ars(rms) == kind
    assert rotate.ars(rms * 7, threshold=7) == kind
    choice = rotate.choose("ars", planted(8, 32), rms, error=lambda t: pytest.fail("nothing to compare"), seed=0)
    assert choice.kind == choice.transform.kind == kind
    assert choice.errors == {}


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_kinds(kind: str):
    choice = rotate.choose(kind, planted(8, 32), 0.5, error=lambda t: pytest.fail("nothing to compare"), seed=0)
    assert choice.kind == choice.transform.kind == kind


@pytest.mark.parametrize("seed", range(4))
def test_auto_is_never_worse_than_any_kind(seed: int):
    x, w = planted(96, 32, seed=seed), torch.randn(40, 32, generator=torch.Generator().manual_seed(seed))
    error = output_error(x[1::2], w)
    choice = rotate.choose("auto", x[::2], 0.5, error, seed)
    assert choice.errors.keys() == set(KINDS)
    for kind, t in rotate.candidates(x[::2], seed).items():
        assert choice.errors[kind] == error(t)
        assert error(choice.transform) <= error(t)
    assert choice.errors[choice.kind] == error(choice.transform)
    assert choice.kind != "none"  # 4 bits and outliers of 30 sigma


def test_auto_takes_the_simplest_of_equals_and_passes_over_nan():
    x = planted(8, 32)
    assert rotate.choose("auto", x, 0.5, lambda t: 1.0, 0).kind == "none"
    assert rotate.choose("auto", x, 0.5, lambda t: 1.0 if t.kind == "outlier" else float("nan"), 0).kind == "outlier"
    with pytest.raises(ValueError, match="finite output error"):
        rotate.choose("auto", x, 0.5, lambda t: float("nan"), 0)


def test_rotations_are_fitted_to_smoothed_rows():
    """An outlier that smoothing removes leaves the rotation as if it had never been."""
    x, factor = planted(64, 64, channels=0), torch.ones(64)
    factor[5] = 32.0
    spiked = x * factor
    t = rotate.build("outlier", spiked, 0, factor, STEPS)
    plain = rotate.build("outlier", x, 0, steps=STEPS)
    assert torch.equal(t.rotation1, plain.rotation1)
    assert torch.equal(t.permutation, plain.permutation)
    assert torch.equal(t.premultiplier, 1 / factor)
    signs = rotate.build("hadamard", spiked, 7, factor).premultiplier
    assert torch.equal(signs, random_sign(64, 7) / factor)


def test_the_seed_decides():
    x = planted(32, 64)
    once, again, other = (rotate.build("outlier", x, seed, steps=STEPS) for seed in (1, 1, 2))
    state = torch.get_rng_state()
    for name, tensor in transform.tensors(once).items():
        assert torch.equal(tensor, getattr(again, name))
    assert not torch.equal(once.rotation1, other.rotation1)
    rotate.build("outlier", x, 3, steps=STEPS)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_rows_of_zeros_and_no_rows(rows: int):
    for t in rotate.candidates(torch.zeros(rows, 192), 0, steps=STEPS).values():
        assert transform.check_values(t) is None
        assert torch.equal(transform.apply(t, torch.zeros(2, 192)), torch.zeros(2, 192))


def test_odd_widths_have_no_rotation():
    assert all(t.identity for t in rotate.candidates(planted(8, 63), 0).values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_rows_are_refused(bad: float):
    x = planted(10, 64)
    x[3, 5] = x[3, 6] = x[8, 0] = bad
    with pytest.raises(ValueError, match="2 of 10 input rows have NaN or infinite"):
        rotate.build("outlier", x, 0)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"unknown rotation 'givens'; known: none, hadamard, outlier, regular$"):
        rotate.build("givens", planted(4, 8), 0)
    with pytest.raises(ValueError, match=r"unknown rotation 'givens'; known: none, hadamard, outlier, ars, auto, regular$"):
        rotate.choose("givens", planted(4, 8), 0.5, lambda t: 0.0, 0)


def test_a_regular_rotation_has_no_random_signs():
    a, b = (rotate.build("regular", torch.zeros(0, 96), seed) for seed in (0, 1))
    assert torch.equal(a.premultiplier, b.premultiplier) and (a.kind, a.block) == ("hadamard", 16)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(transform.apply(a, x).norm(dim=1), x.norm(dim=1))
    assert rotate.choose("regular", x, 1.0, lambda t: 0.0, 0).kind == "hadamard"
    assert rotate.build("regular", torch.zeros(0, 6), 0).identity
