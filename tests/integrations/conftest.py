"""Tiny transformers of three classes, quantized in memory and saved as diffusers saves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quantdit
import tiny_models
from quantdit.models.adapter import adapter_for
from quantdit.models.prediction import prediction_of
from quantdit.models.synthetic import synthetic_inputs
from quantdit.recipes.rules import Recipe, Rule

CLASSES = ("WanTransformer3DModel", "FluxTransformer2DModel", "DiTTransformer2DModel")
TIMES = (999.0, 500.0, 20.0)
# Integers with groups, tables, codebooks of vectors, trellis codes, fp8; every rotation, smoothing, low rank, static scales,
# 16-bit activations.
PLAN = Recipe(
    "downstream",
    (
        Rule("role:outside", "dense", optional=True),
        Rule("*to_q", "int4", activation_bits=8, group_size=32, cd_passes=0),
        Rule("*to_k", "table3", activation_bits=8, low_rank=4, rotation="hadamard", method="rtn"),
        Rule("*to_v", "vq256x4", activation_bits=16, method="rtn"),
        Rule("*blocks.0.*to_out.0", "trellis3_l10", activation_bits=8, method="rtn"),
        Rule("*net.0.proj", "fp8_e4m3", activation_bits=8, activation_format="fp8", method="rtn"),
        Rule("*net.2", "int8", activation_bits=8, activation_scale="static", rotation="outlier", smooth="absmax", method="rtn"),
        Rule("*", "table4", activation_bits=4, activation_format="affine", activation_group_size=32, method="rtn"),
    ),
)


@dataclass(frozen=True)
class Made:
    """A transformer in full precision and quantized.

    Attributes:
        name: of its class.
        model: quantized, in memory. Read only.
        folder: with the full-precision one in `full`, the quantized one in `one` file and in `many`.
        inputs: keyword arguments of three calls.
    """

    name: str
    model: nn.Module
    folder: Path
    inputs: tuple[dict, ...]

    @property
    def cls(self) -> type:
        """The class in diffusers."""
        return type(self.model)


def output(model: nn.Module, inputs: dict) -> Tensor:
    """Return what the model returns for inputs cast to its dtype."""
    dtype = model.dtype
    cast = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() and k != "timestep" else v for k, v in inputs.items()
    }
    with torch.no_grad():
        return prediction_of(model(**cast))


@pytest.fixture(scope="session")
def run() -> Callable[[nn.Module, dict], Tensor]:
    return output


def calls(model: nn.Module, size: object) -> tuple[dict, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(synthetic_inputs(model, adapter_for(model), size, generator, time) for time in TIMES)


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], tuple[nn.Module, tuple[dict, ...]]]:
    """Return a full-precision model of a class and three calls of it."""

    def build(name: str) -> tuple[nn.Module, tuple[dict, ...]]:
        model, size = tiny_models.tiny(name)
        return model, calls(model, size)

    return build


@pytest.fixture(scope="session", params=CLASSES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    model, size = tiny_models.tiny(request.param)
    folder, inputs = tmp_path_factory.mktemp(request.param), calls(model, size)
    model.save_pretrained(folder / "full")
    quantdit.quantize(model, PLAN, inputs)
    model.save_pretrained(folder / "one")
    model.save_pretrained(folder / "many", max_shard_size="50KB")
    return Made(request.param, model, folder, inputs)
