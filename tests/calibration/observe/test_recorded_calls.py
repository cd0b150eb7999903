"""Stored calls: every kind of argument comes back as it was, no other kind is taken, nothing is read before it is asked for."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantdit.calibration.observe import recorded_calls as call_files
from quantdit.calibration.observe.recorded_calls import INDEX, Call, StoredCall, StoredCalls

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)


def back(tmp_path: Path, *args: object, **kwargs: object) -> Call:
    """Write a call and read it again."""
    path = tmp_path / "call.safetensors"
    call_files.save_call(path, args, kwargs)
    return StoredCall(path, 0).load()


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.arange(math.prod(shape)).reshape(shape)
    return (made % 2).bool() if dtype == torch.bool else (made * (1 + 0.5j)).to(dtype) if dtype.is_complex else made.to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("shape", [(2, 3), (), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensor_of_every_dtype_and_shape(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]):
    x = numbers(*shape, dtype=dtype)
    call = back(tmp_path, x, named=x + 0 if dtype != torch.bool else x.clone())
    assert same(call.args[0], x) and same(call.kwargs["named"], x)


def test_values_that_are_no_tensors(tmp_path: Path):
    values = (None, True, False, 0, -(2**70), 1.5, math.inf, -math.inf, "", "Straße\n\0")
    call = back(tmp_path, *values, **{f"k{i}": v for i, v in enumerate(values)})
    assert call.args == values and tuple(call.kwargs.values()) == values
    assert [type(v) for v in call.args] == [type(v) for v in values]
    (nan,) = back(tmp_path, math.nan).args
    assert math.isnan(nan)


def test_nested_arguments_keep_their_shape_and_order(tmp_path: Path):
    a, b = numbers(2), numbers(3, dtype=torch.complex64)
    call = back(tmp_path, [a, (1, [None, {"z": b, "a": ()}])], {}, sizes=[(1, 2), (3, 4)], empty=[], rope=(a, a + 1))
    first, second = call.args
    assert type(first) is list and type(first[1]) is tuple and type(first[1][1]) is list
    assert list(first[1][1][1]) == ["z", "a"] and first[1][1][1]["a"] == () and second == {}
    assert same(first[0], a) and same(first[1][1][1]["z"], b)
    assert call.kwargs["sizes"] == [(1, 2), (3, 4)] and call.kwargs["empty"] == []
    assert type(call.kwargs["rope"]) is tuple and list(call.kwargs) == ["sizes", "empty", "rope"]


def test_call_without_arguments(tmp_path: Path):
    assert back(tmp_path) == Call((), {}, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_the_same_tensor_twice_stays_one_object(tmp_path: Path, dtype: torch.dtype):
    """Queries, keys and values share their statistics only if they are made of one tensor."""
    x = numbers(2, 3, dtype=dtype)
    call = back(tmp_path, x, [x, x.clone()], again=x)
    assert call.args[0] is call.args[1][0] is call.kwargs["again"]
    assert call.args[1][1] is not call.args[0] and same(call.args[1][1], x)


def test_views_are_written_alone_and_come_back_apart(tmp_path: Path):
    whole = numbers(1000, 4)
    views = (whole[3], whole[3], whole.t()[1:3, ::7], whole[0, 0].expand(5, 2), whole[5:6])
    call = back(tmp_path, *views)
    assert all(same(a, b) and a.is_contiguous() for a, b in zip(call.args, views, strict=True))
    call.args[0].zero_()
    assert same(call.args[1], views[1])
    (alone,) = back(tmp_path, whole[3]).args
    assert alone.untyped_storage().nbytes() == 16 and (tmp_path / "call.safetensors").stat().st_size < 500


@pytest.mark.parametrize("view", [lambda z: z.conj(), lambda z: z.imag, lambda z: z.conj().imag, lambda z: z.real])
def test_lazy_views_of_complex_tensors(tmp_path: Path, view):
    z = numbers(4, dtype=torch.complex64)
    assert same(back(tmp_path, view(z)).args[0], view(z).resolve_conj().resolve_neg())


def test_gradients_stay_behind(tmp_path: Path):
    x = torch.ones(2, requires_grad=True)
    call = back(tmp_path, x * 2, x, torch.nn.Parameter(torch.ones(1)))
    assert not any(t.requires_grad for t in call.args)
    assert x.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_not_finite_tensors_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype):
    x = torch.tensor([math.nan, math.inf, -math.inf, -0.0], dtype=dtype)
    (got,) = back(tmp_path, x).args
    assert torch.equal(got.view(torch.uint8), x.view(torch.uint8))


class Other:
    pass


@pytest.mark.parametrize(
    ("value", "name"),
    [(Other(), "Other"), ({1, 2}, "set"), (b"x", "bytes"), (torch.float32, "dtype"), (1j, "complex"), (Other, "type")],
)
@pytest.mark.parametrize("place", [lambda v: v, lambda v: [1, {"a": (v,)}]], ids=["plain", "nested"])
def test_other_types_are_refused_by_name(tmp_path: Path, value: object, name: str, place):
    with pytest.raises(ValueError, match=rf"argument of type {name} cannot be kept.*tensors, numbers, texts"):
        call_files.save_call(tmp_path / "call", (), {"x": place(value)})
    assert not list(tmp_path.iterdir())


def test_dictionary_of_other_keys_says_that_it_is_the_keys(tmp_path: Path):
    with pytest.raises(ValueError, match="dict with keys that are no texts"):
        call_files.save_call(tmp_path / "call", ({1: 2},), {})
    assert same(back(tmp_path, OrderedDict(a=numbers(2))).args[0]["a"], numbers(2))


def test_other_values_of_some_arguments():
    call = Call((1, 2), {"a": 3, "b": 4}, 5, numbers(1))
    changed = call.with_arguments({1: "x", "a": "y"})
    assert (changed.args, changed.kwargs, changed.bucket) == ((1, "x"), {"a": "y", "b": 4}, 5)
    assert changed.output is call.output and (call.args, call.kwargs) == ((1, 2), {"a": 3, "b": 4})
    assert (call.argument(1), call.argument("b")) == (2, 4)


def test_carried_tensors_take_the_place_of_what_is_fed(tmp_path: Path):
    call_files.save_call(tmp_path / "call", (numbers(2), 7), {"text": numbers(3), "temb": numbers(1)})
    call_files.save_outputs(tmp_path / "carried", (numbers(3) + 5, None, numbers(2) + 9))
    call = StoredCall(tmp_path / "call", 4, carried=tmp_path / "carried", fed=((0, 2), ("text", 0))).load()
    assert same(call.args[0], numbers(2) + 9) and call.args[1] == 7 and call.bucket == 4
    assert same(call.kwargs["text"], numbers(3) + 5) and same(call.kwargs["temb"], numbers(1))
    assert call_files.load_outputs(tmp_path / "carried")[1] is None


def some_calls(count: int = 5) -> list[Call]:
    return [Call((numbers(2) + i,), {"timestep": i}, i // 2, numbers(1) - i if i != 3 else None) for i in range(count)]


def test_stored_calls_are_a_sequence(tmp_path: Path):
    stored = call_files.store(some_calls(), tmp_path / "calls")
    assert len(stored) == 5 and [c.kwargs["timestep"] for c in stored] == [0, 1, 2, 3, 4]
    assert [c.bucket for c in stored] == [0, 0, 1, 1, 2]
    assert stored[-1].kwargs == {"timestep": 4} and isinstance(stored[1:], StoredCalls)
    assert [c.kwargs["timestep"] for c in stored[::2]] == [0, 2, 4] and len(stored[5:]) == 0
    assert [None if c.output is None else c.output.item() for c in stored] == [0, -1, -2, None, -4]
    with pytest.raises(IndexError):
        stored[5]
    assert [c.kwargs for c in call_files.recorded(tmp_path / "calls")] == [c.kwargs for c in stored]


def test_calls_are_read_when_they_are_asked_for_and_kept_by_nobody(tmp_path: Path):
    stored = call_files.store(some_calls(), tmp_path)
    stored.entries[1].path.unlink()
    part, walk = stored[1:], iter(stored)
    assert next(walk).bucket == 0 and len(part) == 4
    with pytest.raises(ValueError, match=r"000001\.safetensors is not what"):
        next(walk)
    assert same(stored[4].args[0], numbers(2) + 4)
    stored[4].args[0].zero_()
    assert same(stored[4].args[0], numbers(2) + 4)


def test_folder_without_its_index_was_interrupted(tmp_path: Path):
    assert call_files.recorded(tmp_path / "nothing") is None
    stored = call_files.store(some_calls(), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {INDEX, "000000.safetensors"} and not list(tmp_path.glob("*.part"))
    (tmp_path / INDEX).unlink()
    assert call_files.recorded(tmp_path) is None
    assert len(stored) == 5


@pytest.mark.parametrize("name", ["000001.safetensors", "000001-output.safetensors", INDEX])
def test_any_flipped_bit_is_noticed(tmp_path: Path, name: str):
    call_files.store(some_calls(2), tmp_path)
    raw = (tmp_path / name).read_bytes()
    for place in range(0, len(raw), 7):
        (tmp_path / name).write_bytes(raw[:place] + bytes([raw[place] ^ 16]) + raw[place + 1 :])
        with pytest.raises(ValueError, match=f"{name} is .*--overwrite"):
            list(call_files.recorded(tmp_path))


def test_calls_of_another_run_are_refused(tmp_path: Path):
    call_files.finish(tmp_path, {"base": "x"}, "one run")
    assert call_files.index_of(tmp_path, "one run")["base"] == "x"
    with pytest.raises(ValueError, match=r"another run.*--overwrite"):
        call_files.index_of(tmp_path, "another")


def test_forgotten_calls_leave_no_files(tmp_path: Path):
    call_files.store(some_calls(), tmp_path)
    for number in (1, 3):
        call_files.forget_recorded(tmp_path, number)
    stored = call_files.finish_recorded(tmp_path, {0: 0, 2: 1, 4: 2})
    assert [c.kwargs["timestep"] for c in stored] == [0, 2, 4] and [c.bucket for c in stored] == [0, 1, 2]
    assert sorted(os.listdir(tmp_path)) == sorted(
        [INDEX, *(f"00000{i}{kind}.safetensors" for i in (0, 2, 4) for kind in ("", "-output"))]
    )


def test_same_calls_give_the_same_bytes(tmp_path: Path):
    for name in "ab":
        call_files.store(some_calls(), tmp_path / name)
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab"]
    assert files[0] == files[1]
