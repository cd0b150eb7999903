"""The low-rank branch: truncation against dense algebra, and the relations that must hold on output error."""

from __future__ import annotations

import pytest
import torch

from quantdit.calibration.lowrank import EXACT_SIZE, low_rank, truncate


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_gram(width: int, rows: int = 600, seed: int = 0) -> torch.Tensor:
    """Channel strengths over two orders of magnitude, mixed."""
    x = (random(rows, width, seed=seed) * torch.logspace(-1, 1, width)) @ torch.linalg.qr(random(width, width, seed=seed + 1)).Q
    return x.T @ x


def rounded(W: torch.Tensor, bits: int = 3) -> torch.Tensor:
    """Round to nearest, a scale per output channel."""
    scale = W.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (W / scale.masked_fill(scale == 0, 1)).round() * scale


def energy(D: torch.Tensor, G: torch.Tensor) -> float:
    return float(((D.double() @ G.double()) * D.double()).sum())


def decaying(out: int, width: int, seed: int = 0) -> torch.Tensor:
    """A weight of a few strong directions above a flat floor."""
    strong = random(out, 8, seed=seed) @ random(8, width, seed=seed + 1)
    return 0.3 * strong + random(out, width, seed=seed + 2)


@pytest.mark.parametrize("shape", [(60, 100), (100, 60), (64, 64)])
@pytest.mark.parametrize("rank", [1, 16, 60])
def test_plain_truncation_is_the_svd(shape: tuple[int, int], rank: int):
    E = random(*shape)
    up, down = truncate(E, rank)
    assert up.dtype == down.dtype == torch.bfloat16
    assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))
    optimum = float(torch.linalg.svdvals(E.double())[rank:].square().sum())
    found = float((E - up.float() @ down.float()).double().square().sum())
    # bfloat16 moves each factor by at most 2^-9 of its entries: the product by 2^-8 of its norm at most.
    assert optimum <= found <= (optimum**0.5 + 2**-8 * float(E.norm())) ** 2


@pytest.mark.parametrize("rank", [1, 16, 32])
def test_weighted_truncation_is_the_svd_in_the_root_of_the_gram(rank: int):
    E, G = random(60, 100), correlated_gram(100)
    optimum = float(torch.linalg.svdvals(E.double() @ torch.linalg.cholesky(G.double()))[rank:].square().sum())
    up, down = truncate(E, rank, G)
    found = energy(E - up.float() @ down.float(), G)
    assert optimum <= found <= (optimum**0.5 + 2**-8 * energy(E, G) ** 0.5) ** 2


@pytest.mark.parametrize("seed", range(3))
def test_weighted_beats_plain_on_output_error(seed: int):
    E, G = random(60, 100, seed=seed), correlated_gram(100, seed=seed)
    errors = []
    for gram in (None, G):
        up, down = truncate(E, 16, gram)
        errors.append(energy(E - up.float() @ down.float(), G))
    assert errors[1] < 0.9 * errors[0]


def test_singular_gram():
    x = random(5, 64)
    up, down = truncate(random(40, 64, seed=1), 5, x.T @ x)
    product = up.float() @ down.float()
    E = random(40, 64, seed=1)
    # Five inputs span five dimensions, so rank 5 answers them all, but for bfloat16.
    assert float((x @ (E - product).T).norm()) <= 2**-7 * float((x @ E.T).norm()) + 2**-8 * float(x.norm() * E.norm())
    assert bool(torch.isfinite(product).all())


@pytest.mark.parametrize("weighted", [False, True])
def test_wide_weights_lose_nearly_nothing(weighted: bool):
    """Subspace iteration keeps 99 % of the energy that the exact decomposition keeps, on a flat spectrum, its worst case."""
    E = random(EXACT_SIZE + 88, 200)
    G = correlated_gram(200) if weighted else torch.eye(200)
    up, down = truncate(E, 16, G if weighted else None)
    kept = energy(E, G) - energy(E - up.float() @ down.float(), G)
    best = float(torch.linalg.svdvals(E.double() @ torch.linalg.cholesky(G.double()))[:16].square().sum())
    assert 0.99 * best <= kept <= best


@pytest.mark.parametrize("out", [40, EXACT_SIZE + 8])
def test_zeros(out: int):
    up, down = truncate(torch.zeros(out, 32), 4, torch.zeros(32, 32))
    assert torch.equal(up.float() @ down.float(), torch.zeros(out, 32))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rank", [4, 16, 32])
def test_never_worse_than_no_branch(rank: int, seed: int):
    W, G = decaying(48, 64, seed), correlated_gram(64, seed=seed)
    branch = low_rank(W, G, rank, rounded)
    without = (energy(rounded(W) - W, G) / energy(W, G)) ** 0.5
    assert branch is not None
    assert branch.error_without == pytest.approx(without, rel=1e-4)
    product = branch.up.float() @ branch.down.float()
    assert torch.equal(branch.product, product)
    error = (energy(product + rounded(W - product) - W, G) / energy(W, G)) ** 0.5
    assert branch.error == pytest.approx(error, rel=1e-4)
    assert branch.error < without


def test_higher_rank_helps():
    W, G = decaying(64, 64), correlated_gram(64)
    errors = [low_rank(W, G, rank, rounded).error for rank in (2, 8, 32)]
    assert errors[0] > errors[1] > errors[2]


def test_nothing_to_gain_is_no_branch():
    """A weight that the quantizer keeps exactly."""
    assert low_rank(random(20, 20), torch.eye(20), 4, lambda w: w) is None
    assert low_rank(torch.zeros(20, 20), torch.eye(20), 4, rounded) is None
    assert low_rank(random(20, 20), torch.zeros(20, 20), 4, rounded) is None


def test_start_from_the_weight_wins_where_few_directions_dominate():
    """SVDQuant's case: the strong directions leave the weight and its range shrinks."""
    W = 5 * random(64, 4) @ random(4, 64, seed=1) + 0.1 * random(64, 64, seed=2)
    branch = low_rank(W, torch.eye(64), 4, rounded)
    assert branch.start.startswith("weight")
    assert branch.error < 0.2 * branch.error_without


def test_noise_of_the_inputs_counts():
    """With noisy inputs the branch takes over more of the weight, and the error says so."""
    W, G = decaying(64, 64), correlated_gram(64)
    noise = 0.02 * float(G.trace()) / 64
    quiet, noisy = low_rank(W, G, 8, rounded), low_rank(W, G, 8, rounded, noise)

    def error(product: torch.Tensor) -> float:
        rest = rounded(W - product)
        squared = energy(product + rest - W, G) + noise * float(rest.double().square().sum())
        return (squared / energy(W, G)) ** 0.5

    assert noisy.error == pytest.approx(error(noisy.product), rel=1e-4)
    assert noisy.error_without == pytest.approx(error(torch.zeros(64, 64)), rel=1e-4)
    assert noisy.error <= error(quiet.product) * (1 + 1e-6)
    assert noisy.error < noisy.error_without


@pytest.mark.parametrize("out", [40, EXACT_SIZE + 8])
def test_the_seed_decides_and_nothing_else(out: int):
    W, G = random(out, 48), correlated_gram(48)
    state = torch.get_rng_state()
    first, second = low_rank(W, G, 8, rounded, seed=1), low_rank(W, G, 8, rounded, seed=1)
    assert torch.equal(first.up, second.up)
    assert torch.equal(first.down, second.down)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rank", [0, -1, 17, 1000])
def test_impossible_ranks_are_refused(rank: int):
    with pytest.raises(ValueError, match=rf"weight \(16, 32\) needs a rank in 1\.\.16, got {rank}"):
        low_rank(random(16, 32), torch.eye(32), rank, rounded)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_are_refused(bad: float):
    W = random(16, 32)
    W[3, 4] = bad
    with pytest.raises(ValueError, match="1 values are NaN or infinite"):
        low_rank(W, torch.eye(32), 4, lambda w: torch.zeros_like(w))
    with pytest.raises(ValueError, match="1 values are NaN or infinite"):
        truncate(W, 4)
