"""quantize_tokens_kernel against kernels/ops.py: codes to the bit where no sum of another order precedes them."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from quantdit.kernels import ops
from quantdit.kernels.triton_ops import quantize_tokens as module
from quantdit.tensors.hadamard import random_sign

# How the rotation is loaded depends on the GPU, its result does not.
quantize_tokens = partial(module.quantize_tokens, capability=90)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def tokens(m: int, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random tokens of very different sizes, one of them zero."""
    generator = torch.Generator().manual_seed(m * k)
    x = torch.randn(m, k, generator=generator) * torch.logspace(-2, 2, m)[:, None]
    x[m // 2] = 0 if m > 1 else x[m // 2]
    return x.to(dtype)


# Each shape with each kind of codes, in each dtype in turn.
SHAPES, CODES = ((1, 44), (63, 192), (500, 48), (5, 1152)), ((4, False), (8, False), (4, True), (8, True))
EXACT = [(*shape, *codes, FLOATS[(i + j) % 3]) for i, shape in enumerate(SHAPES) for j, codes in enumerate(CODES)]


@pytest.mark.parametrize(("m", "k", "bits", "affine", "dtype"), EXACT)
def test_codes_and_scales_are_the_reference(m: int, k: int, bits: int, affine: bool, dtype: torch.dtype):
    x = tokens(m, k, dtype)
    codes, scale = quantize_tokens(x, None, 1, "affine" if affine else "int", bits)
    expected, expected_scale = ops.quantize_tokens_reference(x, bits, affine=affine)
    assert torch.equal(codes, expected) and codes.dtype == torch.int8
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("bits", "group", "m", "k"), [(4, 32, 63, 96), (6, 64, 3, 320), (3, 128, 9, 256), (4, 128, 9, 256)])
def test_groups(group: int, m: int, k: int, bits: int, affine: bool):
    x = tokens(m, k) + 0.3
    codes, scale = quantize_tokens(x, None, 1, "affine" if affine else "int", bits, group)
    expected, expected_scale = ops.quantize_tokens_reference(x, bits, group, affine)
    assert torch.equal(codes, expected)
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("group", [0, 32])
def test_static_scales_clip(group: int):
    x, static = tokens(33, 96), torch.tensor([0.03])
    codes, scale = quantize_tokens(x, None, 1, "int", 4, group, static)
    expected, expected_scale = ops.quantize_tokens_reference(x, 4, group, False, static)
    assert torch.equal(codes, expected) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize("dtype", FLOATS)
def test_fp8(dtype: torch.dtype):
    x = tokens(33, 192, dtype)
    codes, scale = quantize_tokens(x, None, 1, "fp8")
    expected, expected_scale = ops.quantize_tokens_fp8_reference(x)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8)) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("block", "k"), [(4, 44), (16, 144), (64, 192)])
def test_rotation_of_integers_is_exact(block: int, k: int, dtype: torch.dtype):
    """Small integers times +-1 and an even power of two: every sum is exact, in whatever order."""
    x = torch.randint(-3, 4, (17, k), generator=torch.Generator().manual_seed(k)).to(dtype)
    signs = random_sign(k, 0)
    rotated, none = quantize_tokens(x, signs, block, "none")
    reference = ops.rotate_reference(x, signs, block)
    assert torch.equal(rotated, reference) and rotated.dtype == reference.dtype and not len(none)
    expected, expected_scale, _ = ops.rotate_quantize_reference(x, signs, block, "int", 8)
    for capability in (80, 90):
        codes, scale = module.quantize_tokens(x, signs, block, "int", capability=capability)
        assert torch.equal(codes, expected) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "k"), [(3, 128), (20, 640)])
def test_rotation_is_as_exact_as_the_float64_product(m: int, k: int, dtype: torch.dtype, smoothed: bool):
    """Half an ulp of dtype, the 128 sums of float32, and for a smoothed bfloat16 what two parts of 8 bits leave out, 2^-17."""
    x = tokens(m, k, dtype)
    premultiplier = random_sign(k, 0)
    if smoothed:
        premultiplier = premultiplier * (torch.rand(k, generator=torch.Generator().manual_seed(1)) + 0.3)
    rotated, _ = quantize_tokens(x, premultiplier, 128, "none")
    exact = ops.rotate_reference(x.double(), premultiplier.double(), 128)
    magnitude = (x.double() * premultiplier.double()).abs().unflatten(1, (-1, 128)).sum(dim=2) / 128**0.5
    error = (rotated.double() - exact).abs()
    left_out = 2.0**-17 if smoothed and dtype == torch.bfloat16 else 0.0
    sums = (130 * 2.0**-24 + left_out) * magnitude.repeat_interleave(128, dim=1)
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + (1 + torch.finfo(dtype).eps) * sums + 2.0**-25
    assert bool((error <= bound).all())


@pytest.mark.parametrize("format", ["int", "affine", "fp8"])
def test_transform_and_codes_in_one_pass(format: str):
    """One step of the scale, at most, and in few places: a sum of another order turns a tie in bfloat16."""
    m, k = 24, 384
    x, signs = tokens(m, k, torch.bfloat16) + 0.5, random_sign(k, 0)
    codes, scale = quantize_tokens(x, signs, 128, format, 8)
    expected, expected_scale, _ = ops.rotate_quantize_reference(x, signs, 128, format, 8)
    assert torch.allclose(scale, expected_scale, rtol=2**-8, atol=0)
    different = codes.float() != expected.float()
    assert float(different.float().mean()) < 0.01
    step = 1.0 if format != "fp8" else expected.float().abs() / 8 + 2.0**-9
    assert bool(((codes.float() - expected.float()).abs() <= step).all())


@pytest.mark.parametrize("format", ["none", "int", "affine", "fp8"])
def test_float16_tokens_may_leave_their_range_on_the_way(format: str):
    """Token 0 is added up in one place, 20000 sqrt(128), token 1 stretched by its smoothing; neither is infinite."""
    signs = random_sign(128, 0)
    x = torch.stack([signs * 20000.0, torch.full((128,), 60000.0)]).half()
    premultiplier = signs * torch.tensor([1.0, 3.0]).repeat_interleave(64)
    for p in (signs, premultiplier):
        y, scale = quantize_tokens(x, p, 128, format)
        if format == "none":
            assert bool(torch.isfinite(y).all()) and torch.allclose(y, ops.rotate_reference(x, p, 128), rtol=1e-4, atol=1.0)
        else:
            expected, expected_scale, _ = ops.rotate_quantize_reference(x, p, 128, format, 8)
            assert torch.allclose(scale, expected_scale, rtol=1e-4) and bool(torch.isfinite(scale).all())
            assert float((y.float() != expected.float()).float().mean()) < 0.02


KINDS = [("int", 8, 0), ("int", 4, 64), ("affine", 8, 0), ("affine", 4, 32), ("fp8", 8, 0)]


@pytest.mark.parametrize(("m", "k", "block", "rank"), [(1, 48, 16, 1), (63, 192, 64, 32), (37, 320, 16, 40)])
@pytest.mark.parametrize(("format", "bits", "group"), KINDS)
def test_low_rank_hidden_and_codes_of_rotated_integers(format: str, bits: int, group: int, m: int, k: int, block: int, rank: int):
    """The rotation of small integers is exact, so codes and scales are to the bit; hidden is one rounding of float32 sums."""
    group, dtype = group if k % max(group, 1) == 0 else 0, torch.bfloat16
    generator = torch.Generator().manual_seed(k)
    x = torch.randint(-3, 4, (m, k), generator=generator).to(dtype)
    down = torch.randn(rank, k, generator=generator).bfloat16()
    signs = random_sign(k, 0)
    codes, scale, hidden = module.quantize_project(x, signs, block, format, bits, group, None, down)
    expected, expected_scale, _ = ops.rotate_quantize_reference(x, signs, block, format, bits, group)
    assert codes.dtype == expected.dtype and torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale, expected_scale)
    rotated, narrow = ops.rotate_reference(x, signs, block).double(), down.to(dtype).double()
    exact, magnitude = rotated @ narrow.T, rotated.abs() @ narrow.abs().T
    assert hidden.dtype == dtype and hidden.shape == (m, rank)
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 2 * (k + 2) * 2.0**-24 * magnitude + 2.0**-25
    assert bool(((hidden.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("static", [None, torch.tensor([0.5])])
def test_low_rank_hidden_of_smoothed_tokens(static: torch.Tensor | None):
    """What the other kernel makes of the same tokens: two parts of each are rotated, in the same order."""
    dtype = torch.bfloat16
    x, down = tokens(20, 320, dtype), torch.randn(64, 320, generator=torch.Generator().manual_seed(2)).bfloat16()
    premultiplier = random_sign(320, 0) * (torch.rand(320, generator=torch.Generator().manual_seed(1)) + 0.3)
    codes, scale, hidden = module.quantize_project(x, premultiplier, 64, "int", 8, 0, static, down)
    expected, expected_scale = quantize_tokens(x, premultiplier, 64, "int", 8, 0, static)
    assert float((codes != expected).float().mean()) < 0.01 and int((codes.int() - expected.int()).abs().max()) <= 1
    assert torch.allclose(scale, expected_scale, rtol=2**-8, atol=0)
    reference = ops.rotate_quantize_reference(x, premultiplier, 64, "int", 8, 0, static, down)[2].float()
    assert float((hidden.float() - reference).norm() / reference.norm()) < 2 * torch.finfo(dtype).eps


def test_no_tokens_and_wide_tokens():
    codes, scale = quantize_tokens(torch.randn(0, 96), None, 1, "int")
    assert (codes.shape, scale.shape) == ((0, 96), (0,))
    down = torch.randn(3, 96)
    shapes = [
        t.shape for t in module.quantize_project(torch.randn(0, 96).bfloat16(), random_sign(96, 0), 32, "int", 8, 0, None, down)
    ]
    assert shapes == [(0, 96), (0,), (0, 3)]
    x = tokens(3, 8960)
    assert torch.equal(quantize_tokens(x, None, 1, "int")[0], ops.quantize_tokens_reference(x, 8)[0])
    assert math.isfinite(float(quantize_tokens(x, random_sign(8960, 0), 128, "int")[1].sum()))
