"""Transforms leave a linear's output alone, whatever they are made of, and say what is wrong with damaged ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantdit import transform
from quantdit.formats import Field
from quantdit.hadamard import block_size, hadamard, random_sign
from quantdit.transform import Transform

WIDTHS = (60, 100, 192, 384, 1152)  # 4 x 15, 4 x 25, 64 x 3, 128 x 3, 128 x 9


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthogonal(count: int, block: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(random(count, block, block, seed=seed, dtype=torch.float64)).Q.float()


def made(kind: str, width: int, smoothed: bool) -> Transform:
    block = block_size(width)
    t = Transform()
    if kind == "hadamard":
        t = Transform(premultiplier=random_sign(width, 3), block=block)
    if kind == "outlier":
        permutation = torch.randperm(width, generator=torch.Generator().manual_seed(5)).int()
        blocks = [orthogonal(width // block, block, seed) for seed in (1, 2)]
        t = Transform(rotation1=blocks[0], permutation=permutation, rotation2=blocks[1])
    return transform.smooth(t, random(width, seed=4).exp() if smoothed else None)


def explicit(t: Transform, width: int) -> torch.Tensor:
    """T `[k, k]` float64, from its definition."""
    matrix = torch.eye(width, dtype=torch.float64)
    if t.premultiplier is not None:
        matrix = torch.diag(t.premultiplier.double())
    if t.kind == "hadamard":
        matrix = matrix @ torch.kron(torch.eye(width // t.block, dtype=torch.float64), hadamard(t.block, torch.float64))
    if t.kind == "outlier":
        matrix = matrix @ torch.block_diag(*t.rotation1.double())
        matrix = matrix[:, t.permutation.long()] @ torch.block_diag(*t.rotation2.double())
    return matrix


CASES = pytest.mark.parametrize(("kind", "smoothed"), [(k, s) for k in transform.KINDS for s in (False, True)])


@CASES
@pytest.mark.parametrize("width", WIDTHS)
def test_the_output_stays(kind: str, smoothed: bool, width: int):
    t = made(kind, width, smoothed)
    x, w = random(3, 7, width, seed=6), random(50, width, seed=7)
    y = transform.apply(t, x) @ transform.apply_to_weight(t, w).T
    assert float((y - x @ w.T).norm() / (x @ w.T).norm()) <= 1e-5


@CASES
def test_apply_is_the_product_with_the_explicit_matrix(kind: str, smoothed: bool):
    t = made(kind, 192, smoothed)
    x = random(9, 192, dtype=torch.float64)
    matrix = explicit(t, 192)
    torch.testing.assert_close(transform.apply(t, x), x @ matrix, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(transform.apply_to_weight(t, x), x @ torch.linalg.inv(matrix).T, rtol=1e-5, atol=1e-4)


@CASES
@pytest.mark.parametrize("width", WIDTHS)
def test_weight_back_inverts(kind: str, smoothed: bool, width: int):
    t = made(kind, width, smoothed)
    w = random(30, width)
    back = transform.weight_back(t, transform.apply_to_weight(t, w))
    assert float((back - w).norm() / w.norm()) <= 1e-5


@CASES
def test_gram_is_that_of_transformed_rows(monkeypatch: pytest.MonkeyPatch, kind: str, smoothed: bool):
    t = made(kind, 192, smoothed)
    x = random(300, 192)
    rotated, gram = transform.apply(t, x), x.T @ x
    expected, given = rotated.T @ rotated, gram.clone()
    for rows in (50, 1024):
        monkeypatch.setattr(transform, "GRAM_ROWS", rows)
        assert float((transform.gram(t, gram) - expected).norm() / expected.norm()) <= 1e-5
        assert torch.equal(gram, given)


@CASES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_dtype_but_float16_is_kept_and_rounded_once(kind: str, smoothed: bool, dtype: torch.dtype):
    t = made(kind, 192, smoothed)
    x = random(5, 192, dtype=dtype)
    y = transform.apply(t, x)
    assert y.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    exact = x.double() @ explicit(t, 192)
    # Half a step of the dtype; besides it float32 arithmetic over at most two blocks of 64, of entries that span e^3.
    bound = torch.finfo(y.dtype).eps / 2 * exact.abs() + 300 * torch.finfo(torch.float32).eps * exact.abs().amax()
    assert bool(((y.double() - exact).abs() <= bound).all())


def test_smoothing_takes_a_byte_a_channel_and_moves_a_factor_by_an_eighth_at_most():
    factor = random(4096, seed=4).exp() * 3
    t = transform.smooth(Transform(premultiplier=random_sign(4096, 3), block=128), factor)
    assert torch.equal(t.premultiplier.to(torch.float8_e5m2).float(), t.premultiplier)
    assert torch.equal(t.premultiplier.sign(), random_sign(4096, 3).float())
    moved = t.premultiplier.abs() * factor
    assert 0.11 < float((moved - 1).abs().max()) <= 0.125


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e30])
def test_factors_beyond_what_a_byte_holds_become_the_nearest_it_holds(size: float):
    t = transform.smooth(Transform(), torch.tensor([size, 1.0]))
    kept = t.premultiplier
    assert torch.equal(kept.to(torch.float8_e5m2).float(), kept) and float(kept[1]) == 1
    assert transform.check_values(t) is None
    assert float(kept[0]) == (57344 if size < 1 else 2**-14)


def test_a_hadamard_is_that_of_hadamard_py_block_by_block():
    t = made("hadamard", 384, False)
    x = random(5, 384)
    blocks = (x * t.premultiplier).unflatten(-1, (3, 128)) @ hadamard(128)
    assert torch.equal(transform.apply(t, x), blocks.flatten(-2))


def test_identity():
    x = random(5, 60)
    assert Transform().identity
    assert torch.equal(transform.apply(Transform(), x), x)
    assert not made("hadamard", 60, False).identity
    assert not made("none", 60, True).identity


@CASES
@pytest.mark.parametrize("width", WIDTHS)
def test_fields_describe_the_tensors(kind: str, smoothed: bool, width: int):
    t = made(kind, width, smoothed)
    named = transform.tensors(t)
    assert t.kind == kind
    assert t.smoothed == smoothed
    assert {n: Field(v.dtype, tuple(v.shape)) for n, v in named.items()} == transform.fields(
        kind, width, t.rotation_block, smoothed
    )
    again = transform.from_tensors(kind, t.rotation_block, named)
    x = random(5, width)
    assert torch.equal(transform.apply(again, x), transform.apply(t, x))
    assert transform.check_values(again) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("givens", 64, 64), "unknown rotation 'givens'"),
        (("none", 0), "positive width"),
        (("none", 64, 64), "cannot have blocks of 64"),
        (("hadamard", 64, 1), "cannot have blocks of 1"),
        (("hadamard", 96, 12), "cannot have blocks of 12"),
        (("outlier", 96, 64), "cannot have blocks of 64"),
        (("outlier", 96, 0), "cannot have blocks of 0"),
        (("outlier", 96, -32), "cannot have blocks of -32"),
    ],
)
def test_impossible_fields_are_refused(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        transform.fields(*arguments)


def test_parts_that_do_not_go_together_are_refused():
    whole = made("outlier", 192, False)
    with pytest.raises(ValueError, match="together"):
        replace(whole, permutation=None)
    with pytest.raises(ValueError, match="one rotation"):
        replace(whole, block=64)


def damaged(name: str, change) -> Transform:
    """An outlier rotation, or the signs of a Hadamard, with one tensor spoiled."""
    t = made("hadamard", 192, name == "smoothing") if name in ("sign", "smoothing") else made("outlier", 192, False)
    name = "premultiplier" if name in ("sign", "smoothing") else name
    tensor = getattr(t, name).contiguous().clone()
    tensor.view(-1)[7] = change(tensor.view(-1)[7])
    return replace(t, **{name: tensor})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sign", lambda v: 0, "signs other than"),
        ("sign", lambda v: 3, "signs other than"),
        ("sign", lambda v: -128, "signs other than"),
        ("smoothing", lambda v: 0.0, "zero or not finite"),
        ("smoothing", lambda v: float("nan"), "zero or not finite"),
        ("smoothing", lambda v: float("inf"), "zero or not finite"),
        ("smoothing", lambda v: 1e-45, "zero or not finite"),
        ("permutation", lambda v: (v + 1) % 192, "each channel once"),
        ("permutation", lambda v: -1, "each channel once"),
        ("permutation", lambda v: 192, "each channel once"),
        ("rotation1", lambda v: v + 0.01, "rotation1 is not orthonormal"),
        ("rotation2", lambda v: float("nan"), "rotation2 is not orthonormal"),
        ("rotation2", lambda v: float("inf"), "rotation2 is not orthonormal"),
    ],
)
def test_damaged_values_are_named(name: str, change, message: str):
    assert message in transform.check_values(damaged(name, change))
