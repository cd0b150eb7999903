"""GPTQ against a slow transcription of the paper, and against rounding to nearest: what must hold whatever the numbers."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch

from quantdit.calibration import gptq as error_feedback
from quantdit.calibration import stats
from quantdit.calibration.errors import output_error
from quantdit.calibration.gptq import descend, factor, gptq, rtn, sweep
from quantdit.calibration.grids import GRIDS, Grid
from quantdit.calibration.quantize import WeightOptions, quantize_weight
from quantdit.formats import FORMATS
from quantdit.tensors.qtensor import QTensor, check_values
from some_formats import EACH_KIND, SOME

SCALAR = [name for name in SOME if FORMATS[name].dim == 1]
GROUPED = ("int2", "int3", "int4", "int6")
DAMP = 0.01


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_gram(width: int, rows: int = 1000, seed: int = 0) -> torch.Tensor:
    """Inputs that are mixtures of each other, of channel strengths that span a factor of 10."""
    x = random(rows, width, seed=seed) @ random(width, width, seed=seed + 1) / width**0.5
    x = x * torch.logspace(-0.5, 0.5, width)
    gram = x.T @ x
    return (gram + gram.T) / 2  # a product is symmetric up to rounding only


def lattice(out: int, fit: Callable = lambda w, h: ()) -> Grid:
    """Codes 0..15 that mean -8..7, plus whatever the group was fitted."""

    def shift(p: tuple) -> torch.Tensor | int:
        return p[0][:, None] if p else 0

    return Grid(
        torch.ones(out),
        fit=fit,
        encode=lambda w, p: (w - shift(p) + 8).round().clamp(0, 15).to(torch.uint8),
        value=lambda codes, p: codes.float() - 8 + shift(p),
        fields=lambda groups: {},
    )


def weighted_mean(w: torch.Tensor, importance: torch.Tensor) -> tuple:
    """A group parameter that depends on the weights as they stand and on their importance."""
    return ((w * importance).sum(dim=1) / importance.sum(),)


def by_the_paper(W: torch.Tensor, H: torch.Tensor, grid: Grid, group_size: int, damp: float) -> np.ndarray:
    """Codes, in float64, column by column, H's inverse downdated explicitly.

    float32 with weights up to 16 and feedback over some hundred columns is off by some 1e-5: no weight may be so near to a tie
    that 3e-5 would change its code, or the comparison would say nothing.

    Frantar et al. 2022, equations 2 and 3: after column i the others move by -(w_i - q_i) / [H^-1]_ii [H^-1]_i:, and row and
    column i leave H^-1 by one step of Gaussian elimination.
    """
    w, h = W.double().numpy().copy(), H.double().numpy()
    inverse = np.linalg.inv(h + damp * h.diagonal().mean() * np.eye(len(h)))
    importance = H.diagonal().float()
    codes = np.zeros(w.shape, dtype=np.uint8)
    for i in range(w.shape[1]):
        if i % group_size == 0:
            part = slice(i, i + group_size)
            parameters = grid.fit(torch.from_numpy(w[:, part]).float(), importance[part])
        column = torch.from_numpy(w[:, i : i + 1]).float()
        code = grid.encode(column, parameters)
        codes[:, i] = code[:, 0].numpy()
        value = grid.value(code, parameters)[:, 0].double().numpy()
        assert torch.equal(grid.encode(column - 3e-5, parameters), grid.encode(column + 3e-5, parameters)), "choose another seed"
        w[:, i + 1 :] -= np.outer((w[:, i] - value) / inverse[i, i], inverse[i, i + 1 :])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@pytest.mark.parametrize("fit", [lambda w, h: (), weighted_mean], ids=["fixed", "fitted"])
@pytest.mark.parametrize(
    ("width", "group"), [(48, 48), (48, 16), (160, 32), (160, 160), (192, 96), (256, 128), (288, 288), (300, 150), (400, 200)]
)
def test_codes_are_those_of_the_paper(width: int, group: int, fit: Callable):
    """Blocks of columns only save time. Groups that end inside, with and beyond a block; one group a channel."""
    W, H = random(3, width, seed=width + 2) * 3 + 0.3, correlated_gram(width)
    grid = lattice(3, fit)
    expected = by_the_paper(W, H, grid, group, DAMP)
    codes, groups = gptq(W, H, grid, group, DAMP)
    assert codes.dtype == torch.uint8
    assert np.array_equal(codes.numpy(), expected)
    assert len(groups) == width // group
    assert not torch.equal(codes, rtn(W, H.diagonal(), grid, group)[0])


def test_act_order_is_the_paper_of_sorted_columns():
    W, H = random(3, 200, seed=4) * 3, correlated_gram(200)
    order = H.diagonal().argsort(descending=True)
    expected = by_the_paper(W[:, order], H[order][:, order], lattice(3), 200, DAMP)
    assert np.array_equal(gptq(W, H, lattice(3), 200, DAMP, act_order=True)[0][:, order].numpy(), expected)


@pytest.mark.parametrize("width", [1, 31, 33, 160])
def test_descent_is_that_of_single_columns(monkeypatch: pytest.MonkeyPatch, width: int):
    """Against float64, the whole slope anew at every column; blocks that do not divide the width."""
    monkeypatch.setattr(error_feedback, "DESCENT_BLOCK", 70)
    W, H = random(3, width, seed=width) * 3, correlated_gram(width)
    codes, groups = rtn(W, H.diagonal(), lattice(3), width)
    w, h, v = W.double(), H.double(), codes.double() - 8
    for _ in range(2):
        for i in range(width):
            best = v[:, i] - (v - w) @ h[:, i] / h[i, i]
            assert bool((((best % 1) - 0.5).abs() > 1e-5).all()), "choose another seed"
            v[:, i] = best.round().clamp(-8, 7)
    made = descend(codes, W, H, lattice(3), groups, width, 2)
    assert torch.equal(made.double() - 8, v)
    assert width == 1 or not torch.equal(made, codes)


def test_inputs_are_left_alone():
    W, H = random(4, 64), correlated_gram(64)
    before = W.clone(), H.clone()
    codes, groups = gptq(W, H, lattice(4), 32)
    given = codes.clone()
    descend(codes, W, H, lattice(4), groups, 32, 2)
    assert torch.equal(codes, given)
    rtn(W, H.diagonal(), lattice(4), 32)
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])


@pytest.mark.parametrize("damp", [1e-3, 0.01, 1.0])
@pytest.mark.parametrize("width", [1, 7, 64])
def test_factor_is_numpy_s(width: int, damp: float):
    """R R^T = H + damp mean(diag H) 1, R upper triangular with a positive diagonal: unique, so numpy's of the reversed matrix.

    Cholesky in float32 is exact for a matrix off by at most (k + 1) u sqrt(h_ii h_jj) (Higham 2002, theorem 10.3); rounding is
    not one-sided, and sqrt(k) of it is seen.
    """
    H = correlated_gram(width)
    h = H.double().numpy()
    damped = h + damp * h.diagonal().mean() * np.eye(width)
    R = factor(H, damp)
    assert R.dtype == torch.float32
    assert torch.equal(R, R.triu())
    assert bool((R.diagonal() > 0).all())
    r, size = R.double().numpy(), np.sqrt(np.outer(damped.diagonal(), damped.diagonal()))
    unit = 4 * (width + 1) ** 0.5 * 2.0**-24
    assert (np.abs(r @ r.T - damped) <= unit * size).all()
    expected = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    assert np.abs(r - expected).max() <= unit * np.linalg.cond(damped) * np.abs(expected).max()


def test_factor_ignores_the_number_of_rows():
    """A multiple of H gives a multiple of R: codes do not depend on it. By powers of two, so exactly."""
    H, W = correlated_gram(64), random(4, 64) * 3
    assert torch.equal(factor(H * 64, DAMP), factor(H, DAMP) * 8)
    assert torch.equal(gptq(W, H * 64, lattice(4), 64)[0], gptq(W, H, lattice(4), 64)[0])


def test_uncorrelated_inputs_get_round_to_nearest():
    """A diagonal H carries no error anywhere, whatever its entries, zeros included."""
    W = random(8, 160) * 3
    for diagonal in (torch.ones(160), torch.logspace(-3, 3, 160), (torch.arange(160) % 3).float(), torch.zeros(160)):
        for group in (160, 32):
            assert torch.equal(gptq(W, torch.diag(diagonal), lattice(8), group)[0], rtn(W, diagonal, lattice(8), group)[0])


def test_dead_inputs_are_rounded_and_move_nothing():
    """Inputs that were always zero: their weights are rounded as they are, and their size matters to no other weight."""
    W, H = random(6, 160) * 3, correlated_gram(160)
    dead = torch.arange(160) % 5 == 2
    H[dead] = 0
    H[:, dead] = 0
    codes, _ = gptq(W, H, lattice(6), 160)
    plain = rtn(W, H.diagonal(), lattice(6), 160)[0]
    assert torch.equal(codes[:, dead], plain[:, dead])
    assert not torch.equal(codes[:, ~dead], plain[:, ~dead])
    W[:, dead] = W[:, dead].flip(0) * 1.5
    assert torch.equal(gptq(W, H, lattice(6), 160)[0][:, ~dead], codes[:, ~dead])
    R = factor(H, DAMP)
    assert torch.equal(R[dead], torch.diag(R.diagonal())[dead])
    assert torch.equal(R[:, dead], torch.diag(R.diagonal())[:, dead])
    assert bool(torch.isfinite(R).all())


@pytest.mark.parametrize("rows", [0, 1, 63])
@pytest.mark.parametrize("name", SCALAR)
def test_singular_gram(name: str, rows: int):
    """Fewer rows than inputs, even none: finite, legal, and on the rows seen better than rounding to nearest."""
    x = random(rows, 64, seed=2)
    W, H, group = random(16, 64), x.T @ x, 32 if name in GROUPED else 64
    q = quantize_weight(W, H, name, group)
    assert check_values(q.spec, q.tensors()) is None
    assert bool(torch.isfinite(q.dequantize()).all())
    nearest = quantize_weight(W, H, name, group, method="rtn")
    if rows:
        assert float((x @ (q.dequantize() - W).T).norm()) < float((x @ (nearest.dequantize() - W).T).norm())


@pytest.mark.parametrize("name", ["int8", "vq256x4"])
def test_inputs_that_hardly_vary(name: str):
    """Of equal rows (padding of short texts) the sums less their mean are rounding errors: weights do not follow those."""
    H = stats.update(stats.init(64, 1), random(1, 64, seed=2).expand(4096, -1), 0).centred_gram
    W = random(16, 64)
    q, nearest = (
        quantize_weight(W, H, name, 64, options=WeightOptions(cd_passes=2)),
        quantize_weight(W, torch.eye(64), name, 64, method="rtn"),
    )
    assert float((q.dequantize() - W).norm()) < 2 * float((nearest.dequantize() - W).norm())


def relative_errors(q: QTensor, W: torch.Tensor, H: torch.Tensor) -> tuple[float, float]:
    """Of the weight, and of the output."""
    delta = q.dequantize() - W
    return float(delta.norm() / W.norm()), output_error(delta, W, H)


@pytest.mark.parametrize("name", SCALAR)
def test_larger_weight_error_smaller_output_error_than_rtn(name: str):
    W, H = random(48, 160, seed=5), correlated_gram(160)
    for group in (160, 32) if name in GROUPED else (160,):
        weight, output = relative_errors(quantize_weight(W, H, name, group), W, H)
        rtn_weight, rtn_output = relative_errors(quantize_weight(W, H, name, group, method="rtn"), W, H)
        assert weight > rtn_weight
        assert output < rtn_output


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("group", [128, 64, 32])
def test_more_bits_are_better(method: str, group: int):
    """Each bit halves a uniform step; the formats are compared by a factor of 1.5, of two per bit, in the output error."""
    W, H = random(32, 128, seed=6), correlated_gram(128)
    for family in (("int2", "int3", "int4", "int6", "int8"), ("table2", "table3", "table4", "int8")):
        sizes = [group if name in GROUPED else 128 for name in family]
        weights = [quantize_weight(W, H, name, size, method) for name, size in zip(family, sizes, strict=True)]
        errors = [relative_errors(q, W, H)[1] for q in weights]
        for (coarse, worse), (fine, better) in itertools.pairwise(zip(family, errors, strict=True)):
            bits = FORMATS[fine].code_bits - FORMATS[coarse].code_bits
            assert better < worse / 1.5**bits, (coarse, fine)


@pytest.mark.parametrize("name", GROUPED)
def test_smaller_groups_fit_outliers_better(name: str):
    """One weight in 64 is ten times as large: the groups without one keep their precision."""
    W = random(32, 256)
    W[:, 5::64] *= 10
    H = torch.eye(256)
    errors = [relative_errors(quantize_weight(W, H, name, group, method="rtn"), W, H)[0] for group in (64, 32, 16)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("group", [1, 20, 50, 96])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_any_group_size(group: int, method: str):
    W, H = random(5, 2 * group, seed=group), correlated_gram(2 * group)
    for name in GROUPED:
        q = quantize_weight(W, H, name, group, method)
        assert q.multiplier.shape == (5, 2)
        assert q.spec.group_size == group
        assert check_values(q.spec, q.tensors()) is None


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("name", [name for name in SCALAR if not FORMATS[name].state_bits])
def test_values_stay_legal_for_hostile_weights(name: str, method: str):
    """Outliers, one-sided rows, a single weight, equal weights: what is stored decodes, and to something near."""
    W = random(8, 128, seed=8)
    W[0, 3] = 1000
    W[1] = W[1].abs() + 1
    W[2] = -W[2].abs() - 1
    W[3] = 0
    W[3, 77] = -0.01
    W[4] = 0.25
    W[5] = 1e-6 * W[5]
    W[6] = 1e4 * W[6]
    H = correlated_gram(128)
    q = quantize_weight(W, H, name, 32 if name in GROUPED else 128, method)
    assert check_values(q.spec, q.tensors()) is None
    error = (q.dequantize() - W).norm(dim=1) / W.norm(dim=1)
    # Nothing is worse than storing zeros, the most that a quantizer to nearest may cost; feedback may add that much again.
    assert bool((error < (1.0 if method == "rtn" else 2.0)).all()), error


@pytest.mark.parametrize("group", [64, 16])
@pytest.mark.parametrize("name", GROUPED)
def test_rows_far_from_zero(name: str, group: int):
    """Weights 1 +- .0005. A channel scale of 1 / 127 decodes to within half of that: .4 %; twice as much is allowed."""
    W = 1 + 5e-4 * random(8, 64)
    weight, _ = relative_errors(quantize_weight(W, torch.eye(64), name, group, method="rtn"), W, torch.eye(64))
    assert weight < 1 / 127


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("name", EACH_KIND)
def test_a_row_of_zeros_stays_zero(name: str, method: str):
    """As a layer has that is initialised to zero or pruned, among rows that are not zero."""
    W = random(96, 64) * 0.05
    W[3] = 0
    q = quantize_weight(W, correlated_gram(64), name, 32 if name in GROUPED else 64, method)
    assert torch.equal(q.dequantize()[3], torch.zeros(64))
    assert float(q.dequantize()[4].norm()) > 0


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("name", EACH_KIND)
def test_a_weight_of_zeros_stays_zero(name: str, method: str):
    q = quantize_weight(torch.zeros(32, 64), correlated_gram(64), name, 64, method)
    assert check_values(q.spec, q.tensors()) is None
    assert torch.equal(q.dequantize(), torch.zeros(32, 64))


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("name", EACH_KIND)
def test_scale_follows_the_weight(name: str, method: str):
    """Weights 1/64 as large, by a power of two, have the same codes and 1/64 of the scale; the same input, the same result."""
    W, H = random(32, 64), correlated_gram(64)
    q, small = (quantize_weight(w, H, name, 64, method) for w in (W, W / 64))
    for key, tensor in q.tensors().items():
        other = small.tensors()[key]
        if key == "scale":
            assert torch.equal(other, tensor / 64)
        else:
            assert torch.equal(other.view(torch.uint8), tensor.view(torch.uint8)), key


@pytest.mark.parametrize("name", SCALAR)
def test_the_channel_scale_after_gptq_is_the_best_for_its_codes(name: str):
    """Any other scale of a channel has a larger output error; 1 % off adds 1e-4 of the channel's power."""
    W, H = random(40, 64), correlated_gram(64)
    q = quantize_weight(W, H, name, 64)

    def row_errors(scale: torch.Tensor) -> torch.Tensor:
        delta = (scale[:, None] * q.decode8().float() - W).double()
        return ((delta @ H.double()) * delta).sum(dim=1)

    for times in (0.99, 1.01):
        assert bool((row_errors(q.scale * times) > row_errors(q.scale)).all())


def test_fp8_and_int8_rtn_is_nearest():
    """Within half a step, known from the format: the step of int8 is the scale, of e4m3 2^-3 of the number's power of two."""
    W, H = random(16, 64), torch.eye(64)
    q = quantize_weight(W, H, "int8", 64, method="rtn")
    # The division before and the product after rounding are off by u of up to 127 steps each.
    assert bool(((q.dequantize() - W).abs() <= q.scale[:, None] * (0.5 + 254 * 2.0**-24)).all())
    q = quantize_weight(W, H, "fp8_e4m3", 64, method="rtn")
    smallest = 2.0**-6 * q.scale[:, None]
    assert bool(((q.dequantize() - W).abs() <= torch.maximum(W.abs(), smallest) * (2.0**-4 + 2.0**-22)).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float):
    W = random(4, 64)
    W[1, 2] = W[3, 4] = bad
    for name in FORMATS:
        with pytest.raises(ValueError, match="2 weights are NaN or infinite"):
            quantize_weight(W, torch.eye(64), name, 64)


def test_every_scalar_format_has_a_grid():
    assert set(GRIDS) == {name for name, f in FORMATS.items() if f.dim == 1}


def test_matrices_are_freed_without_the_garbage_collector():
    """A function that calls itself and holds them would keep gigabytes alive until the collector comes round."""
    M, change, effect = random(100, 100), torch.zeros(100, 3), torch.zeros(100, 3)
    freed = weakref.ref(M)
    gc.disable()
    try:
        sweep(lambda start, end: None, M, change, effect, 8)
        del M
        assert freed() is None
    finally:
        gc.enable()
