"""Inputs of a transformer made up from its adapter, and the few steps around them that a sampler needs: no pipeline, no data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantdit.models.adapter import Adapter, Input, likely_inputs
from quantdit.recipes.sampling_plan import Size

TRAIN_STEPS = 1000
PIXELS_PER_CELL = 8
# Of the random token states: degrees of freedom of Student's t, how many channels stand out, and by how much. Language models'
# hidden states have a few such channels in thousands.
TAIL = 4.0
OUTLIER_EVERY = 512
OUTLIER_SCALE = 20.0


@dataclass(frozen=True)
class _Context:
    """What the inputs of one call share: sizes by name, and where each prompt ends."""

    model: nn.Module
    size: Size
    time: float
    lengths: Tensor  # [batch] int64
    generator: torch.Generator


def synthetic_inputs(
    model: nn.Module, adapter: Adapter, size: Size, generator: torch.Generator, time: float = TRAIN_STEPS - 1
) -> dict[str, Any]:
    """Return keyword arguments for one call of the model's forward, as its pipeline would pass them; the values are random.

    Only the model's config, dtype and classes of its modules are read: it may be on the meta device. Tensors are on the
    generator's device. The same generator state gives the same inputs.

    Args:
        model: the transformer.
        adapter: its adapter.
        size: batch, latent and text sizes. Where the class fixes one (Latte's frames, CogVideoX's text), that one is used.
        generator: where the randomness comes from.
        time: 1000 is noise, 0 is data.

    Raises:
        ValueError: the class is unknown and its forward takes an argument whose name tells nothing; or a size that the class
            cannot take.
    """
    if not adapter.inputs:
        raise ValueError(_unknown_inputs(model))
    longest = max(1, size.tokens)
    lengths = torch.randint((longest + 1) // 2, longest + 1, (size.batch,), generator=generator, device=generator.device)
    # One prompt fills the row: pipelines pad to the longest.
    lengths[0] = longest
    context = _Context(model, size, time, lengths, generator)
    return _nested({spec.name: _make(spec, context) for spec in adapter.inputs if not spec.when or _field(model, spec.when)})


def latent_of(adapter: Adapter, inputs: dict[str, Any]) -> Tensor:
    """Return the noisy sample among the inputs, `[batch, ...]`."""
    spec = _latent_spec(adapter)
    value = inputs[spec.name]
    return torch.stack(value) if spec.listed else value


def moved_inputs(model: nn.Module, adapter: Adapter, inputs: dict[str, Any], latent: Tensor, time: float) -> dict[str, Any]:
    """Return the inputs with another sample and time (1000 is noise, 0 is data)."""
    moved = dict(inputs)
    for spec in adapter.inputs:
        if spec.kind == "latent":
            moved[spec.name] = list(latent.unbind(0)) if spec.listed else latent
        elif spec.kind in ("timestep", "reversed_timestep"):
            moved[spec.name] = _timestep(spec, model, time, inputs[spec.name])
    return moved


def without_condition(model: nn.Module, adapter: Adapter, inputs: dict[str, Any], first: int) -> dict[str, Any]:
    """Return the inputs with the class after the last one, which stands for none, in the rows from `first` on."""
    made = dict(inputs)
    for spec in adapter.inputs:
        if spec.kind == "classes":
            made[spec.name] = made[spec.name].clone()
            made[spec.name][first:] = _number(spec.value, model)
    return made


def own_time(model: nn.Module, adapter: Adapter, time: float) -> float:
    """Return a time (1000 is noise, 0 is data) as the class counts it.

    Raises:
        ValueError: nothing is known of the class's time.
    """
    spec = next((spec for spec in adapter.inputs if spec.kind in ("timestep", "reversed_timestep")), None)
    if spec is None:
        raise ValueError(f"nothing is known of the time that {type(model).__name__} takes")
    return float(_timestep(spec, model, time, torch.empty((), dtype=torch.float64)))


def prediction(adapter: Adapter, output: Any, latent: Tensor) -> Tensor:
    """Return what a scheduler takes from the output of forward: float32, of the latent's shape and the usual sign.

    A learned variance behind the prediction is left out. Channels that only condition (an image beside the noise) have no
    prediction and get 0, so they stay. Classes that count time from noise to data predict data minus noise: turned around.
    """
    sample = getattr(output, "sample", None)
    value = output[0] if sample is None else sample
    value = (torch.stack(list(value)) if isinstance(value, list | tuple) else value).float()
    spec = _latent_spec(adapter)
    channels = spec.shape.index("in_channels")
    wanted, found = latent.shape[channels], value.shape[channels]
    if found > wanted:
        value = value.narrow(channels, 0, wanted)
    elif found < wanted:
        shape = list(latent.shape)
        shape[channels] = wanted - found
        value = torch.cat([value, value.new_zeros(shape)], dim=channels)
    return -value if any(spec.kind == "reversed_timestep" for spec in adapter.inputs) else value


def _unknown_inputs(model: nn.Module) -> str:
    name = type(model).__name__
    arguments = ", ".join(likely_inputs(model)[1])
    return (
        f"{name}: nothing is known of what its forward takes as {arguments}, so its inputs cannot be made up. Give the whole"
        f" pipeline's folder, whose own calls are recorded, or add {name} with its inputs to ADAPTERS in"
        " quantdit/models/adapter.py"
    )


def _latent_spec(adapter: Adapter) -> Input:
    return next(spec for spec in adapter.inputs if spec.kind == "latent")


def _nested(inputs: dict[str, Any]) -> dict[str, Any]:
    """Turn entries `a.b` into dictionaries."""
    nested: dict[str, Any] = {}
    for name, value in inputs.items():
        outer, dot, inner = name.partition(".")
        if dot:
            nested.setdefault(outer, {})[inner] = value
        else:
            nested[name] = value
    return nested


def _make(spec: Input, context: _Context) -> Any:
    size, generator = context.size, context.generator
    shape = tuple(_dimension(name, context) for name in spec.shape)
    dtype = _dtype(spec, context.model)
    device = generator.device
    if spec.kind == "size":
        return shape[0]
    if spec.kind == "constant" and not shape:
        return spec.value
    if spec.kind == "grid_shapes":
        return [[(size.frames, size.height // 2, size.width // 2)]] * size.batch
    if spec.kind == "rotary":
        return _rotary(context)
    if spec.kind in ("timestep", "reversed_timestep"):
        return _timestep(spec, context.model, context.time, torch.empty(shape, dtype=dtype, device=device))
    if spec.kind in ("latent", "pooled"):
        made = torch.randn(shape, generator=generator, device=device) * float(spec.value)
    elif spec.kind in ("text", "padded_text"):
        made = _heavy_tailed(shape, generator) * float(spec.value)
        if spec.kind == "padded_text":
            made = made * _mask(shape[:2], context).unsqueeze(-1)
    elif spec.kind == "mask":
        made = _mask(shape, context)
    elif spec.kind == "classes":
        made = torch.randint(0, _number(spec.value, context.model), shape, generator=generator, device=device)
    elif spec.kind == "grid_ids":
        made = _grid_ids(shape, size).to(device)
    elif spec.kind == "token_ids":
        made = torch.zeros(shape, device=device)
        made[..., -1] = torch.arange(shape[-2], device=device)
    elif spec.kind == "pixels":
        made = torch.tensor([[size.height, size.width]], device=device).expand(shape) * PIXELS_PER_CELL
    elif spec.kind == "zeros":
        made = torch.zeros(shape, device=device)
    elif spec.kind == "constant":
        made = torch.full(shape, float(spec.value), device=device)
    else:
        raise ValueError(f"input {spec.name} has the unknown kind {spec.kind!r}")
    made = made.to(dtype).contiguous()
    return list(made.unbind(0)) if spec.listed else made


def _dimension(name: str | int, context: _Context) -> int:
    if isinstance(name, int):
        return name
    size = context.size
    patches = size.frames * (size.height // 2) * (size.width // 2)
    derived = {
        "cells": size.frames * size.height * size.width,
        "patches": patches,
        "tokens+patches": size.tokens + patches,
    }
    if name in derived:
        return derived[name]
    return getattr(size, name) if hasattr(size, name) else _number(name, context.model)


def _number(value: Any, model: nn.Module) -> Any:
    """Return a number, or the config field of this name."""
    return _field(model, value) if isinstance(value, str) else value


def _field(model: nn.Module, name: str) -> Any:
    # A class may decide on a field that its config leaves open, and keep the decision as an attribute (PixArt).
    found = vars(model).get(name)
    return getattr(getattr(model, "config", None), name, None) if found is None else found


def _dtype(spec: Input, model: nn.Module) -> torch.dtype:
    if spec.dtype != "model":
        return getattr(torch, spec.dtype)
    # Not the first parameter's: diffusers keeps a few tables and norms in float32.
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.dtype.is_floating_point:
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def _timestep(spec: Input, model: nn.Module, time: float, like: Tensor) -> Tensor:
    """Return `time` as the class counts it, of the shape, dtype and device of `like`; whole numbers are rounded."""
    own = TRAIN_STEPS - time if spec.kind == "reversed_timestep" else time
    own *= _number(spec.value, model)
    return torch.full_like(like, own if like.dtype.is_floating_point else round(own))


def _heavy_tailed(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return Student's t values of unit variance in which some channels are far larger; `shape` ends in the channels."""
    device = generator.device
    normal = torch.randn(shape, generator=generator, device=device)
    # Chi-squared with an even number of degrees of freedom is a sum of exponentials, which torch draws with a generator.
    uniform = torch.rand((*shape, int(TAIL) // 2), generator=generator, device=device).clamp_min(1e-7)
    chi_squared = -2 * uniform.log().sum(-1)
    values = normal * (TAIL / chi_squared).sqrt() * math.sqrt((TAIL - 2) / TAIL)
    channels = shape[-1]
    scale = torch.randn(channels, generator=generator, device=device).mul(0.3).exp()
    chosen = torch.randperm(channels, generator=generator, device=device)[: max(1, channels // OUTLIER_EVERY)]
    scale[chosen] *= OUTLIER_SCALE
    return values * scale


def _mask(shape: tuple[int, ...], context: _Context) -> Tensor:
    """Return [batch, columns] of 1 to the end of each prompt, 0 to the end of the text, and 1 for what follows the text."""
    columns = torch.arange(shape[1], device=context.lengths.device)
    return ((columns < context.lengths.unsqueeze(1)) | (columns >= max(1, context.size.tokens))).float()


def _grid_ids(shape: tuple[int, ...], size: Size) -> Tensor:
    """Return [..., patches, columns] with the row of each 2 x 2 patch in column 1 and its column in column 2."""
    ids = torch.zeros(size.frames, size.height // 2, size.width // 2, shape[-1])
    ids[..., 1] = torch.arange(size.height // 2).unsqueeze(1)
    ids[..., 2] = torch.arange(size.width // 2)
    return ids.reshape(shape[-2:]).expand(shape)


def _rotary(context: _Context) -> tuple[Tensor, Tensor]:
    """Return CogVideoX's cosines and sines, `[patches, head width]` each, as its pipeline computes them."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    config: Any = context.model.config
    size = context.size
    patch, patch_t = config.patch_size, config.patch_size_t
    grid = (size.height // patch, size.width // patch)
    whole = (config.sample_height // patch, config.sample_width // patch)
    settings: dict[str, Any] = {"embed_dim": config.attention_head_dim, "grid_size": grid, "device": context.generator.device}
    if patch_t is None:
        crops = get_resize_crop_region_for_grid(grid, whole[1], whole[0])
        return _pair(get_3d_rotary_pos_embed(crops_coords=crops, temporal_size=size.frames, **settings))
    frames = (size.frames + patch_t - 1) // patch_t
    return _pair(get_3d_rotary_pos_embed(crops_coords=None, temporal_size=frames, grid_type="slice", max_size=whole, **settings))


def _pair(rotary: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    assert isinstance(rotary, tuple)  # cosines and sines, as asked for
    return rotary
