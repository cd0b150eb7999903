"""Attention in 8 bits: its definition, which the GPU's kernel (triton_ops/attention8.py) only agrees with.

Queries and keys are int8 with a step for each token and head (SageAttention, arXiv 2410.02367). Keys come in tiles of TILE. In
each, the probabilities of a row are relative to its largest in the tile, not to the largest so far: in long rows, whose
probabilities are all small beside one, 8 bits would lose the others. They are then

    uint8   round(255 p), with values int8      fp8   448 p in e4m3, with values e4m3      float   p, with float values

and the row is divided by the sum of its rounded probabilities, so that a constant taken from the values comes back exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantdit.formats.float8 import LARGEST
from quantdit.kernels.ops import LIBRARY, define
from quantdit.kernels.schema import Output

TILE = 64  # keys
STEPS = 255  # of a probability in uint8


def _outputs(
    q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor, dtype: torch.dtype
) -> list[Output]:
    whole = q.dim() == k.dim() == v.dim() == 4 and q.dtype == k.dtype == torch.int8
    torch._check(
        whole, lambda: f"attention8: q and k must be int8 [b, h, tokens, d], v [b, h, d, tokens], got {q.dtype}, {k.dtype}"
    )
    b, h, _, d = q.shape
    fits = k.shape == (b, h, v.shape[3], d) and v.shape[:3] == (b, h, d)
    torch._check(fits, lambda: f"attention8: shapes differ: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    scaled = q_scale.shape == q.shape[:3] and k_scale.shape == k.shape[:3] and v_scale.shape == v.shape[:3]
    torch._check(scaled, lambda: "attention8: a scale each query, each key, and each channel of the values is needed")
    return [(q.shape, dtype)]


# q :: [b, h, m, d] int8, k :: [b, h, n, d] int8, v :: [b, h, d, n] int8, e4m3 or float; scales f32; mask :: to [b, h, m, n] float
#   ->  [b, h, m, d] dtype
@define(_outputs)
def attention8_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    mask: Tensor | None,
    causal: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Define `attention8`: `softmax(q_scale k_scale q k^T + mask) (v_scale v)^T`; rows that see no key are zero."""
    m, n = q.shape[2], k.shape[2]
    queries = q.float()
    total = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    weight, top = total.new_zeros(q.shape[:3]), total.new_full(q.shape[:3], -torch.inf)
    for start in range(0, n, TILE):
        end = min(start + TILE, n)
        # Products of int8 are whole numbers below 2^24: float32 holds their sums exactly.
        scores = queries @ k[:, :, start:end].float().mT * q_scale[..., None] * k_scale[:, :, None, start:end]
        if mask is not None:
            scores = scores + mask.float().expand(*q.shape[:3], n)[..., start:end]
        if causal:
            columns = torch.arange(start, end, device=q.device)
            scores = scores.masked_fill(columns > torch.arange(m, device=q.device)[:, None], -torch.inf)
        here = scores.amax(-1)
        p, value = rounded((scores - _finite(here)[..., None]).exp(), v.dtype), v[..., start:end].float()
        now = torch.maximum(top, here)
        before, after = (top - _finite(now)).exp(), (here - _finite(now)).exp()
        total = total * before[..., None] + (p @ value.mT) * after[..., None]
        weight = weight * before + p.sum(-1) * after
        top = now
    return (total / weight.masked_fill(weight == 0, 1)[..., None] * v_scale[:, :, None]).to(dtype)


def rounded(p: Tensor, values: torch.dtype) -> Tensor:
    """Return probabilities in 0..1 as they are multiplied with values of a dtype, as float32."""
    if values == torch.int8:
        return (p * STEPS).round()
    if values == torch.float8_e4m3fn:
        return (p * LARGEST).to(torch.float8_e4m3fn).float()
    return p


def _finite(x: Tensor) -> Tensor:
    """Return 0 in the place of -inf, of rows that saw no key yet."""
    return x.masked_fill(x == -torch.inf, 0)


# y, q :: [b, h, m, d], k, v :: [b, h, n, d], mask as above  ->  y
@define(lambda y: [(y.shape, y.dtype)])
def straight_through_attention_reference(
    y: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Return y, whose gradient with respect to q, k and v is that of `scaled_dot_product_attention`: rounding counts as none."""
    return y.clone(memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, q, k, v, mask, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, mask)


def _backward(ctx: Any, gradient: Tensor) -> tuple:
    *inputs, mask = ctx.saved_tensors
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in inputs)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=ctx.causal, scale=ctx.scale)
        return None, *torch.autograd.grad(y, (q, k, v), gradient), None, None, None


torch.library.register_autograd("quantdit::straight_through_attention", _backward, setup_context=_keep, lib=LIBRARY)
