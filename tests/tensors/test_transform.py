"""Transforms leave a linear's output alone, whatever they are made of, and say what is wrong with damaged ones."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch

from quantdit.formats import Field
from quantdit.tensors import transform
from quantdit.tensors.hadamard import block_size, hadamard, random_sign, spread, step_sign
from quantdit.tensors.transform import Transform

WIDTHS = (100, 384)  # 4 x 25, 128 x 3


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthogonal(count: int, block: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(random(count, block, block, seed=seed, dtype=torch.float64)).Q.float()


def steps_of(width: int, steps: int = 3) -> dict[str, torch.Tensor]:
    """What an outlier rotation of random greedy steps is stored as; the last block of R1 has one step less."""
    block, generator = block_size(width), torch.Generator().manual_seed(8)
    chosen = torch.randint(0, block, (2, steps, width // block), generator=generator, dtype=torch.uint8)
    chosen[0, -1, -1] = transform.NO_STEP
    permutation = torch.randperm(width, generator=generator).int()
    return {"steps1": chosen[0], "permutation": permutation, "steps2": chosen[1]}


def made(kind: str, width: int, smoothed: bool) -> Transform:
    block = block_size(width)
    t = Transform()
    if kind == "hadamard":
        t = Transform(premultiplier=random_sign(width, 3), block=block)
    if kind == "outlier":
        permutation = torch.randperm(width, generator=torch.Generator().manual_seed(5)).int()
        blocks = [orthogonal(width // block, block, seed) for seed in (1, 2)]
        t = Transform(rotation1=blocks[0], permutation=permutation, rotation2=blocks[1])
    if kind == "steps":
        t = transform.from_tensors("outlier", block, steps_of(width))
    return transform.smooth(t, random(width, seed=4).exp() if smoothed else None)


def stepped(t: Transform, width: int) -> None:
    """Compare rotations with the product of their steps, each `E H diag(sign) E` by its definition."""
    b = t.rotation_block
    for first, steps, rotation in ((0, t.steps1, t.rotation1), (transform.MAX_STEPS, t.steps2, t.rotation2)):
        for block in range(width // b):
            expected = torch.eye(b, dtype=torch.float64)
            for number, channel in enumerate(steps[:, block].tolist()):
                if channel != transform.NO_STEP:
                    exchanged = torch.eye(b, dtype=torch.float64)
                    exchanged[[0, channel]] = exchanged[[channel, 0]]
                    signs = torch.diag(step_sign(b, first + number).double())
                    expected = expected @ exchanged @ hadamard(b, torch.float64) @ signs @ exchanged
            torch.testing.assert_close(rotation[block].double(), expected, rtol=0, atol=1e-7)


def explicit(t: Transform, width: int) -> torch.Tensor:
    """T `[k, k]` float64, from its definition."""
    matrix = torch.eye(width, dtype=torch.float64)
    if t.premultiplier is not None:
        matrix = torch.diag(t.premultiplier.double())
    if t.kind == "hadamard":
        matrix = matrix @ torch.kron(torch.eye(width // t.block, dtype=torch.float64), hadamard(t.block, torch.float64))
    if t.kind == "outlier":
        if t.steps:
            stepped(t, width)
        matrix = matrix @ torch.block_diag(*t.rotation1.double())
        matrix = matrix[:, t.permutation.long()] @ torch.block_diag(*t.rotation2.double())
    return matrix


CASES = pytest.mark.parametrize(("kind", "smoothed"), [(k, s) for k in (*transform.KINDS, "steps") for s in (False, True)])


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


def test_a_step_spreads_its_channel_evenly():
    for b in (2, 16, 128):
        channel = torch.arange(b)
        made = spread(torch.eye(b, dtype=torch.float64).repeat(b, 1, 1), channel, 7)
        assert torch.equal(made[channel, :, channel].abs(), torch.full((b, b), b**-0.5, dtype=torch.float64))


def test_what_steps_mean_does_not_change():
    """It is part of the format: signs and rotations of a few steps, taken down when checkpoints of spec 4 came up."""
    signs = torch.stack([step_sign(128, number) for number in range(2 * transform.MAX_STEPS)])
    assert hashlib.sha256(signs.numpy().tobytes()).hexdigest()[:16] == "63166b4aa4ce35d9"
    t = transform.from_tensors("outlier", 128, steps_of(384))
    for name, digest in (("rotation1", "f8df719f145fc254"), ("rotation2", "9cc3acd73f721667")):
        assert hashlib.sha256(getattr(t, name).numpy().tobytes()).hexdigest()[:16] == digest


def test_steps_and_rotations_go_together():
    t = made("steps", 192, False)
    for lost in ({"steps1": None}, {"rotation1": None, "permutation": None, "rotation2": None}):
        with pytest.raises(ValueError, match="together"):
            replace(t, **lost)


@pytest.mark.parametrize("channel", [64, 100, 254])
def test_steps_beyond_a_block_are_named(channel: int):
    named = steps_of(192)
    assert transform.check_steps(64, named) is None
    named["steps2"][1, 2] = channel
    assert "steps2 names channels beyond" in transform.check_steps(64, named)


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
    assert (t.kind, t.steps) == ("outlier", 3) if kind == "steps" else (kind, 0)
    assert t.smoothed == smoothed
    assert {n: Field(v.dtype, tuple(v.shape)) for n, v in named.items()} == transform.fields(
        t.kind, width, t.rotation_block, smoothed, t.steps
    )
    again = transform.from_tensors(t.kind, t.rotation_block, named)
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
        (("outlier", 96, 32, False, 33), "cannot have 33 steps"),
        (("outlier", 96, 32, False, -1), "cannot have -1 steps"),
        (("outlier", 512, 256, False, 3), "blocks of 256 cannot have 3 steps"),
        (("hadamard", 96, 32, False, 3), "cannot have 3 steps"),
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
