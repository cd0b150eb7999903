"""k-means codebooks: nearest codewords, determinism, repair of empty cells, degenerate inputs."""

from __future__ import annotations

import itertools

import pytest
import torch

from quantdit.calibration.kmeans import SAMPLE, assign, kmeans
from quantdit.calibration.quantize import WeightOptions, quantize_weight
from quantdit.formats import FORMATS

U32 = 2.0**-24
VECTORS = [name for name, f in FORMATS.items() if f.dim > 1]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distances(vectors: torch.Tensor, weights: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """`[n, k]` float64, by the definition."""
    v, w, c = vectors.double(), weights.double(), codebook.double()
    return (w[:, None] * (v[:, None] - c).square()).sum(dim=2)


def error(vectors: torch.Tensor, weights: torch.Tensor, codebook: torch.Tensor) -> float:
    return float(distances(vectors, weights, codebook).amin(dim=1).sum())


@pytest.mark.parametrize("d", [1, 2, 4])
def test_assign_finds_the_nearest(d: int):
    """Up to the rounding of w c^2 - 2 w v c, which is (2 d + 2) u of the sum of its magnitudes."""
    vectors, weights, codebook = random(500, d), random(500, d, seed=1).abs() + 0.01, random(32, d, seed=2)
    chosen = assign(vectors, weights, codebook)
    exact = distances(vectors, weights, codebook)
    w, v, c = weights.double(), vectors.double().abs(), codebook.double()
    rounding = (2 * d + 2) * U32 * (w @ c.square().T + 2 * (w * v) @ c.abs().T).amax(dim=1)
    assert chosen.dtype == torch.int64
    assert bool((exact.gather(1, chosen[:, None])[:, 0] <= exact.amin(dim=1) + 2 * rounding).all())
    assert len(chosen.unique()) > 16


def test_assign_heeds_the_weights():
    codebook = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    vectors = torch.tensor([[0.9, 0.9], [0.9, 0.9]])
    weights = torch.tensor([[10.0, 1.0], [1.0, 10.0]])  # one error is .1 and .9, weighed either way
    assert assign(vectors, weights, codebook).tolist() == [0, 1]


@pytest.mark.parametrize("memory", [1, 12 * 7, 12 * 1000, 12 * 10**6])
def test_the_memory_bound_changes_nothing(memory: int):
    codebook = torch.tensor([[-3.0], [0.0], [3.0]])
    index = torch.arange(1100) % 3
    assert torch.equal(assign(codebook[index], torch.ones(len(index), 1), codebook, memory), index)
    vectors, weights = random(1100, 2), random(1100, 2, seed=1).abs()
    assert torch.equal(kmeans(vectors, weights, 9, 0, 3, memory), kmeans(vectors, weights, 9, 0, 3))


def test_separated_clusters_are_found():
    """Their weighted means, to the rounding of a sum of 40 float32."""
    centres = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0], [-50.0, 0.0]])
    index = torch.arange(200) % 5
    vectors, weights = centres[index] + random(200, 2), random(200, 2, seed=1).abs() + 0.1
    codebook = kmeans(vectors, weights, 5, seed=0)
    order = torch.cdist(centres, codebook).argmin(dim=1)
    assert sorted(order.tolist()) == list(range(5))
    for cluster in range(5):
        v, w = vectors[index == cluster].double(), weights[index == cluster].double()
        mean = (w * v).sum(dim=0) / w.sum(dim=0)
        assert bool(((codebook[order[cluster]] - mean).abs() <= 82 * U32 * (v.abs().amax(dim=0))).all())


def test_iterations_never_make_it_worse():
    """Lloyd's step lowers the error or leaves it; float32 means are off by 1e-6 of it at most."""
    vectors, weights = random(600, 4), random(600, 4, seed=1).abs() + 0.01
    errors = [error(vectors, weights, kmeans(vectors, weights, 16, seed=0, iterations=i)) for i in range(12)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_more_codewords_are_better():
    vectors, weights = random(2000, 2), torch.ones(2000, 2)
    errors = [error(vectors, weights, kmeans(vectors, weights, k, seed=0)) for k in (1, 4, 16, 64, 256)]
    assert errors == sorted(errors, reverse=True)
    mean = vectors.double().mean(dim=0, keepdim=True)
    assert errors[0] == pytest.approx(error(vectors, weights, mean), rel=1e-6)  # one codeword: the mean


@pytest.mark.parametrize("count", [300, SAMPLE + 1000])
def test_deterministic_for_a_seed(count: int):
    vectors, weights = random(count, 2), torch.ones(count, 2)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = kmeans(vectors, weights, 8, seed=3, iterations=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(kmeans(vectors, weights, 8, seed=3, iterations=5), first)
    assert not torch.equal(kmeans(vectors, weights, 8, seed=4, iterations=5), first)


@pytest.mark.parametrize("seed", range(8))
def test_empty_cells_are_repaired(seed: int):
    """Three quarters of the vectors weigh nothing. Where one of them starts a cell, the cell is empty and must move.

    As many codewords as there are vectors of weight: the error is zero, up to the rounding of the mean of four equal vectors.
    """
    heavy = random(16, 2, seed=10)
    vectors = torch.cat([heavy.repeat(4, 1), random(192, 2, seed=11) + 100])
    weights = torch.cat([torch.ones(64, 2), torch.zeros(192, 2)])
    codebook = kmeans(vectors, weights, 16, seed=seed)
    assert codebook.shape == (16, 2)
    assert error(heavy, torch.ones(16, 2), codebook) <= 32 * (6 * U32 * float(heavy.abs().max())) ** 2


@pytest.mark.parametrize("distinct", [1, 3, 7])
def test_fewer_distinct_vectors_than_codewords(distinct: int):
    """Every vector gets a codeword of its own, up to the rounding of a mean of equal numbers; the spare ones are finite."""
    points = random(distinct, 4)
    vectors = points[torch.arange(100) % distinct]
    codebook = kmeans(vectors, torch.ones(100, 4), 8, seed=0)
    assert codebook.shape == (8, 4)
    assert bool(torch.isfinite(codebook).all())
    assert error(vectors, torch.ones(100, 4), codebook) <= 400 * (102 * U32 * float(points.abs().max())) ** 2


@pytest.mark.parametrize("count", [1, 5, 31])
def test_fewer_vectors_than_codewords(count: int):
    """The docstring: this raises nothing and repeats codewords."""
    vectors = random(count, 4)
    codebook = kmeans(vectors, torch.ones(count, 4), 32, seed=0)
    assert codebook.shape == (32, 4)
    assert error(vectors, torch.ones(count, 4), codebook) <= 4 * count * (3 * U32 * float(vectors.abs().max())) ** 2


@pytest.mark.parametrize("name", VECTORS)
def test_a_layer_too_small_for_its_codebook(name: str):
    """4 x 16 weights are 16 or 32 vectors: each is a codeword, rounded to the int8 grid of -64..64."""
    weight = random(4, 16)
    q = quantize_weight(weight, torch.eye(16), name, 16, "rtn")
    half_a_step = q.scale[:, None] / 2
    assert bool(((q.dequantize() - weight).abs() <= half_a_step * (1 + 1e-5)).all())


@pytest.mark.parametrize("name", VECTORS)
def test_quantized_vectors_are_the_nearest_codewords(name: str):
    f = FORMATS[name]
    weight, gram = random(24, 64), torch.diag(random(64, seed=1).square() + 0.1)
    q = quantize_weight(weight, gram, name, 64, "rtn", WeightOptions(seed=2))
    vectors = (weight / q.scale[:, None]).reshape(-1, f.dim)
    vectors = vectors.abs() if f.sign_split else vectors
    importance = gram.diagonal().reshape(-1, f.dim).repeat(24, 1)
    exact = distances(vectors, importance, q.codebook.float())
    chosen = f.unpack(f, q.data, 64 // f.dim).reshape(-1, 1).long() % f.codewords
    # Entries reach 64: squares of 4096 in float32, 10 roundings.
    tolerance = 10 * U32 * 3 * float(importance.sum(dim=1).max() * vectors.abs().max().clamp_min(64) ** 2)
    assert bool((exact.gather(1, chosen)[:, 0] <= exact.amin(dim=1) + tolerance).all())
    same = quantize_weight(weight, gram, name, 64, "rtn", WeightOptions(seed=2))
    assert all(torch.equal(a, b) for a, b in zip(q.tensors().values(), same.tensors().values(), strict=True))


@pytest.mark.parametrize("name", VECTORS)
def test_importance_is_heeded(name: str):
    """Inputs 100 times as strong get the smaller error."""
    weight, strong = random(32 * FORMATS[name].dim, 32), torch.ones(32)
    strong[::2] = 100.0
    delta = quantize_weight(weight, torch.diag(strong), name, 32).dequantize() - weight
    assert float(delta[:, ::2].norm()) < 0.8 * float(delta[:, 1::2].norm())
