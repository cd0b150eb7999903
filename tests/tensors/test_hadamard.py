"""Block-Hadamard rotations against explicit matrices, and exactly where the arithmetic is exact."""

from __future__ import annotations

import pytest
import torch

from quantdit.tensors import transform
from quantdit.tensors.hadamard import block_size, hadamard, random_sign
from quantdit.tensors.transform import Transform

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def explicit(width: int, sign: torch.Tensor, block: int) -> torch.Tensor:
    """R = diag(sign) (1 kron H) `[width, width]` float64, with H_ij = (-1)^popcount(i & j) / sqrt(block)."""
    parity = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)], dtype=torch.float64)
    return sign.double()[:, None] * torch.kron(torch.eye(width // block, dtype=torch.float64), parity / block**0.5)


@pytest.mark.parametrize("n", SIZES)
def test_orthonormal_and_symmetric(n: int):
    h = hadamard(n, torch.float64)
    assert h.shape == (n, n)
    assert torch.equal(h, h.T)
    assert torch.equal(h, explicit(n, torch.ones(n), n))
    # The entries are +-1/sqrt(n) with a relative error of u each, their products sum to 1 with an error below (n + 2) u.
    error = (h @ h.T - torch.eye(n, dtype=torch.float64)).abs().max()
    assert error <= (n + 2) * unit_roundoff(torch.float64)


@pytest.mark.parametrize("n", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_exactly_orthonormal_for_powers_of_four(n: int, dtype: torch.dtype):
    """1/sqrt(n) is a power of two, so nothing is rounded, in any dtype."""
    h = hadamard(n, dtype)
    assert h.dtype == dtype
    assert torch.equal(h.double() @ h.double().T, torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [0, -4, 3, 6, 12, 100, 129])
def test_other_sizes_are_refused(n: int):
    with pytest.raises(ValueError, match=f"power of two, got {n}"):
        hadamard(n)


@pytest.mark.parametrize(
    ("width", "expected"), [(1, 1), (63, 1), (1023, 1), (2, 2), (100, 4), (192, 64), (1152, 128), (1536, 128), (4096, 128)]
)
def test_block_size(width: int, expected: int):
    assert block_size(width) == expected
    assert width % expected == 0


def test_block_size_can_be_limited():
    assert [block_size(1536, largest) for largest in (1, 16, 64, 512, 4096)] == [1, 16, 64, 512, 512]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("width", "block"), [(8, 2), (100, 4), (192, 64), (256, 128), (384, 128)])
def test_rotate_is_the_product_with_the_explicit_matrix(width: int, block: int, dtype: torch.dtype):
    """A sum of `block` products is off by at most (block + 2) u sum |x_i h_ij|, and that sum is at most the norm of x's block."""
    x, sign = random(3, 5, width, dtype=dtype), random_sign(width, 0)
    matrix = explicit(width, sign, block)
    bound = (block + 2) * unit_roundoff(dtype) * x.double().unflatten(-1, (-1, block)).norm(dim=-1)
    bound = bound.repeat_interleave(block, dim=-1)
    t = Transform(sign, block)
    for rotated, expected in ((transform.apply(t, x), matrix), (transform.weight_back(t, x), matrix.T)):
        assert rotated.dtype == dtype
        assert rotated.shape == x.shape
        assert bool(((rotated.double() - x.double() @ expected).abs() <= 2 * bound).all())  # the product expected rounds as well
    assert torch.equal(x, random(3, 5, width, dtype=dtype))  # the input is left alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rotate_back_undoes_rotate_exactly_on_small_integers(dtype: torch.dtype):
    """Of -1, 0, 1 in blocks of 16 all sums are multiples of 1/4 up to 4, and on the way back of 1/16 up to 16: 8 bits suffice."""
    x = torch.randint(-1, 2, (7, 96), generator=torch.Generator().manual_seed(0)).to(dtype)
    sign = random_sign(96, 1)
    t = Transform(sign, 16)
    rotated = transform.apply(t, x)
    assert torch.equal(rotated.double(), x.double() @ explicit(96, sign, 16))
    assert torch.equal(transform.weight_back(t, rotated), x)
    assert not torch.equal(rotated, x)


def test_rotation_keeps_the_product_of_inputs_and_weights():
    """(x R)(w R)^T = x w^T; each side's sums are off by (k + block) u |x| |w| at most, in float64."""
    x, w, sign = random(9, 192, seed=1), random(11, 192, seed=2), random_sign(192, 5)
    bound = 4 * (192 + 64) * unit_roundoff(torch.float64) * x.norm(dim=1)[:, None] * w.norm(dim=1)
    t = Transform(sign, 64)
    assert bool(((transform.apply(t, x) @ transform.apply_to_weight(t, w).T - x @ w.T).abs() <= bound).all())


@pytest.mark.parametrize(("width", "block"), [(12, 4), (192, 64)])
def test_rotate_gram_is_that_of_rotated_inputs(width: int, block: int):
    """R^T G R, entry by entry below 2 (rows + 2 block) u |column| |column|, all in float64."""
    x, sign = random(50, width, seed=3), random_sign(width, 2)
    t = Transform(sign, block)
    gram = transform.gram(t, x.T @ x)
    matrix = explicit(width, sign, block)
    rotated = transform.apply(t, x)
    norms = (x.T @ x).trace()  # bounds every product of two column norms, rotated or not
    tolerance = 2 * (50 + 2 * block) * unit_roundoff(torch.float64) * float(norms)
    torch.testing.assert_close(gram, matrix.T @ (x.T @ x) @ matrix, rtol=0, atol=tolerance)
    torch.testing.assert_close(gram, rotated.T @ rotated, rtol=0, atol=tolerance)
    assert tolerance < 1e-6 * float(gram.diagonal().min())  # so small that a wrong sign or transposition shows


def test_a_rotation_spreads_one_outlier_over_its_block_only():
    x = torch.zeros(1, 128)
    x[0, 70] = 8.0
    rotated = transform.apply(Transform(random_sign(128, 0), 64), x)
    assert torch.equal(rotated[0, :64], torch.zeros(64))
    assert torch.equal(rotated[0, 64:].abs(), torch.ones(64))


def test_signs_are_random_and_repeatable():
    sign = random_sign(4096, 7)
    assert sign.dtype == torch.int8
    assert set(sign.tolist()) == {-1, 1}
    assert torch.equal(sign, random_sign(4096, 7))
    # Other seeds and widths are independent draws: of 4096 (2048) signs half agree, six sigma = 6 sqrt(n) / 2.
    for other in (random_sign(4096, 8), random_sign(2048, 7)):
        n = len(other)
        assert abs(int((other == sign[:n]).sum()) - n / 2) < 3 * n**0.5
    assert abs(int(sign.sum())) < 6 * 4096**0.5


def test_signs_do_not_depend_on_or_move_the_global_generator():
    torch.manual_seed(0)
    first, state = random_sign(64, 1), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(random_sign(64, 1), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
