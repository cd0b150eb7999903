"""Every op of torch.ops.quantdit: opcheck, agreement with a dense product, the properties of token quantization, refusals."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from quantdit.formats import FORMATS, QSpec
from quantdit.kernels import ops
from quantdit.kernels.ops import Epilogue
from quantdit.kernels.schema import flat
from quantdit.tensors import transform
from quantdit.tensors.hadamard import random_sign
from quantdit.tensors.qtensor import QTensor, spec_fields
from quantdit.tensors.transform import Transform
from some_formats import EACH_KIND, SOME

QUANTDIT = torch.ops.quantdit
F32 = torch.float32
U32 = 2.0**-24  # unit roundoff of float32
OUTPUT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # unit roundoff of each output dtype


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_int8(*shape: int, seed: int = 0, low: int = -127) -> torch.Tensor:
    return torch.randint(low, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def stored_weight(name: str, rows: int, width: int, group: int, codebook_rows: int = 1) -> QTensor:
    """A weight of random codes and values that keep inside int8."""
    f = FORMATS[name]
    spec = QSpec(name, rows, width, group, codebook_rows)
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(f.code_count, (rows, width // f.dim), generator=generator).to(f.code_dtype)
    if name == "fp8_e4m3":
        codes[codes % 128 == 127] = 0
    tensors = {"data": f.pack(f, codes), "scale": random(rows).abs()}
    for key, field in spec_fields(spec).items():
        if key not in tensors:
            low, high = {
                "multiplier": (0, 127 // f.code_count + 1),
                "offset": (-128, 1),
                "codebook": (0 if f.sign_split else -128, 128),
            }[key]
            tensors[key] = torch.randint(low, high, field.shape, generator=generator).to(field.dtype)
    return QTensor(spec, **tensors)


def after(dtype: torch.dtype, *rest: torch.Tensor | None) -> list:
    return flat(Epilogue(dtype, *rest))


def opcheck_samples() -> dict[str, list[tuple]]:
    """Arguments of every op: each dtype and optional argument at least once, strides that are not the contiguous ones."""
    codes, weight, scale, token_scale = random_int8(5, 24), random_int8(7, 24, seed=1), random(7).abs(), random(5).abs()
    fp8 = random(7, 24, seed=2).to(torch.float8_e4m3fn)
    packed = flat(stored_weight("int4", 7, 24, 8))
    low = (random(5, 3), random(7, 3).bfloat16())
    branch = (random(7, 3).bfloat16(), random(3, 24).bfloat16())
    blocks = torch.linalg.qr(random(3, 8, 8)).Q.contiguous()
    outlier = flat(Transform(None, 1, blocks, torch.arange(24, dtype=torch.int32).flip(0), blocks))
    rotated = flat(Transform(random_sign(24, 0), 8))
    q8, k8, v8 = random_int8(2, 3, 5, 8), random_int8(2, 3, 7, 8, seed=1), random_int8(2, 3, 8, 7, seed=2)
    scales = tuple(random(2, 3, n).abs() / 50 for n in (5, 7, 8))
    q, k, v = (random(2, 3, n, 8, seed=n) for n in (5, 7, 7))
    return {
        "attention8": [
            (q8, k8, v8, *scales, None, False, torch.float32),
            (q8, k8, v8.to(torch.float8_e4m3fn), *scales, random(5, 7), False, torch.bfloat16),
            (q8, k8, v8.half(), *scales, None, True, torch.float16),
        ],
        "straight_through_attention": [
            (random(2, 3, 5, 8), q, k.requires_grad_(), v, None, False, 0.3),
            (random(2, 5, 3, 8).transpose(1, 2), q, k.detach(), v, random(5, 7), False, 0.3),
        ],
        "rotate": [
            (random(3, 24), random_sign(24, 0), 8),
            (random(4, 2, 24).transpose(0, 1).half(), random_sign(24, 0), 4),
            (random(3, 24).bfloat16(), random_sign(24, 0) * (random(24).abs() + 0.1), 8),
        ],
        "quantize_tokens": [
            (random(3, 24), 8),
            (random(3, 24).bfloat16(), 4),
            (random(24, 3).T, 8),
            (random(3, 24), 4, 8),
            (random(3, 24).half(), 6, 12, True),
            (random(24, 3).T, 4, 0, True),
            (random(3, 24), 8, 0, False, torch.tensor([0.02])),
            (random(3, 24), 4, 8, False, torch.tensor([0.02])),
        ],
        "quantize_tokens_fp8": [(random(3, 24),), (random(3, 24).bfloat16(),), (random(24, 3).half().T,)],
        "rotate_quantize": [
            (random(3, 24), random_sign(24, 0), 8, "int", 8),
            (random(3, 24).bfloat16(), random_sign(24, 0), 4, "affine", 4, 8),
            (random(24, 3).half().T, random_sign(24, 0), 4, "fp8", 8),
            (random(3, 24), random_sign(24, 0), 8, "int", 8, 0, torch.tensor([0.02])),
            (random(3, 24).bfloat16(), random_sign(24, 0), 8, "int", 8, 0, None, random(5, 24)),
        ],
        "decode8": [
            *(tuple(flat(stored_weight(name, 5, 48, 16))) for name in EACH_KIND),
            tuple(flat(stored_weight("table4", 5, 48, 48, codebook_rows=5))),
        ],
        "gemm_w8a8": [
            (codes, weight, scale, *after(torch.float32, token_scale, random(7))),
            (codes, weight, scale, *after(torch.bfloat16, token_scale)),
            (codes, weight, scale, *after(torch.float32, token_scale, None, *low)),
            (codes, fp8, scale, *after(torch.float16, token_scale, random(7).half())),
            (random(5, 24, seed=4).to(torch.float8_e4m3fn), fp8, scale, *after(torch.float32, token_scale, random(7))),
            (random_int8(24, 5).T, random_int8(24, 7).T, scale, *after(torch.float32, token_scale)),
        ],
        "gemm_packed_a8": [
            (codes, *packed, *after(torch.float32, token_scale, random(7))),
            (codes, *packed, *after(torch.bfloat16, token_scale, None, *low)),
        ],
        "gemm_packed_a16": [
            (random(5, 24), *packed, *after(torch.float32, None, random(7))),
            (random(24, 5).half().T, *packed, *after(torch.float16, None, None, *low)),
        ],
        "gemm_w8a16": [
            (random(5, 24), weight, scale, random(7)),
            (random(5, 24).half(), weight, scale, None),
            (random(24, 5).T, fp8, scale, random(7)),
        ],
        "straight_through": [
            (random(5, 7), trained(5, 24), None, *packed, None, None, *rotated),
            (random(5, 7).bfloat16(), trained(24, 5).T, random(7), *packed, *branch, *outlier),
        ],
        "input_gradient": [
            (random(5, 7).half(), *packed, None, None, *rotated),
            (random(7, 5).T, *packed, *branch, *outlier),
        ],
    }


def trained(*shape: int) -> torch.Tensor:
    return random(*shape).requires_grad_()


@pytest.mark.parametrize(("op", "sample"), [(op, i) for op, samples in opcheck_samples().items() for i in range(len(samples))])
def test_an_op_of_tensors_with_and_without_memory_raises(op: str, sample: int):
    """Its fake kernel would return memory that nobody wrote to."""
    arguments, run = opcheck_samples()[op][sample], getattr(QUANTDIT, op)
    tensors = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]
    away = [a.detach().to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    for i in tensors if len(tensors) > 1 else ():
        mixed = (*arguments[:i], away[i], *arguments[i + 1 :])
        with pytest.raises(RuntimeError, match=f"quantdit::{op}: .* on the meta device, .* in memory"), torch.no_grad():
            run(*mixed)
    found = run(*away)
    assert all(t.device.type == "meta" for t in (found if isinstance(found, tuple) else (found,)))


def test_every_op_has_an_opcheck():
    defined = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("quantdit::")}
    assert defined == set(opcheck_samples())


@pytest.mark.parametrize(("op", "sample"), [(op, i) for op, samples in opcheck_samples().items() for i in range(len(samples))])
def test_opcheck(op: str, sample: int):
    """Schema, fake and real implementation agree, aliasing and strides included; tracing gives the same values."""
    arguments = opcheck_samples()[op][sample]
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if any(isinstance(a, torch.Tensor) and a.dtype == torch.float8_e4m3fn for a in arguments):
        tests.remove("test_schema")  # it compares tensors in a way that torch lacks for float8; the next test stands in
    torch.library.opcheck(getattr(QUANTDIT, op).default, arguments, test_utils=tests)


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3"])
def test_decode8_neither_returns_nor_changes_what_is_stored(name: str):
    """The two formats whose stored data already is I."""
    weight = stored_weight(name, 5, 48, 16)
    data = weight.data
    before = data.view(torch.uint8).clone()
    decoded = QUANTDIT.decode8(*flat(weight))
    assert torch.equal(decoded.view(torch.uint8), before)
    decoded.view(torch.uint8).zero_()
    assert torch.equal(data.view(torch.uint8), before)


def test_fused_ops_are_their_parts():
    """Rotation and codes one by one; products of decoded weights, and what follows them."""
    x, signs = random(6, 48), random_sign(48, 0)
    codes, scale = QUANTDIT.quantize_tokens(QUANTDIT.rotate(x, signs, 16), 8)
    fused = QUANTDIT.rotate_quantize(x, signs, 16, "int", 8)
    assert torch.equal(fused[0], codes) and torch.equal(fused[1], scale) and fused[2].shape == (6, 0)
    down = random(3, 48).bfloat16()
    for y in (x, x.half()):
        codes16, scale16, hidden = QUANTDIT.rotate_quantize(y, signs, 16, "int", 8, 0, None, down)
        rotated = QUANTDIT.rotate(y, signs, 16)
        assert torch.equal(hidden, torch.nn.functional.linear(rotated, down.to(rotated.dtype)))
        assert rotated.dtype == hidden.dtype == torch.float32
        assert all(map(torch.equal, (codes16, scale16), QUANTDIT.quantize_tokens(rotated, 8)))

    stored = stored_weight("int4", 7, 48, 16)
    decoded = QUANTDIT.decode8(*flat(stored))
    low, bias = (random(6, 3), random(7, 3, seed=1)), random(7)
    y = QUANTDIT.gemm_w8a8(codes, decoded, stored.scale, *after(torch.float32, scale, bias)) + low[0] @ low[1].T
    branched = after(torch.float32, scale, bias, *low)
    assert torch.allclose(QUANTDIT.gemm_w8a8(codes, decoded, stored.scale, *branched), y, atol=1e-5)
    assert torch.allclose(QUANTDIT.gemm_packed_a8(codes, *flat(stored), *branched), y, atol=1e-5)
    z = QUANTDIT.gemm_w8a16(x, decoded, stored.scale, bias)
    packed = QUANTDIT.gemm_packed_a16(x, *flat(stored), *after(torch.float32, None, bias))
    assert torch.allclose(packed, z, atol=1e-4 * float(z.abs().max()))


def test_a_signature_is_that_of_the_definition():
    """Parts are their fields in the schema, in their order; an op is called with `flat` of them."""
    schema = str(QUANTDIT.gemm_packed_a16.default._schema)
    assert schema == (
        "quantdit::gemm_packed_a16(Tensor x, str format, int out_features, int in_features, int group_size, int codebook_rows,"
        " Tensor data, Tensor scale, Tensor? multiplier, Tensor? offset, Tensor? codebook, ScalarType dtype, Tensor? token_scale,"
        " Tensor? bias, Tensor? low_rank_hidden, Tensor? up) -> Tensor"
    )
    assert str(QUANTDIT.quantize_tokens.default._schema) == (
        "quantdit::quantize_tokens(Tensor x, int bits, int group_size=0, bool affine=False, Tensor? static_scale=None)"
        " -> (Tensor, Tensor)"
    )


REFUSED = {
    "rotate, one sign for all": ("rotate", (random(3, 8), torch.ones(1, dtype=torch.int8), 4)),
    "rotate, block that does not divide": ("rotate", (random(3, 12), random_sign(12, 0), 8)),
    "quantize_tokens, 1 bit": ("quantize_tokens", (random(3, 8), 1)),
    "quantize_tokens, 9 bits": ("quantize_tokens", (random(3, 8), 9)),
    "quantize_tokens, 3-D": ("quantize_tokens", (random(3, 8, 4), 8)),
    "quantize_tokens, group that does not divide": ("quantize_tokens", (random(3, 44), 4, 32)),
    "quantize_tokens, group above the width": ("quantize_tokens", (random(3, 8), 4, 32)),
    "quantize_tokens, negative group": ("quantize_tokens", (random(3, 8), 4, -4)),
    "quantize_tokens, static and affine": ("quantize_tokens", (random(3, 8), 4, 0, True, torch.ones(1))),
    "quantize_tokens, a static scale per token": ("quantize_tokens", (random(3, 8), 8, 0, False, torch.ones(3))),
    "rotate_quantize, down of another width": (
        "rotate_quantize",
        (random(3, 8), random_sign(8, 0), 8, "int", 8, 0, None, random(2, 4)),
    ),
    "quantize_tokens_fp8, 3-D": ("quantize_tokens_fp8", (random(3, 8, 4),)),
    "gemm_w8a8, float codes": ("gemm_w8a8", (random(5, 8), random_int8(7, 8), torch.ones(7), *after(F32, torch.ones(5)))),
    "gemm_w8a8, uint8 codes": (
        "gemm_w8a8",
        (random_int8(5, 8).view(torch.uint8), random_int8(7, 8) // 2, torch.ones(7), *after(F32, torch.ones(5))),
    ),
    "gemm_w8a8, one token_scale for all": (
        "gemm_w8a8",
        (random_int8(5, 8), random_int8(7, 8), torch.ones(7), *after(F32, torch.ones(1))),
    ),
    "gemm_w8a8, no token_scale": ("gemm_w8a8", (random_int8(5, 8), random_int8(7, 8), torch.ones(7), *after(F32))),
    "gemm_w8a8, one scale for all": (
        "gemm_w8a8",
        (random_int8(5, 8), random_int8(7, 8), torch.ones(1), *after(F32, torch.ones(5))),
    ),
    "gemm_w8a8, another k": ("gemm_w8a8", (random_int8(5, 8), random_int8(7, 12), torch.ones(7), *after(F32, torch.ones(5)))),
    "gemm_w8a8, up of another rank": (
        "gemm_w8a8",
        (random_int8(5, 8), random_int8(7, 8), torch.ones(7), *after(F32, torch.ones(5), None, random(5, 3), random(7, 2))),
    ),
    "gemm_packed_a8, another k": (
        "gemm_packed_a8",
        (random_int8(5, 16), *flat(stored_weight("int8", 7, 8, 8)), *after(F32, torch.ones(5))),
    ),
    "gemm_packed_a16, up alone": (
        "gemm_packed_a16",
        (random(5, 8), *flat(stored_weight("int8", 7, 8, 8)), *after(F32, None, None, None, random(7, 2))),
    ),
    "gemm_w8a16, one scale for all": ("gemm_w8a16", (random(5, 8), random_int8(7, 8), torch.ones(1), None)),
    "gemm_w8a16, another k": ("gemm_w8a16", (random(5, 8), random_int8(7, 12), torch.ones(7), None)),
    "gemm_w8a16, 3-D": ("gemm_w8a16", (random(2, 5, 8), random_int8(7, 8), torch.ones(7), None)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_fake_refuses(case: str):
    op, arguments = REFUSED[case]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        with pytest.raises(RuntimeError, match=op):
            getattr(QUANTDIT, op)(*fakes)


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_fake_refuses_the_op_refuses(case: str):
    """Otherwise eager code computes something silently and fails only once it is compiled."""
    op, arguments = REFUSED[case]
    with pytest.raises((RuntimeError, ValueError, KeyError)):
        getattr(QUANTDIT, op)(*arguments)


@pytest.mark.parametrize(("format", "message"), [("int5", "unknown weight format 'int5'"), ("table4", "table4 stores")])
def test_a_weight_that_is_none_is_refused(format: str, message: str):
    stored = flat(stored_weight("int4", 3, 16, 16))
    with pytest.raises(ValueError, match=message):
        QUANTDIT.decode8(format, *stored[1:])


def test_rotate_is_that_of_transform():
    x, sign = random(2, 3, 48), random_sign(48, 1)
    assert torch.equal(QUANTDIT.rotate(x, sign, 16), transform.apply(transform.Transform(sign, 16), x))


def test_rotate_takes_smoothing_in_the_same_tensor():
    x, premultiplier = random(2, 3, 48), random_sign(48, 1) / (random(48).abs() + 0.1)
    signs = transform.Transform(premultiplier.sign().to(torch.int8), 16)
    expected = transform.apply(signs, x * premultiplier.abs())
    # Two multiplications by numbers of which one is +-1, in any order, round the same.
    assert torch.equal(QUANTDIT.rotate(x, premultiplier, 16), expected)
    assert torch.equal(transform.apply(transform.Transform(premultiplier, 16), x), expected)


@pytest.mark.parametrize("name", SOME)
def test_decode8_is_that_of_the_format(name: str):
    f = FORMATS[name]
    weight = stored_weight(name, 5, 96, 32)
    expected = f.decode8(f, weight.spec, weight.tensors())
    decoded = QUANTDIT.decode8(*flat(weight))
    assert decoded.dtype == expected.dtype
    assert torch.equal(decoded.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantized_tokens_are_within_half_a_step(bits: int, dtype: torch.dtype):
    """Rounding x / scale is off by 1/2, the division by 2^(bits - 1) u before that, and nothing else is rounded."""
    top = 2 ** (bits - 1) - 1
    x = (random(64, 96) * torch.logspace(-3, 3, 64)[:, None]).to(dtype)
    codes, scale = QUANTDIT.quantize_tokens(x, bits)
    assert (codes.dtype, codes.shape) == (torch.int8, x.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, (64,))
    steps = (x.double() / scale.double()[:, None] - codes.double()).abs()
    assert float(steps.max()) <= 0.5 + (top + 1) * U32
    assert torch.equal(codes.abs().amax(dim=1), torch.full((64,), top, dtype=torch.int8))  # the whole range is used
    assert bool((scale * top - x.float().abs().amax(dim=1)).abs().le(2 * U32 * scale * top).all())


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_quantize_tokens_rounds_ties_to_even(bits: int):
    """The largest entry is the largest code, so the scale is 1 exactly and the codes are the rounded entries."""
    top = 2 ** (bits - 1) - 1
    halves = torch.arange(-2 * top, 2 * top + 1) / 2
    codes, scale = QUANTDIT.quantize_tokens(halves[None].float(), bits)
    assert scale.tolist() == [1.0]
    assert codes[0].tolist() == [round(value) for value in halves.tolist()]  # Python's round is to even too


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_quantize_tokens_is_odd_and_scales_with_powers_of_two(bits: int):
    x = random(16, 40)
    codes, scale = QUANTDIT.quantize_tokens(x, bits)
    negated, same = QUANTDIT.quantize_tokens(-x, bits)
    assert torch.equal(negated, -codes)
    assert torch.equal(same, scale)
    again, larger = QUANTDIT.quantize_tokens(x * 64, bits)
    assert torch.equal(again, codes)
    assert torch.equal(larger, scale * 64)


def test_a_token_of_zeros_has_scale_zero_and_leaves_its_neighbours_alone():
    x = random(3, 16)
    x[1] = 0
    codes, scale = QUANTDIT.quantize_tokens(x, 8)
    assert scale[1] == 0
    assert torch.equal(codes[1], torch.zeros(16, dtype=torch.int8))
    alone, alone_scale = QUANTDIT.quantize_tokens(x[::2], 8)
    assert torch.equal(codes[::2], alone)
    assert torch.equal(scale[::2], alone_scale)


def test_an_outlier_zeroes_only_its_own_token():
    x = torch.ones(2, 8)
    x[0, 3] = 1e6
    codes, scale = QUANTDIT.quantize_tokens(x, 8)
    assert codes.tolist() == [[0, 0, 0, 127, 0, 0, 0, 0], [127] * 8]
    assert scale.tolist() == pytest.approx([1e6 / 127, 1 / 127], rel=2 * U32)


KINDS = [(bits, group, affine) for bits in (4, 6) for group in (0, 32, 64, 128) for affine in (False, True)] + [(8, 0, True)]


def levels_of(codes: torch.Tensor, group_size: int) -> torch.Tensor:
    """How many different `I` each token's groups have, `[m, groups]`."""
    grouped = codes.unflatten(1, (-1, group_size or codes.shape[1])).sort(dim=2).values
    return (grouped.diff(dim=2) != 0).sum(dim=2) + 1


def steps(x: torch.Tensor, bits: int, group_size: int, affine: bool) -> torch.Tensor:
    """The step of each token's groups in x's unit `[m, groups]` float64, by the definition.

    Groups divide the int8 grid of the token by an integer: their own range over its codes, rounded up to whole grid steps.
    """
    x = x.double()
    grouped = x.unflatten(1, (-1, group_size or x.shape[1]))
    high, low = grouped.amax(dim=2), grouped.amin(dim=2)
    own = (high - low) / (2**bits - 1) if affine else torch.maximum(high, -low) / (2 ** (bits - 1) - 1)
    grid = x.abs().amax(dim=1, keepdim=True) / 127
    if group_size:
        return grid * torch.clamp((own / grid * (1 - 1e-6)).ceil(), min=1)
    return torch.maximum(own, grid) if affine else own


def group_error(error: torch.Tensor, group: int) -> torch.Tensor:
    """Return `|error|`, of groups its RMS: a group may clip its ends where that makes its squared error smaller."""
    if not group:
        return error.abs()
    return error.unflatten(1, (-1, group)).square().mean(dim=2).sqrt().repeat_interleave(group, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group", "affine"), KINDS)
def test_codes_are_within_half_a_step_of_their_group(bits: int, group: int, affine: bool, dtype: torch.dtype):
    """Bounds from the step: half of it, half of one more grid step where an offset or an end is rounded to an integer."""
    m = 48
    x = random(m, 256) * torch.logspace(-3, 3, m)[:, None]
    x[m // 3 :] += torch.logspace(-3, 3, m)[m // 3 :, None]  # off centre
    x[2 * m // 3 :, ::64] *= 10
    x = x.to(dtype)
    codes, scale = QUANTDIT.quantize_tokens(x, bits, group, affine)
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (torch.int8, x.shape, torch.float32, (m,))
    assert int(levels_of(codes, group).max()) <= (2**bits if affine else 2**bits - 1)
    step = steps(x, bits, group, affine).repeat_interleave(group or 256, dim=1)
    grid = x.double().abs().amax(dim=1, keepdim=True) / 127
    allowed = step / 2 + (grid / 2 if group or affine else 0) + 300 * U32 * grid
    assert bool((group_error(x.double() - scale.double()[:, None] * codes.double(), group) <= allowed).all())
    if group:
        assert torch.equal(scale, x.float().abs().amax(dim=1) / 127)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("group", "affine"), [(0, True), (8, False), (8, True)])
def test_no_code_leaves_int8(bits: int, group: int, affine: bool):
    """Tokens over the whole range, one-sided and shifted ones: nothing wraps around, so signs and order stay."""
    ramp = torch.linspace(-1, 1, 64)
    x = torch.stack([ramp, ramp.abs(), -ramp.abs(), ramp + 1, ramp - 0.9, 1 + ramp / 1000, ramp.roll(1), ramp.sign(), ramp**9])
    x = torch.cat([x, x[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]])
    codes, scale = QUANTDIT.quantize_tokens(x, bits, group, affine)
    largest = steps(x, bits, group, affine).amax(dim=1, keepdim=True)
    grid = x.abs().amax(dim=1, keepdim=True) / 127
    assert bool((group_error(scale[:, None] * codes - x, group) <= largest / 2 + grid / 2 + 1e-5).all())


def gelu_like(m: int, k: int) -> torch.Tensor:
    """Inputs as after a GELU: never below -.17, a tail above."""
    return torch.nn.functional.gelu(2 * random(m, k, seed=7))


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
def test_an_offset_serves_one_sided_inputs(bits: int, group: int):
    """No token is worse than with symmetric codes, which spend half of themselves on nothing; on the whole much better."""
    x = gelu_like(64, 256)

    def error(affine: bool) -> torch.Tensor:
        codes, scale = QUANTDIT.quantize_tokens(x, bits, group, affine)
        return (scale[:, None] * codes - x).norm(dim=1)

    if bits == 8:  # no step is finer than the int8 grid's, with an offset or without
        assert bool((error(True) <= 1.001 * error(False)).all())
        return
    assert bool((error(True) <= error(False)).all())
    assert float(error(True).norm()) < 0.75 * float(error(False).norm())


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("affine", [False, True])
def test_smaller_groups_and_more_bits_are_better(bits: int, affine: bool):
    x = random(64, 256)
    x[:, 7] *= 30  # one outlier channel

    def error(bits: int, group: int) -> float:
        codes, scale = QUANTDIT.quantize_tokens(x, bits, group, affine)
        return float((scale[:, None] * codes - x).norm())

    # Not the whole token: the group that has the outlier pays for a step that is a whole number of grid steps.
    by_group = [error(bits, group) for group in (128, 64, 32)]
    assert by_group == sorted(by_group, reverse=True)
    assert by_group[-1] < (0.5 if bits == 4 else 0.75) * error(bits, 0)
    for group in (0, 128, 64, 32):
        assert error(6, group) < error(4, group)


@pytest.mark.parametrize(("bits", "group", "affine"), KINDS)
def test_powers_of_two_scale_what_comes_out(bits: int, group: int, affine: bool):
    x = gelu_like(16, 256)
    codes, scale = QUANTDIT.quantize_tokens(x, bits, group, affine)
    again, larger = QUANTDIT.quantize_tokens(x * 64, bits, group, affine)
    assert torch.equal(again, codes) and torch.equal(larger, scale * 64)
    if not affine:
        negated, same = QUANTDIT.quantize_tokens(-x, bits, group, affine)
        assert torch.equal(negated, -codes) and torch.equal(same, scale)


@pytest.mark.parametrize(("bits", "group"), [(4, 0), (6, 0), (4, 32), (6, 32), (8, 32)])
def test_an_offset_follows_the_group(bits: int, group: int):
    """Whole numbers on the grid, moved by a whole number that leaves the grid's scale: codes move by exactly that."""
    x = torch.randint(0, 2**bits if bits < 8 else 100, (16, 64), generator=torch.Generator().manual_seed(1)).float()
    x[:, ::32], x[:, 1::32] = 0, min(2**bits - 1, 127)
    x[:, 2] = 127 if group else x[:, 2]  # pins the scale of a grouped token to 1
    codes, scale = QUANTDIT.quantize_tokens(x, bits, group, True)
    part = slice(32, 64) if group else slice(None)  # the group without the 127
    assert torch.equal(codes[:, part].float() * scale[:, None], x[:, part])
    y = x.clone()
    y[:, part] -= 20
    moved, scale = QUANTDIT.quantize_tokens(y, bits, group, True)
    assert torch.equal(moved[:, part].float() * scale[:, None], y[:, part])


@pytest.mark.parametrize(("bits", "group", "affine"), [(8, 0, False), *KINDS])
def test_tokens_of_zeros_of_any_kind(bits: int, group: int, affine: bool):
    """Scale and codes 0, the neighbours untouched; a group of zeros in another token stays zero."""
    x = random(4, 256)
    x[1], x[3, :128] = 0, 0
    codes, scale = QUANTDIT.quantize_tokens(x, bits, group, affine)
    assert scale[1] == 0 and not bool(codes[1].any())
    if group:
        assert not bool(codes[3, :128].any())
    alone, alone_scale = QUANTDIT.quantize_tokens(x[::2], bits, group, affine)
    assert torch.equal(codes[::2], alone) and torch.equal(scale[::2], alone_scale)
    none, none_scale = QUANTDIT.quantize_tokens(x[:0], bits, group, affine)
    assert (none.shape, none_scale.shape) == ((0, 256), (0,))


@pytest.mark.parametrize("affine", [False, True])
def test_an_outlier_costs_its_own_group_alone(affine: bool):
    """The other groups keep steps of their own range, down to the token's int8 grid."""
    x = random(8, 128)
    x[:, 5] = 100
    codes, scale = QUANTDIT.quantize_tokens(x, 4, 32, affine)
    y = scale[:, None] * codes
    assert torch.allclose(y[:, 5], torch.full((8,), 100.0))
    elsewhere = (y - x)[:, 32:].abs()
    whole = QUANTDIT.quantize_tokens(x, 4, 0, affine)
    lost = (whole[1][:, None] * whole[0] - x)[:, 32:].abs()
    assert float(elsewhere.max()) <= 100 / 127 + 1e-5  # half a step and half of a rounded offset
    assert float(elsewhere.square().mean()) < 0.2 * float(lost.square().mean())


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_static_scale_is_used_and_clips(bits: int):
    top = 2 ** (bits - 1) - 1
    x = random(16, 40)
    dynamic, own = QUANTDIT.quantize_tokens(x[:1], bits)
    assert torch.equal(QUANTDIT.quantize_tokens(x[:1], bits, 0, False, own)[0], dynamic)
    static = torch.tensor([0.5 / top])
    codes, scale = QUANTDIT.quantize_tokens(x, bits, 0, False, static)
    assert torch.equal(scale, static.expand(16))
    assert torch.equal(codes.float(), (x / static).round().clamp(-top, top))
    assert int(codes.max()) == top and int(codes.min()) == -top  # |x| reaches 3


@pytest.mark.parametrize("bits", [4, 6])
def test_a_static_scale_of_groups_is_that_of_the_int8_grid(bits: int):
    top = 2 ** (bits - 1) - 1
    x = random(16, 64)
    static = torch.tensor([1.5 / 127])
    codes, scale = QUANTDIT.quantize_tokens(x, bits, 32, False, static)
    assert torch.equal(scale, static.expand(16))
    assert int(levels_of(codes, 32).max()) <= 2 * top + 1
    kept = x.abs() <= 1.5
    step = 1.5 / top + 1.5 / 127
    assert bool(((codes * static - x).abs() <= step / 2 + 1e-6)[kept].all())
    assert bool((codes * static)[x > 1.5].ge(1.5 - step).all())  # clipped to the end, not wrapped


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fp8_tokens_are_the_cast_of_the_scaled_token(dtype: torch.dtype):
    """Relative half step 2^-4 of e4m3 from its smallest normal number 2^-6 on, half of 2^-9 below; 448 is reached."""
    x = (random(32, 96) * torch.logspace(-3, 3, 32)[:, None]).to(dtype)
    x[5] = 0
    codes, scale = QUANTDIT.quantize_tokens_fp8(x)
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (torch.float8_e4m3fn, x.shape, torch.float32, (32,))
    assert scale[5] == 0 and not bool(codes[5].float().any())
    values = codes.double()
    live = torch.arange(32) != 5
    assert torch.equal(values.abs().amax(dim=1)[live], torch.full((31,), 448.0, dtype=torch.float64))
    error = (scale.double()[:, None] * values - x.double()).abs()
    bound = torch.maximum(x.double().abs() * 2.0**-4, scale.double()[:, None] * 2.0**-10)
    assert bool((error <= bound * (1 + 4 * U32)).all())
    assert QUANTDIT.quantize_tokens_fp8(x[:0])[0].shape == (0, 96)


def dense_product(a: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`a (scale I)^T` in float64 and the sum of the magnitudes of its terms, by which rounding is bounded."""
    dense = weight.to(torch.float32).double() * scale.double()[:, None]
    return a.double() @ dense.T, a.double().abs() @ dense.abs().T


@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, True), (torch.float16, False), (torch.bfloat16, True)])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (1, 7, 33), (5, 16, 64), (33, 40, 100), (64, 9, 1100)])
def test_reference_gemm_w8a8_is_the_dense_product(m: int, n: int, k: int, dtype: torch.dtype, bias: bool):
    """The sum is exact; it, the two scalings and the bias are rounded to float32, the result to dtype: 4 roundings and 1."""
    codes, weight = random_int8(m, k), random_int8(n, k, seed=1, low=-128)
    token_scale, scale, b = random(m).abs() / 100, random(n).abs() / 100, random(n) if bias else None
    product, _ = dense_product(codes * token_scale.double()[:, None], weight, scale)
    y = ops.gemm_w8a8_reference(codes, weight, scale, Epilogue(dtype, token_scale, b))
    assert (y.dtype, y.shape) == (dtype, (m, n))
    expected = product if b is None else product + b.double()
    # Rounding to float16 below its smallest normal number, 2^-14, is off by half of 2^-24.
    bound = 5 * U32 * (product.abs() + expected.abs()) + OUTPUT[dtype] * expected.abs() + 2.0**-25
    assert bool(((y.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", OUTPUT)
@pytest.mark.parametrize("bias", [False, True])
def test_gemm_w8a16_is_the_dense_product(fp8: bool, dtype: torch.dtype, bias: bool):
    """Weights, bias and result are rounded to dtype, the k products are summed in float32 or better."""
    m, n, k = 9, 12, 136
    x = random(m, k).to(dtype)
    weight = random(n, k, seed=1).mul(50).to(torch.float8_e4m3fn) if fp8 else random_int8(n, k, seed=1, low=-128)
    scale, b = random(n, seed=2).abs() / 100, random(n, seed=3) if bias else None
    product, magnitude = dense_product(x, weight, scale)
    y = QUANTDIT.gemm_w8a16(x, weight, scale, b)
    assert (y.dtype, y.shape) == (dtype, (m, n))
    expected = product if b is None else product + b.double()
    u = OUTPUT[dtype]
    magnitude = magnitude if b is None else magnitude + b.double().abs()
    bound = (2 * u + k * U32) * magnitude + 2 * u * expected.abs()
    assert bool(((y.double() - expected).abs() <= bound).all())


def test_gemm_w8a16_in_float16_does_not_overflow_on_the_way():
    """The product x I^T alone is 300 * 127 * 64 = 2.4e6, beyond float16; scaled it is 244."""
    x = torch.full((2, 64), 300.0, dtype=torch.float16)
    y = QUANTDIT.gemm_w8a16(x, torch.full((3, 64), 127, dtype=torch.int8), torch.full((3,), 1e-4), None)
    expected = 300 * 127e-4 * 64
    # 1e-4 * 127 and the result are rounded to float16.
    assert y.float().flatten().tolist() == pytest.approx([expected] * 6, rel=3 * 2.0**-11)
