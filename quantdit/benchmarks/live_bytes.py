"""Bytes of tensors that live at once while a model runs: counted on the meta device, where nothing is computed, and measured.

`predicted` runs the model's own forward on tensors without memory and adds up the storages that are alive after each operator, so
that what lives at once is what the class's code keeps, at any size, in a second. The assumptions:

    attention       is a fused kernel: scores are never in memory, besides the output `[batch, heads, tokens, width]` there is one
                    float32 a token and head, 4 b h t
    a linear        of a quantized layer takes besides input and output what `quantized_linear` says
    a convolution   copies its input, its weight and its output into another order, all three at once
    other kernels   take no scratch memory of their own; the allocator cuts nothing off
    weights         are not counted, nor are views of them; what is cast or made of them is

`measured` runs it in memory and adds up what torch's allocator gave and took back, scratch memory of kernels included.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quantdit.formats import FORMATS
from quantdit.kernels.triton_ops import dispatch
from quantdit.tensors.row_chunks import largest_chunk

CONVOLUTIONS = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)
CARD = 89  # compute capability that layers choose their kernels for: Ada, of which most cards up to 24 GB are


def quantized_linear(m: int, n: int, k: int, format: str, activation_bits: int) -> int:
    """Return the bytes that a quantized, smoothed layer takes for a while besides its input and weight, its output included.

    The largest of its stages on a CARD (kernels/triton_ops/dispatch.py), of m tokens in 16 bits:

        codes       of 8 bits and their scales, m k + 4 m; where no kernel rotates, beside two float32 copies of the tokens that
                    are rotated at once (row_chunks.py) and one in 16 bits, 10 c; beside all rotated tokens where one does, 2 m k
        multiply    codes, the weight if it is decoded first, the output: m k + 4 m + n k + 2 m n
        16 bits     instead of both: rotated tokens, 2 m k, beside 10 c; beside the weight, decoded and twice in float32: n k +
                    8 n k, then in 16 bits, and the output: 2 n k + 2 m n; or the output alone where the product decodes it

    Args:
        m: tokens.
        n: outputs.
        k: inputs.
        format: of the weight, a name of FORMATS.
        activation_bits: of its inputs.
    """
    f, tokens, codes = FORMATS[format], 2 * m * k, m * k + 4 * m
    chunk = 0 if dispatch.rotates_in_registers(k, torch.bfloat16, torch.float32, CARD) else largest_chunk(m, k)
    rotates_all = chunk == m * k  # whose results are made when the copies are gone
    if activation_bits == 16:
        rotating = 10 * chunk + (0 if rotates_all else tokens)
        if dispatch.decodes_first(m, f, torch.bfloat16, CARD):
            return max(rotating, tokens + 9 * n * k, tokens + 2 * n * k + 2 * m * n)
        return max(rotating, tokens + 2 * m * n)
    coding = max(10 * chunk, tokens + codes) if rotates_all or not chunk else 10 * chunk + codes
    is_decoded = f.kind != "whole" and dispatch.decodes_first(m, f, torch.int8, CARD)
    return max(coding, codes + is_decoded * n * k + 2 * m * n)


class _Live(TorchDispatchMode):
    """Counts the bytes of storages that operators made and that are still alive."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        self.reach(0)
        weakref.finalize(storage, self._gone, key, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size

    def reach(self, more: int) -> None:
        """Note that so many bytes live for a while besides those that are counted."""
        self.peak = max(self.peak, self.now + more)


class _Kernels(TorchFunctionMode):
    """Stands for kernels whose operators would show memory that they do not take, or take memory that operators do not show."""

    def __init__(self, live: _Live, quantized: Mapping[int, tuple[str, int]]) -> None:
        super().__init__()
        self.live, self.quantized = live, quantized

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is nn.functional.linear and id(args[1]) in self.quantized:
            outputs, inputs = args[1].shape
            tokens = args[0].numel() // inputs
            self.live.reach(quantized_linear(tokens, outputs, inputs, *self.quantized[id(args[1])]))
        made = func(*args, **kwargs)
        if func in CONVOLUTIONS:
            self.live.reach(args[0].nbytes + args[1].nbytes + made.nbytes)
        return made

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        self.live.reach(4 * query.shape[:-1].numel())
        # Fused kernels write the heads of a token side by side, so that flattening them makes no copy.
        *outer, heads, tokens = query.shape[:-1]
        return query.new_empty(*outer, tokens, heads, value.shape[-1]).transpose(-3, -2)


def predicted(model: nn.Module, call: Callable[[], object], quantized: Mapping[str, tuple[str, int]] | None = None) -> int:
    """Return the largest number of bytes that live at once in a call besides weights and the call's inputs.

    Args:
        model: on the meta device.
        call: calls it; its tensors were made before.
        quantized: of the linears that count as quantized, by path: the weight's format, the bits of its inputs.
    """
    weights = {id(model.get_parameter(f"{path}.weight")): kind for path, kind in (quantized or {}).items()}
    live = _Live([*model.parameters(), *model.buffers()])
    with torch.no_grad(), torch.device("meta"), live, _Kernels(live, weights):
        call()
    return live.peak


def measured(call: Callable[[], object]) -> int:
    """Return the largest number of bytes that torch's allocator had given out on the CPU in a call, beyond those before it."""
    from torch.profiler import ProfilerActivity, profile

    with torch.no_grad():
        call()  # what is made once, and kept
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
    results: Any = profiler.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess] - it has run
    events = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(results.events()) if e.name() == "[memory]")
    now = peak = 0
    for _, _, size in events:
        now += size
        peak = max(peak, now)
    return peak
