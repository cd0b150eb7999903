"""Rotations by the rules of LRQ-DiT and DuQuant: orthogonal, never worse than nothing on their own objective, repeatable."""

from __future__ import annotations

import itertools

import pytest
import torch

from quantdit.calibration import rotate, smooth
from quantdit.formats import QSpec
from quantdit.tensors import transform
from quantdit.tensors.hadamard import block_size, random_sign
from quantdit.tensors.layer_spec import LayerSpec, stored_bytes
from quantdit.tensors.transform import KINDS, Transform

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


def rotated_by(x: torch.Tensor, block: int, steps: int) -> torch.Tensor:
    return transform.product(rotate.greedy_steps(x, block, 0, steps), block, 0)


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


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.ones(8, 64), id="constant"),
        pytest.param(torch.randn(200, 64, generator=torch.Generator().manual_seed(1)), id="gaussian"),
        pytest.param(torch.randint(0, 2, (50, 64), generator=torch.Generator().manual_seed(2)) * 2.0 - 1, id="already-flat"),
    ],
)
def test_outlier_rotation_never_raises_the_peak(x: torch.Tensor):
    t = rotate.outlier_rotation(x, 32, STEPS)
    # Two products over 32 entries in float32.
    assert float(transform.apply(t, x).abs().max()) <= float(x.abs().max()) * (1 + 2 * 34 * torch.finfo(torch.float32).eps)


def test_more_steps_are_no_worse():
    x = planted(64, 128)
    peaks = []
    for steps in (0, 1, 8, 32):
        peaks.append(float((x @ rotated_by(x, 128, steps)[0]).abs().max()))
    assert peaks[0] == float(x.abs().max())
    assert all(later <= earlier * (1 + 1e-4) for earlier, later in itertools.pairwise(peaks))
    assert peaks[-1] < peaks[0] / 3


def test_one_step_spreads_the_largest_channel_evenly():
    """d1 is the column of the largest entry, not its row."""
    x = torch.zeros(20, 16)
    x[3, 11] = 8.0
    rotated = x @ rotated_by(x, 16, 1)[0]
    torch.testing.assert_close(rotated[3].abs(), torch.full((16,), 2.0))


def test_blocks_are_rotated_on_their_own():
    x = planted(32, 128, channels=1)
    x[:, 64:] = 1.0
    first = rotated_by(x, 64, STEPS)[0]
    x[:, 64:] = planted(32, 64, seed=9)
    assert torch.equal(rotated_by(x, 64, STEPS)[0], first)


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


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_kinds(kind: str):
    assert rotate.build(kind, planted(8, 32), 0).kind == kind


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


def test_an_outlier_rotation_depends_on_the_inputs_alone():
    x, state = planted(32, 64), torch.get_rng_state()
    once, other = (rotate.build("outlier", x, seed, steps=STEPS) for seed in (1, 2))
    assert transform.tensors(once).keys() == {"steps1", "permutation", "steps2"}
    for name, tensor in transform.tensors(once).items():
        assert torch.equal(tensor, getattr(other, name))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_rows_of_zeros_and_no_rows(rows: int):
    for t in (rotate.build(kind, torch.zeros(rows, 192), 0, steps=STEPS) for kind in KINDS):
        assert transform.check_values(t) is None
        assert torch.equal(transform.apply(t, torch.zeros(2, 192)), torch.zeros(2, 192))


def test_odd_widths_have_no_rotation():
    assert all(rotate.build(kind, planted(8, 63), 0).identity for kind in KINDS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_rows_are_refused(bad: float):
    x = planted(10, 64)
    x[3, 5] = x[3, 6] = x[8, 0] = bad
    with pytest.raises(ValueError, match="2 of 10 input rows have NaN or infinite"):
        rotate.build("outlier", x, 0)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"unknown rotation 'givens'; known: none, hadamard, outlier, regular$"):
        rotate.build("givens", planted(4, 8), 0)


def test_a_regular_rotation_has_no_random_signs():
    a, b = (rotate.build("regular", torch.zeros(0, 96), seed) for seed in (0, 1))
    assert torch.equal(a.premultiplier, b.premultiplier) and (a.kind, a.block) == ("hadamard", 16)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(transform.apply(a, x).norm(dim=1), x.norm(dim=1))
    assert rotate.build("regular", torch.zeros(0, 6), 0).identity


def salient_tokens(rows: int, width: int, size: float, channels: int, seed: int) -> torch.Tensor:
    """Gaussian tokens, each of which has one entry of about `size`, in one of so many channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    chosen = torch.randperm(width, generator=torch.Generator().manual_seed(99))[:channels]
    place = torch.randint(channels, (rows,), generator=generator)
    x[torch.arange(rows), chosen[place]] = size * (1 + 0.1 * torch.randn(rows, generator=generator))
    return x


def smoothed_error(kind: str, fitted: torch.Tensor, held: torch.Tensor, seed: int, alpha: float) -> float:
    """rel_rmse of the output with 4-bit weights and activations, smoothed by max|X|^alpha / max|W|^(1 - alpha), then rotated."""
    w = torch.randn(128, held.shape[1], generator=torch.Generator().manual_seed(seed))
    factor = smooth.smoothing_factor(fitted.abs().amax(dim=0), w, alpha)
    t = rotate.build(kind, fitted, seed, factor)
    y = held @ w.T
    return float((quantized(transform.apply(t, held)) @ quantized(transform.apply_to_weight(t, w)).T - y).norm() / y.norm())


@pytest.mark.parametrize("alpha", [0.5, 0.6])
@pytest.mark.parametrize(("channels", "most"), [(1, 0.92), (8, 0.98)])
def test_an_outlier_rotation_beats_a_hadamard_where_a_block_cannot_hold_the_outlier(channels: int, most: float, alpha: float):
    """Smoothing leaves half of the outlier to the weight; a Hadamard spreads it over 128 of 1536 places, R1 P R2 over all.

    At equal bits, both smoothed by LRQ-DiT's rule (alpha .5) and by DuQuant's (.6).
    """
    for seed in range(2):
        rows = [salient_tokens(192, 1536, 800.0, channels, seed + part) for part in (0, 100)]
        plain, outlier = (smoothed_error(kind, *rows, seed, alpha) for kind in ("hadamard", "outlier"))
        assert outlier < most * plain


def test_an_outlier_rotation_is_no_better_where_smoothing_takes_the_outlier_away():
    """What the weight had shrunk for in the first place comes back whole: nothing is left to spread."""
    generator = torch.Generator().manual_seed(1)
    x, w = planted(256, 192, channels=2, size=245.0), torch.randn(96, 192, generator=generator)
    grown = x.square().mean(dim=0).sqrt()
    w = w / grown
    factor = smooth.smoothing_factor(grown, w, 0.5)
    error = output_error(x[1::2], w)
    plain, outlier = (error(rotate.build(kind, x[::2], 0, factor)) for kind in ("hadamard", "outlier"))
    assert abs(outlier / plain - 1) < 0.05
    assert outlier < 0.3 * error(rotate.build("outlier", x[::2], 0))


@pytest.mark.parametrize(
    ("out", "width", "most"), [(192, 192, 0.06), (1536, 1536, 0.012), (1536, 8960, 0.012), (8960, 1536, 0.0025)]
)
def test_bits_that_an_outlier_rotation_costs(out: int, width: int, most: float):
    t = rotate.build("outlier", planted(2, width), 0)
    weight = QSpec("int4", out, width, width)
    spec = LayerSpec(weight, rotation=t.kind, block=t.rotation_block, steps=rotate.GREEDY_STEPS)
    assert 8 * (stored_bytes(spec) - stored_bytes(LayerSpec(weight))) / (out * width) <= most


def test_an_outlier_rotation_beats_a_hadamard_where_tokens_differ_by_block():
    """Like attention's heads: which of them is large changes from token to token, which no smoothing of channels levels out."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        loud = (0.5 * torch.randn(384, 3, 1, generator=generator)).exp()
        x = (torch.randn(384, 3, 64, generator=generator) * loud).flatten(1)
        plain, outlier = (smoothed_error(kind, x[::2], x[1::2], seed, 0.5) for kind in ("hadamard", "outlier"))
        assert outlier < 0.95 * plain
