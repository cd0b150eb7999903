"""Attention modules of diffusers that compute in 8 bits, through its dispatcher (`diffusers/models/attention_dispatch.py`).

Processors of many classes name a backend that computes attention. Ours is one for each AttentionSpec, set for one module alone,
so that neither other modules nor the process-wide backend change. What is private in diffusers is touched in `backend_of` alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from quantdit.formats.float8 import LARGEST
from quantdit.kernels import attention as definition  # noqa: F401 - defines the op
from quantdit.kernels.triton_ops import dispatch
from quantdit.recipes.attention import AttentionRule, AttentionSpec, resolve
from quantdit.tensors.hadamard import block_size

FIELD = "_attention_backend"  # of processors that go through the dispatcher
INT8 = 127
LIBRARY = "sageattention"


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attention modules of a model that go through diffusers' dispatcher, by their paths."""
    found = ((name, module, getattr(module, "processor", None)) for name, module in model.named_modules())
    return {name: module for name, module, processor in found if processor is not None and hasattr(type(processor), FIELD)}


def attention_of(rules: Sequence[AttentionRule], transformer: nn.Module) -> dict[str, AttentionSpec]:
    """Return which attention modules of a transformer rules have compute in 8 bits, by their paths.

    Raises:
        ValueError: a rule matches none, or the class computes attention by itself.
    """
    if not rules:
        return {}
    known = modules_of(transformer)
    if not known:
        raise ValueError(
            f"{type(transformer).__name__} computes attention by itself, not through diffusers' dispatcher, so it has no 8-bit"
            " attention; leave out --attention (the recipe's [[attention]]). Wan, FLUX, FLUX.2, Qwen-Image, LTX, Chroma,"
            " HunyuanVideo and Z-Image have it"
        )
    return resolve(rules, known)


def put(model: nn.Module, specs: Mapping[str, AttentionSpec]) -> None:
    """Have attention modules of a model compute in 8 bits; `model.attention_specs` says which do.

    Args:
        model: a transformer of diffusers.
        specs: by the paths of its modules. Modules that are not named stay as they are.

    Raises:
        ValueError: a module that there is not, or that does not go through the dispatcher.
    """
    if not specs:
        return
    known = modules_of(model)
    for name, spec in specs.items():
        if name not in known:
            raise ValueError(
                f"{type(model).__name__} has no attention module {name!r:.80} that goes through diffusers' dispatcher"
            )
        processor: Any = copy.copy(known[name].processor)  # modules may share one
        setattr(processor, FIELD, backend_of(spec))
        known[name].processor = processor
    model.attention_specs = dict(getattr(model, "attention_specs", {})) | dict(specs)  # pyright: ignore[reportArgumentType] - no tensor


def take_away(model: nn.Module) -> None:
    """Have all attention modules of a model compute as its class does."""
    known = modules_of(model)
    for name in getattr(model, "attention_specs", {}):
        setattr(known[name].processor, FIELD, None)
    model.attention_specs = {}  # pyright: ignore[reportArgumentType]


@lru_cache(maxsize=64)
def backend_of(spec: AttentionSpec) -> Any:
    """Return the backend of diffusers' dispatcher that computes as a spec says, entered into its table."""
    from diffusers.models import attention_dispatch as theirs

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        heads = query.shape[2] // key.shape[2] if enable_gqa else 1
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [b, h, tokens, d]
        k, v = (x.repeat_interleave(heads, 1) if heads > 1 else x for x in (k, v))
        return attend(q, k, v, spec, attn_mask, is_causal, scale).transpose(1, 2)

    label = f"quantdit {spec}".replace(" ", "_")
    cls = theirs.AttentionBackendName
    backend = str.__new__(cls, label)
    backend._name_, backend._value_ = label.upper(), label
    cls._value2member_map_[label] = backend
    theirs._AttentionBackendRegistry.register(backend)(attention)
    return backend


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Return `softmax(scale q k^T + mask) v`, computed as a spec says.

    Args:
        q: `[b, h, m, d]` float.
        k: `[b, h, n, d]`.
        v: the same.
        spec: of the module.
        mask: bool (True is seen) or float (added), broadcast to `[b, h, m, n]`.
        causal: a query sees no later key.
        scale: None is 1 / sqrt(d).

    Returns:
        `[b, h, m, d]` in q's dtype.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    added = None if mask is None else _added(mask, q.dtype)
    with torch.no_grad():
        y = _computed(q, k, v, spec, added, causal, scale)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return torch.ops.quantdit.straight_through_attention(y, q, k, v, added, causal, scale)
    return y


def _computed(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Return what `attend` does, without a gradient."""
    pv = _values_of(spec, q.shape[2], k.shape[2])
    if pv == "auto" and (library := _library(q, mask)) is not None:
        return library(q, k, v, tensor_layout="HND", is_causal=causal, sm_scale=scale)
    keys = k.float() - k.float().mean(2, keepdim=True) if spec.smooth else k
    (q8, q_scale), (k8, k_scale) = (_codes(x, spec.rotate) for x in (q, keys))
    v8, v_scale, mean = _values(v, "uint8" if pv == "auto" else pv, spec.smooth)
    y = torch.ops.quantdit.attention8(q8, k8, v8, q_scale * scale, k_scale, v_scale, mask, causal, torch.float32)
    return (y if mean is None else y + mean).to(q.dtype)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as it is added to scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)


def _codes(x: Tensor, rotate: bool) -> tuple[Tensor, Tensor]:
    """Return int8 codes `[b, h, tokens, d]` and their scales `[b, h, tokens]`."""
    tokens, width = x.reshape(-1, x.shape[-1]), x.shape[-1]
    if rotate:
        signs = torch.ones(width, dtype=torch.int8, device=x.device)
        codes, scale, _ = torch.ops.quantdit.rotate_quantize(tokens, signs, block_size(width), "int", 8, 0, None, None)
    else:
        codes, scale = torch.ops.quantdit.quantize_tokens(tokens, 8, 0, False, None)
    return codes.reshape(x.shape), scale.reshape(x.shape[:-1])


def _values_of(spec: AttentionSpec, queries: int, keys: int) -> str:
    """Return how values are computed with.

    `auto` leaves those of text alone, which has fewer keys than there are queries: their products cost little, and emoji-wan's
    cross-attention is 71.3 dB from float32 with them in floats, 39.3 in uint8 and 39.0 in e4m3 (4 clips, seed 1).
    """
    return "none" if spec.pv == "auto" and keys < queries else spec.pv


def _values(v: Tensor, pv: str, smooth: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the values by channel `[b, h, d, tokens]`, the channels' scales `[b, h, d]`, and the mean that was taken off."""
    if pv == "none":
        return v.mT.contiguous(), torch.ones(*v.shape[:2], v.shape[3], dtype=torch.float32, device=v.device), None
    by_channel = v.float().mT
    mean = by_channel.mean(3, keepdim=True) if smooth else None
    centred = by_channel if mean is None else by_channel - mean
    largest = LARGEST if pv == "fp8" else INT8
    scale = centred.abs().amax(3) / largest
    codes = centred / scale.masked_fill(scale == 0, 1)[..., None]
    codes = codes.clamp(-largest, largest).to(torch.float8_e4m3fn) if pv == "fp8" else codes.round().to(torch.int8)
    return codes.contiguous(), scale, None if mean is None else mean.mT


def _library(q: Tensor, mask: Tensor | None) -> Callable | None:
    """Return SageAttention's function where it is installed: on a GPU, without a mask."""
    if mask is not None or not dispatch.on_gpu(q) or find_spec(LIBRARY) is None:
        return None
    from sageattention import sageattn  # pyright: ignore[reportMissingImports] - of an optional package

    return sageattn
