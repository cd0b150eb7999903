"""Rows some at a time give the bits of all at once, and take less memory on the way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantdit.benchmarks.live_bytes import measured
from quantdit.kernels import ops
from quantdit.kernels.ops import Epilogue
from quantdit.kernels.schema import flat
from quantdit.tensors import row_chunks, transform
from quantdit.tensors.hadamard import random_sign
from quantdit.tensors.row_chunks import in_row_chunks, largest_chunk
from quantdit.tensors.transform import Transform

QUANTDIT = torch.ops.quantdit
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAST_BIT = {"rtol": 1e-14, "atol": 1e-14}  # in which some processors' float64 products of fewer rows differ
M, K = 301, 256
CHUNK = 64 * K  # five calls of 60 or 61 rows


def tokens(dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def smoothed(block: int = 128) -> Transform:
    factor = torch.rand(K, generator=torch.Generator().manual_seed(1), dtype=torch.float32) + 0.5
    return transform.smooth(Transform(random_sign(K, 3), block), factor)


def outlier() -> Transform:
    blocks = torch.linalg.qr(torch.randn(2, K // 64, 64, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float32)).Q
    permutation = torch.randperm(K, generator=torch.Generator().manual_seed(5)).int()
    return Transform(smoothed().premultiplier, 1, blocks[0], permutation, blocks[1])


def both(monkeypatch: pytest.MonkeyPatch, call) -> tuple:
    """Return what a call makes of all rows at once, and of some at a time."""
    whole = call()
    monkeypatch.setattr(row_chunks, "CHUNK", CHUNK)
    return whole, call()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("t", [smoothed(), smoothed(2), Transform(random_sign(K, 3), 64), outlier(), Transform()], ids=str)
def test_tokens_are_transformed_to_the_same_bits(monkeypatch: pytest.MonkeyPatch, t: Transform, dtype: torch.dtype) -> None:
    whole, chunked = both(monkeypatch, lambda: transform.apply(t, tokens(dtype)))
    assert whole.dtype == chunked.dtype == transform.kept_in(dtype)
    if dtype == torch.float64:
        torch.testing.assert_close(whole, chunked, **LAST_BIT)
    else:
        assert torch.equal(whole, chunked)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("format", "bits", "group", "static", "rank"),
    [
        ("int", 8, 0, False, 0),
        ("int", 8, 0, True, 0),
        ("int", 4, 32, False, 0),
        ("affine", 8, 0, False, 0),
        ("affine", 4, 64, False, 4),
        ("fp8", 8, 0, False, 4),
    ],
)
def test_tokens_are_quantized_to_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, format: str, bits: int, group: int, static: bool, rank: int, dtype: torch.dtype
) -> None:
    premultiplier = smoothed().premultiplier
    scale = torch.full((1,), 0.01) if static else None
    down = tokens(torch.bfloat16, 7)[:rank] if rank else None
    rest = (128, format, bits, group, scale, down)
    whole, chunked = both(monkeypatch, lambda: QUANTDIT.rotate_quantize(tokens(dtype), premultiplier, *rest))
    for one, other in zip(whole, chunked, strict=True):
        if one.dtype == torch.float64:  # what a low-rank branch begins with
            torch.testing.assert_close(one, other, **LAST_BIT)
        else:
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("dtype", FLOATS[:3])
def test_a_product_of_codes_has_the_same_bits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    codes, scale = QUANTDIT.quantize_tokens(tokens(torch.float32), 8)
    weight = torch.randint(-127, 128, (K, K), dtype=torch.int8, generator=torch.Generator().manual_seed(3))
    after = flat(Epilogue(dtype, scale, torch.ones(K)))
    whole, chunked = both(monkeypatch, lambda: QUANTDIT.gemm_w8a8(codes, weight, torch.full((K,), 0.01), *after))
    assert whole.dtype == dtype and torch.equal(whole, chunked)


def test_copies_are_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    x, premultiplier = tokens(torch.bfloat16), smoothed().premultiplier
    result, chunk = 2 * M * K, largest_chunk(M, K)
    assert chunk == M * K and measured(lambda: ops.rotate_reference(x, premultiplier, 128)) >= 5 * result
    monkeypatch.setattr(row_chunks, "CHUNK", CHUNK)
    chunk = largest_chunk(M, K)
    assert chunk == 61 * K
    assert measured(lambda: ops.rotate_reference(x, premultiplier, 128)) <= result + 10 * chunk + 4 * K


def test_where_gradients_are_wanted_it_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_chunks, "CHUNK", CHUNK)
    x = tokens(torch.float32).requires_grad_()
    transform.apply(smoothed(), x).sum().backward()
    assert x.grad is not None and bool((x.grad != 0).any())


def test_one_row_is_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_chunks, "CHUNK", 1)
    seen = []

    def double(rows: Tensor, beside: Tensor, nothing: None) -> tuple[Tensor]:
        assert nothing is None
        seen.append(len(rows))
        return (2 * rows + beside[:, None],)

    x = torch.arange(6).reshape(3, 2)
    made = in_row_chunks(double, x, torch.arange(3), None)[0]
    assert seen == [1, 1, 1] and torch.equal(made, 2 * x + torch.arange(3)[:, None])
    assert in_row_chunks(lambda rows: (rows,), torch.ones(0, 2))[0].shape == (0, 2)
    assert transform.apply(smoothed(), tokens(torch.float32)[0]).shape == (K,)


def test_a_compiled_transform_has_one_graph_for_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_chunks, "CHUNK", CHUNK)
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    t, x = outlier(), tokens(torch.bfloat16)
    compiled = torch.compile(lambda rows: transform.apply(t, rows), backend=keep, fullgraph=True, dynamic=True)
    for count in (3, 100, M):
        assert torch.equal(compiled(x[:count]), transform.apply(t, x[:count]))
    assert len(graphs) == 1
