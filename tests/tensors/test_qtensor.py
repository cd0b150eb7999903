"""QTensor: its invariants are kept or refused, its size is that of its bytes, its value is scale * I."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from quantdit.formats import FORMATS, QSpec
from quantdit.tensors.qtensor import QTensor, check_values, spec_fields
from some_formats import EACH_KIND

OUT, WIDTH, GROUP = 6, 96, 32
AFFINE = ("int2", "int3", "int4", "int6")


def random_tensors(spec: QSpec, seed: int = 0) -> dict[str, torch.Tensor]:
    """Stored tensors with values that `check_values` accepts."""
    generator = torch.Generator().manual_seed(seed)
    f = FORMATS[spec.format]
    codes = torch.randint(f.code_count, (spec.out_features, spec.in_features // f.dim), generator=generator).to(f.code_dtype)
    if spec.format == "fp8_e4m3":
        codes[codes % 128 == 127] = 0
    tensors = {"data": f.pack(f, codes), "scale": torch.rand(spec.out_features, generator=generator) + 0.1}
    fields = spec_fields(spec)
    if "multiplier" in fields:
        top = f.code_count - 1
        tensors["multiplier"] = torch.randint(1, 127 // top + 1, fields["multiplier"].shape, generator=generator).to(torch.uint8)
        tensors["offset"] = torch.randint(-128, 1, fields["offset"].shape, generator=generator).to(torch.int8)
    if "codebook" in fields:
        entries = torch.randint(
            0 if f.sign_split else -128, 128, fields["codebook"].shape, generator=generator
        )  # e4m3 rounds them, none to NaN
        tensors["codebook"] = entries.float().to(fields["codebook"].dtype)
    return tensors


@pytest.fixture(params=EACH_KIND)
def spec(request: pytest.FixtureRequest) -> QSpec:
    return QSpec(request.param, OUT, WIDTH, GROUP if request.param in AFFINE else WIDTH)


def test_value_is_scale_times_integers(spec: QSpec):
    """One float32 product per weight, so equal to the last bit."""
    q = QTensor(spec, **random_tensors(spec))
    integers = q.decode8()
    assert integers.shape == (OUT, WIDTH)
    assert integers.dtype == (torch.float8_e4m3fn if spec.format.endswith("e4m3") else torch.int8)
    dense = q.dequantize()
    assert dense.dtype == torch.float32
    for o in range(OUT):
        assert torch.equal(dense[o], q.scale[o] * integers[o].to(torch.float32))


def test_tensors_are_those_of_the_spec(spec: QSpec):
    q = QTensor(spec, **random_tensors(spec))
    assert q.tensors().keys() == spec_fields(spec).keys()
    assert check_values(spec, q.tensors()) is None
    assert torch.equal(QTensor(spec, **q.tensors()).dequantize(), q.dequantize())


def test_frozen(spec: QSpec):
    q = QTensor(spec, **random_tensors(spec))
    with pytest.raises(FrozenInstanceError):
        q.scale = q.scale * 2


@pytest.mark.parametrize(
    ("format", "group", "rows", "expected"),
    [
        # data, then scale (4 bytes an output), then what the format adds; 96 inputs need no padding.
        ("int2", 32, 1, 6 * 96 * 2 // 8 + 24 + 2 * 6 * 3),
        ("int3", 96, 1, 6 * 96 * 3 // 8 + 24 + 2 * 6),
        ("int4", 32, 1, 6 * 96 * 4 // 8 + 24 + 2 * 6 * 3),
        ("int6", 48, 1, 6 * 96 * 6 // 8 + 24 + 2 * 6 * 2),
        ("int8", 96, 1, 6 * 96 + 24),
        ("fp8_e4m3", 96, 1, 6 * 96 + 24),
        ("table2", 96, 1, 6 * 96 * 2 // 8 + 24 + 4),
        ("table3", 96, 6, 6 * 96 * 3 // 8 + 24 + 6 * 8),
        ("table4", 96, 6, 6 * 96 * 4 // 8 + 24 + 6 * 16),
        ("vq256x4", 96, 1, 6 * 24 + 24 + 256 * 4),
        ("vq64x2", 96, 1, 6 * 48 * 6 // 8 + 24 + 64 * 2),
    ],
)
def test_nbytes(format: str, group: int, rows: int, expected: int):
    spec = QSpec(format, OUT, WIDTH, group, rows)
    assert QTensor(spec, **random_tensors(spec)).nbytes == expected


def test_padding_counts():
    """100 codes of 4 bits are padded to 104."""
    spec = QSpec("int4", OUT, 100, 100)
    assert QTensor(spec, **random_tensors(spec)).nbytes == OUT * (52 + 4 + 2)


def test_a_missing_tensor_is_refused(spec: QSpec):
    tensors = random_tensors(spec)
    for name in tensors.keys() - {"data", "scale"}:
        with pytest.raises(ValueError, match=f"{spec.format} stores .*{name}"):
            QTensor(spec, **{**tensors, name: None})


def test_a_superfluous_tensor_is_refused(spec: QSpec):
    tensors = random_tensors(spec)
    for name in {"multiplier", "offset", "codebook"} - tensors.keys():
        with pytest.raises(ValueError, match=f"{spec.format} stores .*got .*{name}"):
            QTensor(spec, **tensors, **{name: torch.zeros(1)})


def test_another_dtype_is_refused(spec: QSpec):
    tensors = random_tensors(spec)
    for name, tensor in tensors.items():
        wrong = tensor.to(torch.float16) if tensor.dtype != torch.float16 else tensor.float()
        with pytest.raises(ValueError, match=f"{name}: expected {tensor.dtype}.*float16"):
            QTensor(spec, **{**tensors, name: wrong})


def test_another_shape_is_refused(spec: QSpec):
    tensors = random_tensors(spec)
    for name, tensor in tensors.items():
        for wrong in (tensor[:-1], tensor[None], tensor[..., :-1]):
            with pytest.raises(ValueError, match=f"{name}: expected"):
                QTensor(spec, **{**tensors, name: wrong})


@pytest.mark.parametrize("field", ["out_features", "in_features"])
@pytest.mark.parametrize("size", [0, -8])
def test_sizes_must_be_positive(field: str, size: int):
    with pytest.raises(ValueError, match="positive"):
        spec_fields(replace(QSpec("int4", OUT, WIDTH, GROUP), **{field: size}))


@pytest.mark.parametrize("group", [0, -32, 36, 64, 97, 192])
def test_group_size_must_divide_the_width(group: int):
    with pytest.raises(ValueError, match=f"group size {group} does not divide the width 96"):
        spec_fields(QSpec("int4", OUT, WIDTH, group))


@pytest.mark.parametrize(("format", "width"), [("vq256x4", 98), ("vq256x4", 97), ("vq64x2", 97)])
def test_vector_length_must_divide_the_width(format: str, width: int):
    with pytest.raises(ValueError, match=f"{format} .*does not divide the width {width}"):
        spec_fields(QSpec(format, OUT, width, width))


@pytest.mark.parametrize("rows", [0, 2, 7])
def test_codebook_rows_are_one_or_all(rows: int):
    with pytest.raises(ValueError, match="codebook_rows must be 1 or 6"):
        spec_fields(QSpec("table4", OUT, WIDTH, WIDTH, rows))


def test_unknown_format_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'int5'.*int4.*fp8_e4m3"):
        spec_fields(QSpec("int5", OUT, WIDTH, WIDTH))
    with pytest.raises(ValueError, match="'int5'"):
        QTensor(QSpec("int5", OUT, WIDTH, WIDTH), torch.zeros(OUT, WIDTH), torch.ones(OUT))
