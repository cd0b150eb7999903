"""Error feedback for vector codebooks: against a slow search over the same objective, and what must hold whatever the numbers."""

from __future__ import annotations

import itertools

import pytest
import torch

from quantdit.calibration.errors import energy, output_error
from quantdit.calibration.gptq import factor
from quantdit.calibration.gptvq import descend, feedback, fit_codebook, nearest, sign_codes, signed_errors
from quantdit.calibration.quantize import WeightOptions, quantize_weight
from quantdit.formats import FORMATS
from quantdit.formats.codebook import entries_of

VECTORS = [name for name, f in FORMATS.items() if f.dim > 1]
SIGNED = [name for name in VECTORS if FORMATS[name].sign_split]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_gram(width: int, rows: int = 500, seed: int = 0) -> torch.Tensor:
    x = random(rows, width, seed=seed) @ random(width, width, seed=seed + 1) / width**0.5
    x = x * torch.logspace(-0.5, 0.5, width)
    gram = x.T @ x
    return (gram + gram.T) / 2


def by_search(W: torch.Tensor, R: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Group after group, each codeword tried: the one that leaves the least of `|D R|^2` over the columns decided so far."""
    d = codebook.shape[1]
    W, R, codebook = W.double(), R.double(), codebook.double()
    codes = torch.zeros(len(W), W.shape[1] // d, dtype=torch.int64)
    for row in range(len(W)):
        D = torch.zeros(W.shape[1], dtype=torch.float64)
        for g in range(codes.shape[1]):
            part = slice(g * d, g * d + d)
            errors = []
            for word in codebook:
                D[part] = W[row, part] - word
                errors.append(float((D[: g * d + d] @ R[: g * d + d, part]).square().sum()))
            codes[row, g] = min(range(len(errors)), key=errors.__getitem__)
            D[part] = W[row, part] - codebook[codes[row, g]]
    return codes


@pytest.mark.parametrize(("d", "groups"), [(2, 7), (4, 5), (8, 3), (4, 20)])
def test_feedback_takes_the_codeword_that_a_search_takes(d: int, groups: int):
    W, H, codebook = random(5, d * groups, seed=2), correlated_gram(d * groups), random(12, d, seed=3)
    assert torch.equal(feedback(W, H, codebook), by_search(W, factor(H, 0.01), codebook))


def test_feedback_in_falling_power_is_that_of_permuted_groups():
    d, groups = 4, 9
    W, H, codebook = random(6, d * groups, seed=4), correlated_gram(d * groups, seed=5), random(16, d, seed=6)
    order = H.diagonal().reshape(-1, d).sum(1).argsort(descending=True, stable=True)
    columns = (order[:, None] * d + torch.arange(d)).flatten()
    expected = feedback(W[:, columns], H[columns][:, columns], codebook)
    assert torch.equal(feedback(W, H, codebook, act_order=True)[:, order], expected)


def test_without_correlation_the_nearest_codeword_is_taken():
    W, codebook = random(7, 40, seed=7), random(30, 4, seed=8)
    codes = feedback(W, torch.eye(40), codebook)
    assert torch.equal(codes.flatten(), torch.cdist(W.reshape(-1, 4), codebook).argmin(dim=1))


def test_nearest_is_that_of_the_metric():
    targets, codebook, metric = random(50, 4), random(9, 4, seed=1), random(4, 4, seed=2)
    expected = torch.cdist((targets @ metric).double(), (codebook @ metric).double()).argmin(dim=1)
    assert torch.equal(nearest(targets, codebook, metric), expected)


def error_of(codes: torch.Tensor, W: torch.Tensor, H: torch.Tensor, codebook: torch.Tensor) -> float:
    return energy((codebook[codes].flatten(1) - W).double(), H)


@pytest.mark.parametrize("d", [2, 4, 8])
def test_descent_never_raises_the_error_and_ends_where_no_group_can_do_better(d: int):
    W, H, codebook = random(6, 48, seed=9), correlated_gram(48, seed=10), random(20, d, seed=11)
    codes = feedback(W, H, codebook)
    errors = [error_of(codes, W, H, codebook)]
    for _ in range(30):
        codes = descend(codes, W, H, codebook, 1)
        errors.append(error_of(codes, W, H, codebook))
    assert errors[1] < errors[0] * 0.999
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
    # No other codeword at any one group is better.
    D = (codebook[codes].flatten(1) - W).double()
    at_rest = (D @ H.double() * D).sum(1)
    for g in range(codes.shape[1]):
        for word in codebook:
            tried = D.clone()
            tried[:, g * d : g * d + d] = word.double() - W[:, g * d : g * d + d]
            assert bool(((tried @ H.double() * tried).sum(1) >= at_rest * (1 - 1e-5)).all())


def test_codebook_ends_where_its_gradient_does():
    W, H, codebook = random(16, 64, seed=12), correlated_gram(64, seed=13), random(10, 4, seed=14)
    codes, row_weight = feedback(W, H, codebook), random(16, seed=15).abs() + 0.1
    codes[codes == 3] = 4  # a codeword that nothing has

    def weighted(c: torch.Tensor) -> float:
        return energy(((c[codes].flatten(1) - W) * row_weight.sqrt()[:, None]).double(), H)

    few, many = fit_codebook(codebook, codes, W, H, row_weight, 2), fit_codebook(codebook, codes, W, H, row_weight, 200)
    assert weighted(many) <= weighted(few) < weighted(codebook)
    assert torch.equal(many[3], codebook[3])
    moved = many.clone().double().requires_grad_(True)
    D = (moved[codes].flatten(1) - W.double()) * row_weight.double().sqrt()[:, None]
    loss = (D @ H.double() * D).sum()
    loss.backward()
    assert float(moved.grad.abs().max()) < 1e-3 * float(loss.detach())


@pytest.mark.parametrize("name", VECTORS)
def test_feedback_and_descent_lower_the_output_error(name: str):
    W, H = random(96, 128, seed=16), correlated_gram(128, seed=17)
    plain = quantize_weight(W, H, name, 128, "rtn")
    fed = quantize_weight(W, H, name, 128, "gptq", WeightOptions(act_order=True))
    descended = quantize_weight(W, H, name, 128, "gptq", WeightOptions(act_order=True, cd_passes=2))
    errors = [output_error(q.dequantize() - W, W, H) for q in (plain, fed, descended)]
    assert errors[1] < 0.95 * errors[0] and errors[2] <= errors[1]


@pytest.mark.parametrize("d", [2, 4])
def test_signed_codewords_are_those_of_a_search_among_the_targets_signs(d: int):
    targets, codebook, metric = random(60, d), random(9, d, seed=1).abs(), random(d, d, seed=2)
    codes = nearest(targets, codebook, metric, sign_split=True)
    found = entries_of(codebook, codes, True)
    signs = torch.where(targets < 0, -1.0, 1.0)
    assert bool((found * signs >= 0).all())
    tried = ((targets[:, None] - signs[:, None] * codebook).double() @ metric.double()).square().sum(-1)
    assert torch.equal(codes % 9, tried.argmin(dim=1))
    errors, flips = signed_errors(targets, codebook, metric)
    expected = tried - (targets.double() @ metric.double()).square().sum(1, keepdim=True)
    torch.testing.assert_close(errors.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(codes, errors.argmin(1) + flips)


def test_codes_of_signs_name_the_negative_ones():
    assert sign_codes(torch.tensor([[1.0, 2.0, 3.0], [-1.0, 2.0, -3.0], [0.0, -0.5, 0.0]])).tolist() == [0, 0b101, 0b010]


@pytest.mark.parametrize("d", [4, 8])
def test_descent_with_signs_never_raises_the_error(d: int):
    W, H, codebook = random(6, 48, seed=9), correlated_gram(48, seed=10), random(20, d, seed=11).abs()
    codes = feedback(W, H, codebook, sign_split=True)
    errors = []
    for _ in range(8):
        errors.append(energy((entries_of(codebook, codes, True).flatten(1) - W).double(), H))
        codes = descend(codes, W, H, codebook, 1, sign_split=True)
    assert errors[1] < 0.999 * errors[0] and all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(errors))


def test_a_codebook_of_magnitudes_is_fitted_too():
    W, H, codebook = random(16, 64, seed=12), correlated_gram(64, seed=13), random(10, 4, seed=14).abs()
    codes, row_weight = feedback(W, H, codebook, sign_split=True), random(16, seed=15).abs() + 0.1

    def weighted(c: torch.Tensor) -> torch.Tensor:
        D = (entries_of(c, codes, True).flatten(1) - W.double()) * row_weight.double().sqrt()[:, None]
        return (D @ H.double() * D).sum()

    fitted = fit_codebook(codebook, codes, W, H, row_weight, 200, sign_split=True)
    moved = fitted.double().requires_grad_(True)
    loss = weighted(moved)
    loss.backward()
    assert float(loss.detach()) < float(weighted(codebook.double()))
    assert float(moved.grad.abs().max()) < 1e-3 * float(loss.detach())


@pytest.mark.parametrize("name", SIGNED)
def test_signs_split_off_are_worth_their_bits(name: str):
    """On Gaussian weights, against codebooks of vectors of the same bits."""
    W, H = random(512, 256, seed=22), torch.eye(256)
    plain, ratio = {"ssvq256x8": ("vq256x4", 0.995), "ssvq256x4": ("vq64x2", 0.95)}[name]
    errors = [output_error(quantize_weight(W, H, n, 256, "rtn").dequantize() - W, W, H) for n in (name, plain)]
    assert errors[0] < ratio * errors[1]


def test_same_seed_same_codes():
    W, H = random(64, 64, seed=18), correlated_gram(64, seed=19)
    first, second = (quantize_weight(W, H, "vq256x4", 64, "gptq", WeightOptions(seed=3)) for _ in range(2))
    assert torch.equal(first.data, second.data) and torch.equal(first.codebook, second.codebook)


def test_dead_inputs_and_rows_of_zeros_are_no_trouble():
    W, H = random(40, 32, seed=20), correlated_gram(32, seed=21)
    H[5], H[:, 5], W[7] = 0, 0, 0
    q = quantize_weight(W, H, "vq256x4", 32, "gptq", WeightOptions(act_order=True, cd_passes=2))
    assert bool(torch.isfinite(q.dequantize()).all()) and not q.dequantize()[7].any()
