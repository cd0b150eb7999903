"""Every row of FORMATS: packing, the decode contract and the refusals, against slow definitions written from the docstrings.

The slow definitions are plain Python on lists of integers and share no code with the package. Everything here is integers or
exactly representable floats, so every comparison is for equality.
"""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from laws import LAW
from quantdit.formats import FORMATS, Format, QSpec, trellis
from quantdit.formats.format import KINDS
from quantdit.formats.packing import pack_codes, packed_bytes, unpack_codes
from quantdit.tensors.qtensor import QTensor, check_values, spec_fields

BITS = (1, 2, 3, 4, 6, 8, 12, 16)
AFFINE = ("int2", "int3", "int4", "int6")
TABLES = ("table2", "table3", "table4", "table6")
TABLES_E4M3 = tuple(f"{name}_e4m3" for name in TABLES)
VECTORS = ("vq256x4", "vq64x2", "vq256x2", "vq256x8")
SIGN_SPLIT = ("ssvq256x8", "ssvq256x4")
TRELLIS = tuple(f"trellis{bits}_l{window}" for bits in (2, 3, 4) for window in (10, 12, 14, 16))
FEW = 256  # of the codes of wide formats
GOLDEN = Path(__file__).parents[1] / "golden"


def every_code_everywhere(levels: int, width: int) -> torch.Tensor:
    """Codes `[levels, width]` in which every code stands at every position once; of more than FEW levels, so many of them."""
    step = max(1, levels // FEW)
    codes = (torch.arange(0, levels, step)[:, None] + torch.arange(width) * (step + 1)) % levels
    return codes.to(torch.uint8 if levels <= 256 else torch.int32)


def random_codes(f: Format, rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(f.code_count, (rows, width), generator=torch.Generator().manual_seed(seed)).to(f.code_dtype)


def slow_pack(row: list[int], bits: int) -> list[int]:
    """Pack one row as the docstring of packing.py says: code j of a block of t at byte j % r, bit p * (j // r), r = t p / 8."""
    packed = []
    for start in range(0, len(row), 128):
        block = row[start : start + 128]
        block = block + [0] * (-len(block) % 8)
        t, low = len(block), 0
        for p in {1: [1], 2: [2], 3: [2, 1], 4: [4], 6: [4, 2], 8: [8], 12: [8, 4], 16: [8, 8]}[bits]:
            r = t * p // 8
            plane = [0] * r
            for j, code in enumerate(block):
                plane[j % r] += ((code >> low) % 2**p) << (p * (j // r))
            packed += plane
            low += p
    return packed


def int8_range(top: int) -> list[tuple[int, int]]:
    """Every (multiplier, offset) with -128 <= offset and offset + top * multiplier <= 127."""
    return [(m, o) for m in range(256) for o in range(-128, 128 - top * m)]


def slow_e4m3(code: int) -> float:
    """OCP 8-bit floating point, E4M3: sign, exponent with bias 7, mantissa of 3 bits; 0x7f and 0xff are NaN, no infinity."""
    sign, exponent, mantissa = (-1) ** (code >> 7), (code >> 3) % 16, code % 8
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


@pytest.mark.parametrize("name", FORMATS)
def test_the_kind_of_a_format_is_what_it_stores(name: str):
    f = FORMATS[name]
    stored = set(spec_fields(QSpec(name, 8, 64, 64)))
    kind = {
        "whole": stored == {"data", "scale"} and not f.state_bits,
        "affine": "multiplier" in stored,
        "codebook": "codebook" in stored and f.dim == 1,
        "vectors": "codebook" in stored and f.dim > 1,
        "trellis": f.state_bits > 0,
    }
    assert [k for k, holds in kind.items() if holds] == [f.kind] and tuple(kind) == KINDS


def test_the_lists_here_cover_the_table():
    """A new format lands in the generic tests by itself; this says that it also needs a slow definition of its decode."""
    assert {*AFFINE, *TABLES, *TABLES_E4M3, *VECTORS, *SIGN_SPLIT, *TRELLIS, "int8", "fp8_e4m3"} == set(FORMATS)
    assert all(name == f.name for name, f in FORMATS.items())


@pytest.mark.parametrize("name", FORMATS)
def test_unpack_inverts_pack(name: str):
    """Rows shorter and longer than a block of 128, that do and do not fill their last byte."""
    f = FORMATS[name]
    for width in (1, 100, 136):
        codes = every_code_everywhere(f.code_count, width)
        data = f.pack(f, codes)
        unpacked = f.unpack(f, data, width)
        assert unpacked.dtype == codes.dtype == f.code_dtype
        assert torch.equal(unpacked, codes)
        expected = spec_fields(QSpec(name, len(codes), width * f.dim, width * f.dim))["data"]
        assert (data.dtype, tuple(data.shape)) == (expected.dtype, expected.shape)


@pytest.mark.parametrize("name", [name for name, f in FORMATS.items() if f.code_bits != 8])
def test_every_format_refuses_the_code_after_its_last(name: str):
    f = FORMATS[name]
    with pytest.raises(ValueError, match=f"{f.code_count} does not fit {f.code_bits} bits"):
        f.pack(f, torch.full((2, 8), f.code_count, dtype=f.code_dtype))


@pytest.mark.parametrize("name", FORMATS)
def test_pack_takes_any_strides_and_leaves_its_input_alone(name: str):
    f = FORMATS[name]
    codes = random_codes(f, 136, 5)
    before = codes.clone()
    transposed = f.pack(f, codes.T)
    assert torch.equal(codes, before)
    assert torch.equal(f.unpack(f, transposed, 136), before.T)
    assert transposed.contiguous().view(torch.uint8).tolist() == f.pack(f, before.T.contiguous()).view(torch.uint8).tolist()


@st.composite
def any_codes(draw: st.DrawFn) -> tuple[int, torch.Tensor]:
    """A width in bits, and codes `[rows, n]` of that width."""
    bits = draw(st.sampled_from(BITS))
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 300)))
    codes = draw(arrays("uint8" if bits <= 8 else "int32", shape, elements=st.integers(0, 2**bits - 1)))
    return bits, torch.from_numpy(codes)


@LAW
@given(any_codes())
def test_packed_bytes_are_those_of_the_docstring(drawn: tuple[int, torch.Tensor]):
    """Of any codes of any shape; and they come back."""
    bits, codes = drawn
    packed = pack_codes(codes, bits)
    assert packed.tolist() == [slow_pack(row, bits) for row in codes.tolist()]
    assert packed.shape[1] == packed_bytes(codes.shape[1], bits)
    assert torch.equal(unpack_codes(packed, bits, codes.shape[1]), codes)


@LAW
@given(any_codes().filter(lambda drawn: drawn[0] != 8), st.data())
def test_codes_out_of_range_are_refused(drawn: tuple[int, torch.Tensor], data: st.DataObject):
    """Wherever they stand, whatever is beside them; of 8 bits every uint8 is a code."""
    bits, codes = drawn
    row, column = data.draw(st.integers(0, codes.shape[0] - 1)), data.draw(st.integers(0, codes.shape[1] - 1))
    codes[row, column] = wrong = data.draw(st.integers(2**bits, 255 if bits < 8 else 2**31 - 1))
    with pytest.raises(ValueError, match=f"{wrong} does not fit {bits} bits"):
        pack_codes(codes, bits)


def test_the_picture_of_a_block_of_128():
    """The two lines of the docstring, and where the single bit of each code of a 3- and a 6-bit block goes."""
    four = every_code_everywhere(16, 128)
    assert torch.equal(pack_codes(four, 4), four[:, :64] | four[:, 64:] << 4)
    two = every_code_everywhere(4, 128)
    assert torch.equal(pack_codes(two, 2), two[:, :32] | two[:, 32:64] << 2 | two[:, 64:96] << 4 | two[:, 96:] << 6)
    three = every_code_everywhere(8, 128)
    assert torch.equal(pack_codes(three, 3)[:, :32], pack_codes(three % 4, 2))  # the plane of the two low bits
    assert torch.equal(pack_codes(three, 3)[:, 32:], pack_codes(three >> 2, 1))
    six = every_code_everywhere(64, 128)
    assert torch.equal(pack_codes(six, 6)[:, :64], pack_codes(six % 16, 4))
    assert torch.equal(pack_codes(six, 6)[:, 64:], pack_codes(six >> 4, 2))


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_element_0_lies_in_the_low_bits(bits: int):
    """And a row of 136 codes is a block of 128 followed by a block of 8, of which the first byte belongs to code 128."""
    codes = torch.zeros(1, 136, dtype=torch.uint8)
    codes[0, 0] = 1
    assert pack_codes(codes, bits)[0].nonzero().tolist() == [[0]]
    assert pack_codes(codes, bits)[0, 0] == 1
    codes = torch.zeros(1, 136, dtype=torch.uint8)
    codes[0, 128] = 1
    assert pack_codes(codes, bits)[0].nonzero().tolist() == [[128 * bits // 8]]


@pytest.mark.parametrize("name", AFFINE)
def test_affine_decode_of_every_legal_code_multiplier_and_offset(name: str):
    """I = code * multiplier + offset, nothing left out: one row per (multiplier, offset), its group holds every code."""
    f = FORMATS[name]
    legal = int8_range(f.code_count - 1)
    multiplier, offset = (torch.tensor(column)[:, None] for column in zip(*legal, strict=True))
    codes = torch.arange(f.code_count, dtype=torch.uint8).repeat(len(legal), 1)
    spec = QSpec(name, len(legal), f.code_count, f.code_count)
    stored = {"data": f.pack(f, codes), "multiplier": multiplier.to(torch.uint8), "offset": offset.to(torch.int8)}
    assert f.check(f, spec, stored) is None
    integers = f.decode8(f, spec, stored)
    assert integers.dtype == torch.int8
    assert integers.tolist() == [[code * m + o for code in range(f.code_count)] for m, o in legal]
    assert (int(integers.min()), int(integers.max())) == (-128, 127)


@pytest.mark.parametrize(("width", "group"), [(40, 40), (100, 4), (136, 8), (192, 64), (300, 100)])
@pytest.mark.parametrize("name", AFFINE)
def test_affine_groups_run_along_the_input(name: str, width: int, group: int):
    """Groups that end inside, at and beyond a packed block of 128."""
    f = FORMATS[name]
    legal, rows, groups = int8_range(f.code_count - 1), 5, width // group
    pick = torch.randint(len(legal), (rows, groups), generator=torch.Generator().manual_seed(width)).tolist()
    parameters = [[legal[i] for i in row] for row in pick]
    codes = random_codes(f, rows, width)
    spec = QSpec(name, rows, width, group)
    stored = {
        "data": f.pack(f, codes),
        "multiplier": torch.tensor([[m for m, _ in row] for row in parameters], dtype=torch.uint8),
        "offset": torch.tensor([[o for _, o in row] for row in parameters], dtype=torch.int8),
    }
    expected = [
        [code * parameters[o][i // group][0] + parameters[o][i // group][1] for i, code in enumerate(row)]
        for o, row in enumerate(codes.tolist())
    ]
    assert f.decode8(f, spec, stored).tolist() == expected


@pytest.mark.parametrize("name", AFFINE)
def test_affine_groups_that_leave_int8_are_refused(name: str):
    """One group of many, by one, even if no stored code reaches it: the largest code could."""
    f = FORMATS[name]
    top = f.code_count - 1
    spec = QSpec(name, 3, 3 * 8, 8)
    for m in {1, 2, 255 // top, 255}:
        multiplier = torch.ones(3, 3, dtype=torch.uint8)
        offset = torch.zeros(3, 3, dtype=torch.int8)
        stored = {"data": f.pack(f, torch.zeros(3, 24, dtype=torch.uint8)), "multiplier": multiplier, "offset": offset}
        highest = 127 - top * m
        multiplier[1, 2] = m
        if highest >= -128:
            offset[1, 2] = highest
            assert f.check(f, spec, stored) is None
        if -128 <= highest < 127:
            offset[1, 2] = highest + 1
            assert "128" in f.check(f, spec, stored)
        if highest < -128:
            offset[1, 2] = -128
            assert f.check(f, spec, stored) is not None


@pytest.mark.parametrize("width", [1, 136])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_table_decode(name: str, per_channel: bool, width: int):
    """I[o, i] = codebook[o or 0, code]: every code, entries at both ends of int8, tables that differ by row."""
    f = FORMATS[name]
    rows = f.code_count
    codes = every_code_everywhere(f.code_count, width)
    table = torch.randint(-128, 128, (rows if per_channel else 1, f.code_count), generator=torch.Generator().manual_seed(1))
    table[:, 0], table[:, -1] = -128, 127
    spec = QSpec(name, rows, width, width, codebook_rows=len(table))
    integers = f.decode8(f, spec, {"data": f.pack(f, codes), "codebook": table.to(torch.int8)})
    assert integers.dtype == torch.int8
    expected = [[table.tolist()[o if per_channel else 0][code] for code in row] for o, row in enumerate(codes.tolist())]
    assert integers.tolist() == expected


@pytest.mark.parametrize("width", [1, 129])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", TABLES_E4M3)
def test_e4m3_table_decode(name: str, per_channel: bool, width: int):
    """As above with every number of e4m3 for an entry in turn, zeros of both signs and subnormals included."""
    f = FORMATS[name]
    rows = f.code_count
    codes = every_code_everywhere(f.code_count, width)
    numbers = [code for code in range(256) if code % 128 != 127]
    for start in range(0, len(numbers), f.code_count * (rows if per_channel else 1)):
        count = (rows if per_channel else 1) * f.code_count
        entries = torch.tensor([numbers[(start + i) % len(numbers)] for i in range(count)], dtype=torch.uint8).reshape(
            -1, f.code_count
        )
        spec = QSpec(name, rows, width, width, codebook_rows=len(entries))
        stored = {"data": f.pack(f, codes), "codebook": entries.view(torch.float8_e4m3fn)}
        assert f.check(f, spec, stored) is None
        numbers8 = f.decode8(f, spec, stored)
        assert numbers8.dtype == torch.float8_e4m3fn
        listed = entries.tolist()
        expected = [[listed[o if per_channel else 0][code] for code in row] for o, row in enumerate(codes.tolist())]
        assert numbers8.view(torch.uint8).tolist() == expected
        assert numbers8.float().tolist() == [[slow_e4m3(code) for code in row] for row in expected]


@pytest.mark.parametrize("nan", [0x7F, 0xFF])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", TABLES_E4M3)
def test_nan_in_a_codebook_is_refused(name: str, rows: int, nan: int):
    """Even if no stored code points at it."""
    f = FORMATS[name]
    spec = QSpec(name, 3, 8, 8, codebook_rows=rows)
    codebook = torch.zeros(rows, f.code_count, dtype=torch.uint8)
    codebook[-1, -1] = nan
    stored = {"data": f.pack(f, torch.zeros(3, 8, dtype=torch.uint8)), "codebook": codebook.view(torch.float8_e4m3fn)}
    assert "1 codebook entries are NaN" in f.check(f, spec, stored)
    assert "NaN" in check_values(spec, {"scale": torch.ones(3), **stored})


@pytest.mark.parametrize("count", [1, 25, 129])
@pytest.mark.parametrize("name", VECTORS)
def test_vector_decode(name: str, count: int):
    """I[o, i d : (i + 1) d] = codebook[assignment[o, i]] for every assignment at every place."""
    f = FORMATS[name]
    codes = every_code_everywhere(f.code_count, count)
    codebook = torch.randint(-128, 128, (f.code_count, f.dim), generator=torch.Generator().manual_seed(2))
    codebook[0], codebook[-1] = -128, 127
    spec = QSpec(name, f.code_count, count * f.dim, count * f.dim)
    integers = f.decode8(f, spec, {"data": f.pack(f, codes), "codebook": codebook.to(torch.int8)})
    assert integers.dtype == torch.int8
    entries = codebook.tolist()
    assert integers.tolist() == [[entry for code in row for entry in entries[code]] for row in codes.tolist()]


@pytest.mark.parametrize("count", [1, 129])
@pytest.mark.parametrize("name", SIGN_SPLIT)
def test_sign_split_decode(name: str, count: int):
    """The low 8 bits choose magnitudes; bit 8 + j negates number j."""
    f = FORMATS[name]
    assert (f.codewords, f.code_bits) == (256, 8 + f.dim)
    codes = torch.cat([every_code_everywhere(f.code_count, count), torch.full((1, count), f.code_count - 1, dtype=torch.int32)])
    codebook = torch.randint(0, 128, (256, f.dim), generator=torch.Generator().manual_seed(2))
    codebook[0], codebook[-1] = 0, 127
    spec = QSpec(name, len(codes), count * f.dim, count * f.dim)
    stored = {"data": f.pack(f, codes), "codebook": codebook.to(torch.int8)}
    integers = f.decode8(f, spec, stored)
    assert integers.dtype == torch.int8 and f.check(f, spec, stored) is None
    entries = codebook.tolist()
    expected = [
        [-entries[code % 256][j] if code >> (8 + j) & 1 else entries[code % 256][j] for code in row for j in range(f.dim)]
        for row in codes.tolist()
    ]
    assert integers.tolist() == expected


@pytest.mark.parametrize("name", SIGN_SPLIT)
def test_negative_magnitudes_are_refused(name: str):
    f = FORMATS[name]
    codebook = torch.ones(256, f.dim, dtype=torch.int8)
    codebook[7, 1] = -1
    stored = {"data": torch.zeros(3, packed_bytes(2, f.code_bits), dtype=torch.uint8), "codebook": codebook}
    assert "1 entries of a codebook of magnitudes" in f.check(f, QSpec(name, 3, 2 * f.dim, 2 * f.dim), stored)


@pytest.mark.parametrize("name", (*VECTORS, *SIGN_SPLIT))
def test_every_stored_code_has_an_entry(name: str):
    """Whatever bytes a hostile file holds: assignments beyond the codebook cannot be, and another codebook is refused."""
    f = FORMATS[name]
    spec = QSpec(name, 5, 16 * f.dim, 16 * f.dim)
    fields = spec_fields(spec)
    data = torch.randint(256, fields["data"].shape, generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    data[0] = 255
    codes = f.unpack(f, data, 16)
    low = codes.long() % f.codewords if f.sign_split else codes.long()
    assert int(low.max()) < f.codewords == fields["codebook"].shape[0]
    short = {"data": data, "scale": torch.ones(5), "codebook": torch.ones(f.codewords - 1, f.dim, dtype=torch.int8)}
    with pytest.raises(ValueError, match=f"codebook: expected .*{f.codewords}"):
        QTensor(spec, **short)


def slow_states(column: list[int], window: int, bits: int) -> list[int]:
    """Return each state of a column: the last L bits of the stream of codes that goes round, the newest code on top."""
    stream = "".join(f"{code:0{bits}b}" for code in reversed(column))  # output 0's code is the last, the low bits
    states = []
    for o in range(len(column)):
        end = len(stream) - bits * o  # of output o's code; what stands behind it are the outputs before
        turned = (stream[end - bits :] + stream[: end - bits]) * (window // len(stream) + 1)
        states.append(int(turned[:window], 2))
    return states


@pytest.mark.parametrize("out", [1, 70])
@pytest.mark.parametrize("name", TRELLIS)
def test_trellis_decode_of_any_bytes(name: str, out: int):
    """I[o, i] = table[state], whatever the bits: also of fewer outputs than a window has codes, which go round more than once."""
    f = FORMATS[name]
    spec = QSpec(name, out, 40, 40)
    fields = spec_fields(spec)
    assert fields.keys() == {"scale", "data"}, "the table is not stored"
    data = torch.randint(256, fields["data"].shape, generator=torch.Generator().manual_seed(out)).to(torch.uint8)
    integers = f.decode8(f, spec, {"data": data})
    assert integers.dtype == torch.int8
    entries = trellis.codebook(f.state_bits, f.code_bits).tolist()
    columns = f.unpack(f, data, 40).T.tolist()
    expected = [[entries[state] for state in slow_states(column, f.state_bits, f.code_bits)] for column in columns]
    assert integers.T.tolist() == expected
    assert f.check(f, spec, {"data": data}) is None


@pytest.mark.parametrize(("window", "bits"), [(10, 2), (10, 3), (10, 4)])
def test_every_state_of_a_trellis_is_reached(window: int, bits: int):
    """Codes that spell each state once: all entries come out, in the order of the states."""
    f = FORMATS[f"trellis{bits}_l{window}"]
    pieces = -(-window // bits)
    states = torch.arange(2**window)
    padded = states << (pieces * bits - window)  # the oldest piece may be cut
    codes = torch.stack([(padded >> (bits * j)) & (2**bits - 1) for j in range(pieces)]).to(torch.uint8)  # oldest first
    decoded = trellis.decode(codes, f)
    assert torch.equal(decoded[-1], trellis.codebook(window, bits))


def test_parts_that_are_decoded_at_once_do_not_show(monkeypatch: pytest.MonkeyPatch):
    f = FORMATS["trellis3_l14"]
    codes = random_codes(f, 50, 9)
    whole = trellis.decode(codes, f)
    for at_once in (1, 9, 100):
        monkeypatch.setattr(trellis, "DECODED_AT_ONCE", at_once)
        assert torch.equal(trellis.decode(codes, f), whole)


@pytest.mark.parametrize("name", TRELLIS)
def test_trellis_tables_are_spread_gaussians(name: str):
    """Each past leaves one value of each 2^k-th of the quantiles, at one place in it; symmetric, and safe pairs (PEAK)."""
    f = FORMATS[name]
    table = trellis.codebook(f.state_bits, f.code_bits)
    assert torch.equal(table.sort().values, -table.sort().values.flip(0)) and int(table.max()) == trellis.PEAK
    quantile = torch.distributions.Normal(0, 1).icdf((torch.arange(2**f.state_bits) + 0.5).double() / 2**f.state_bits)
    assert float((table.sort().values - quantile / trellis.unit(f.state_bits)).abs().max()) < 0.5 + 1e-4
    options = table.reshape(2**f.code_bits, -1).sort(dim=0).values  # [own code in order, past]
    strata = table.sort().values.reshape(2**f.code_bits, -1)
    assert torch.equal(options.sort(dim=1).values, strata)
    # No rounding is near a tie: nothing but a wrong table differs on another machine.
    scaled = (quantile / trellis.unit(f.state_bits)).abs()
    assert float(((scaled % 1) - 0.5).abs().min()) > 1e-7


def test_int8_codes_are_the_two_s_complement_of_i():
    f = FORMATS["int8"]
    codes = torch.arange(256, dtype=torch.uint8)[None]
    integers = f.decode8(f, QSpec("int8", 1, 256, 256), {"data": f.pack(f, codes)})
    assert integers.dtype == torch.int8
    assert integers.tolist() == [[*range(128), *range(-128, 0)]]


def test_fp8_decode_of_every_code():
    """Against the definition of the format: 254 numbers with the sign of zero, the two NaN codes refused."""
    f = FORMATS["fp8_e4m3"]
    numbers = [code for code in range(256) if code % 128 != 127]
    codes = torch.tensor([numbers], dtype=torch.uint8)
    spec = QSpec("fp8_e4m3", 1, 254, 254)
    stored = {"data": f.pack(f, codes)}
    assert f.check(f, spec, stored) is None
    values = f.decode8(f, spec, stored)
    assert values.dtype == torch.float8_e4m3fn
    expected = torch.tensor([[slow_e4m3(code) for code in numbers]])
    assert torch.equal(values.float(), expected)
    assert torch.equal(values.float().signbit(), expected.signbit())
    assert float(values.float().max()) == 448


def test_fp8_codes_are_those_of_torch_s_cast():
    """Exact values come back as their code; between two neighbours the nearer, ties to the even code."""
    f = FORMATS["fp8_e4m3"]
    positive = torch.tensor([slow_e4m3(code) for code in range(127)])
    codes = torch.arange(127, dtype=torch.uint8)
    for values, expected in ((positive, codes), (-positive, codes + 128)):
        cast = values.to(torch.float8_e4m3fn)
        assert torch.equal(f.unpack(f, cast[None], 127)[0], expected)
    middle = (positive[1:] + positive[:-1]) / 2  # exact in float32
    even = torch.tensor([code + code % 2 for code in range(126)], dtype=torch.uint8)
    assert torch.equal(f.unpack(f, middle.to(torch.float8_e4m3fn)[None], 126)[0], even)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_fp8_nan_is_refused(code: int):
    f = FORMATS["fp8_e4m3"]
    codes = torch.zeros(2, 24, dtype=torch.uint8)
    codes[1, 23] = code
    assert "1 entries are NaN" in f.check(f, QSpec("fp8_e4m3", 2, 24, 24), {"data": f.pack(f, codes)})


@pytest.mark.parametrize("name", FORMATS)
def test_scales_that_are_negative_or_not_finite_are_refused(name: str):
    width = 8 * FORMATS[name].dim
    spec = QSpec(name, 3, width, width)
    tensors = {key: torch.zeros(field.shape).to(field.dtype) for key, field in spec_fields(spec).items()}
    assert check_values(spec, tensors) is None
    for bad in (-1e-30, math.nan, math.inf, -math.inf):
        tensors["scale"][1] = bad
        assert "scale" in check_values(spec, tensors), bad


def test_packed_bytes_are_the_golden_ones():
    """A checkpoint of yesterday must decode tomorrow: changing these bytes is a new version of the specification."""
    digests = runpy.run_path(str(GOLDEN / "make_golden.py"))["digests"]()
    assert digests == json.loads((GOLDEN / "formats.json").read_text())
