"""Damage done on purpose to a quantized transformer, each of a kind that a mistake in a quantizer or a loader makes.

Every function of DAMAGES takes the quantized transformer, which it changes, the original one, and a random generator that
chooses the place.
"""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import Tensor, nn

from quantdit.calibration.quantize import WeightOptions, quantize_weight
from quantdit.checkpoints import checkpoint
from quantdit.layers.quant_linear import QuantLinear
from quantdit.tensors import transform
from quantdit.tensors.layer_spec import ActivationSpec, LayerSpec
from quantdit.tensors.transform import Transform

GROUP = 32
INT2_GROUP = 64


def int2_block(quantized: nn.Module, original: nn.Module, chance: random.Random) -> str:
    """Give all linears of one block 2-bit weights."""
    blocks = sorted({_block(name) for name in _inside(quantized)})
    chosen = chance.choice(blocks)
    for name, layer in _inside(quantized).items():
        if _block(name) == chosen:
            _put(quantized, name, _rounded(layer, original.get_submodule(name), "int2", INT2_GROUP))
    return chosen


def layer_scale(quantized: nn.Module, original: nn.Module, chance: random.Random) -> str:
    """Double or halve the scale of one layer."""
    name, factor = chance.choice(list(_inside(quantized))), chance.choice((0.5, 2.0))
    quantized.get_submodule(name).scale.mul_(factor)
    return f"{name} x {factor:g}"


def group_order(quantized: nn.Module, original: nn.Module, chance: random.Random) -> str:
    """Read one layer's group multipliers and offsets, stored [out, groups], as if they were [groups, out].

    The layer is stored as int4 in groups of GROUP first, since level tables have no groups.
    """
    name = chance.choice(list(_inside(quantized)))
    layer = _rounded(quantized.get_submodule(name), original.get_submodule(name), "int4", GROUP)
    for field in (layer.multiplier, layer.offset):
        field.copy_(field.flatten().reshape(field.shape[1], field.shape[0]).T.clone())
    _put(quantized, name, layer)
    return name


def rotation_signs(quantized: nn.Module, original: nn.Module, chance: random.Random) -> str:
    """Give one layer's rotation the random signs of another seed: half of them are wrong."""
    name = chance.choice([n for n, layer in _inside(quantized).items() if layer.layer_spec.rotation == "hadamard"])
    signs = quantized.get_submodule(name).premultiplier
    draw = torch.Generator().manual_seed(chance.randrange(2**31))
    signs.mul_(1 - 2 * torch.randint(2, signs.shape, generator=draw, dtype=torch.int8).to(signs.dtype))
    return name


def one_sign(quantized: nn.Module, original: nn.Module, chance: random.Random) -> str:
    """Turn round the sign of one channel of one layer: the least damage, none at all where the channel is silent."""
    name = chance.choice([n for n, layer in _inside(quantized).items() if layer.layer_spec.rotation == "hadamard"])
    layer = quantized.get_submodule(name)
    channel = chance.randrange(layer.in_features)
    layer.premultiplier[channel] *= -1
    return f"{name} channel {channel}"


def unrotated_w4a4(quantized: nn.Module, original: nn.Module, chance: random.Random) -> str:
    """Round all weights and activations of the blocks to 4 bits without a rotation; the modulation's inputs stay as they are."""
    for name, layer in _inside(quantized).items():
        bits = 4 if layer.layer_spec.activation.bits < 16 else 16
        plain = _rounded(layer, original.get_submodule(name), "int4", layer.in_features, Transform(), ActivationSpec(bits))
        _put(quantized, name, plain)
    return "all blocks"


DAMAGES = {
    "int2 block": int2_block,
    "scale x 2": layer_scale,
    "group order": group_order,
    "rotation signs": rotation_signs,
    "one sign of one channel": one_sign,
    "w4a4 unrotated": unrotated_w4a4,
}


def _inside(transformer: nn.Module) -> dict[str, QuantLinear]:
    """Return the quantized linears of the blocks."""
    return {name: layer for name, layer in checkpoint.quant_layers(transformer).items() if "blocks." in name}


def _block(name: str) -> str:
    words = name.split(".")
    return ".".join(words[: next(i for i, word in enumerate(words) if word.endswith("blocks")) + 2])


def _rounded(
    like: QuantLinear,
    source: nn.Linear,
    format: str,
    group_size: int,
    t: Transform | None = None,
    activation: ActivationSpec | None = None,
) -> QuantLinear:
    """Return a layer with `source`'s weight rounded to nearest; transform and activations of `like` if not given."""
    t = like.transform if t is None else t
    W = transform.apply_to_weight(t, source.weight.detach().float())
    q = quantize_weight(W, torch.eye(W.shape[1]), format, group_size, "rtn", WeightOptions("gaussian"))
    activation = like.layer_spec.activation if activation is None else activation
    spec = replace(LayerSpec(q.spec, activation), rotation=t.kind, block=t.rotation_block, smoothed=t.smoothed, steps=t.steps)
    tensors: dict[str, Tensor] = {k: v.clone() for k, v in (q.tensors() | transform.tensors(t)).items()}
    return QuantLinear.from_tensors(spec, tensors, source.bias if like.bias is None else like.bias)


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
