"""torch.set_default_dtype, which other people's scripts call, changes no tensor and no output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import quantdit
from quantdit.recipes.rules import Recipe, Rule

OTHERS = (torch.bfloat16, torch.float64)


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def recipe(*rules: Rule) -> Recipe:
    """Of the first block alone."""
    return Recipe("one of each", (Rule("transformer_blocks.1.*", "dense"), *rules, Rule("*", "dense")))


# Two or three kinds in each, so that every method, format and transform is run.
WITH_INPUTS = {
    "trained": recipe(Rule("*to_q", "vq256x4", activation_bits=8)),
    "rotations": recipe(
        Rule("*to_q", "int4", activation_bits=8, group_size=32, rotation="outlier", smooth="absmax"),
        Rule("*to_k", "table3", activation_bits=8, activation_scale="static", rotation="ars"),
        Rule("*to_v", "int4", activation_bits=4, activation_format="affine", activation_group_size=32, rotation="auto"),
    ),
    "codebooks": recipe(
        Rule("*to_q", "vq256x4", activation_bits=8, low_rank=4),
        Rule("*to_k", "table4", table="twin-log", activation_bits=8, smooth="rms"),
        Rule("*to_v", "ssvq256x8", activation_bits=16),
        Rule("*to_out.0", "trellis3_l10", activation_bits=8),
        Rule("*net.0.proj", "fp8_e4m3", activation_bits=8, activation_format="fp8", method="rtn"),
    ),
}
WITHOUT = ("w4a16", "w3a8", "w2a16", "w8a8")


def same(a: nn.Module, b: nn.Module) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for (key, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8)), key


def small(tiny) -> tuple[nn.Module, tuple[dict, ...]]:
    return tiny("DiTTransformer2DModel")


@pytest.mark.parametrize("name", WITH_INPUTS)
def test_quantizing_with_inputs(tiny, run, name: str):
    models = []
    for dtype in (torch.float32, *OTHERS):
        model, calls = small(tiny)
        steps = 1 if name == "trained" else None
        with default(dtype):
            quantdit.quantize(model, WITH_INPUTS[name], calls, finetune_steps=steps)
            y = run(model, calls[0])
        models.append(model)
        assert torch.equal(y, run(models[0], calls[0]))
        same(model, models[0])


@pytest.mark.parametrize("bits", WITHOUT)
def test_quantizing_without_inputs(tiny, run, bits: str):
    models = []
    for dtype in (torch.float32, *OTHERS):
        model, _ = small(tiny)
        with default(dtype):
            quantdit.quantize(model, bits)
        models.append(model)
        same(model, models[0])


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_loading_and_calling(made, run, dtype: torch.dtype):
    expected = run(made.cls.from_pretrained(made.folder / "one"), made.inputs[0])
    with default(dtype):
        for model in (made.cls.from_pretrained(made.folder / "one"), quantdit.load(made.folder / "one")):
            same(model, made.model)
            assert torch.equal(run(model, made.inputs[0]), expected)
        on_load = made.cls.from_pretrained(made.folder / "full", quantization_config=quantdit.QuantDiTConfig(bits="w4a8"))
    same(on_load, made.cls.from_pretrained(made.folder / "full", quantization_config=quantdit.QuantDiTConfig(bits="w4a8")))
