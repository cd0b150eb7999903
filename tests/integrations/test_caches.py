"""Caches of diffusers on quantized models: one that hooks nothing is said to, the others work as on any model."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from torch import nn

import quantdit
import tiny_models
from quantdit.models.adapter import adapter_for
from quantdit.models.prediction import prediction_of
from quantdit.models.synthetic import synthetic_inputs
from quantdit.system.files import Advice

NAMED = TaylorSeerCacheConfig(cache_identifiers=[r".*blocks\.\d+\.attn\d?"], disable_cache_before_step=1, cache_interval=3)


@pytest.fixture
def wan() -> nn.Module:
    return quantdit.quantize(tiny_models.tiny("WanTransformer3DModel")[0], "w4a8")


def test_a_cache_that_hooks_nothing_is_said_to(wan: nn.Module) -> None:
    with pytest.warns(Advice, match=r"TaylorSeerCacheConfig hooks no module of WanTransformer3DModel.*use_lite_mode=True"):
        wan.enable_cache(TaylorSeerCacheConfig())
    wan.disable_cache()
    full, _ = tiny_models.tiny("WanTransformer3DModel")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full.enable_cache(TaylorSeerCacheConfig())  # not ours
        for config in (NAMED, TaylorSeerCacheConfig(use_lite_mode=True), FirstBlockCacheConfig()):
            wan.enable_cache(config)
            wan.disable_cache()


def test_the_remedy_works(wan: nn.Module) -> None:
    size = tiny_models.tiny("WanTransformer3DModel")[1]

    def run() -> list[torch.Tensor]:
        outputs = []
        for time in (1000.0, 900.0, 800.0):
            inputs = synthetic_inputs(wan, adapter_for(wan), size, torch.Generator().manual_seed(0), time)
            with torch.no_grad(), wan.cache_context("cond"):
                outputs.append(prediction_of(wan(**inputs)))
        return outputs

    whole = run()
    wan.enable_cache(NAMED)
    made = run()
    assert torch.equal(made[0], whole[0])
    assert not torch.equal(made[1], whole[1])
