"""The attention kernel agrees with its definition: every kind of values, masks, causal, ragged numbers of tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quantdit.kernels.attention import attention8_reference
from quantdit.kernels.triton_ops import attention8 as kernel
from quantdit.kernels.triton_ops.tuning import Config
from quantdit.layers.quant_attention import attend
from quantdit.recipes.attention import AttentionSpec

VALUES = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn, "float16": torch.float16, "bfloat16": torch.bfloat16}


def made(b: int, h: int, m: int, n: int, d: int, values: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)

    def codes(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, generator=g, dtype=torch.int8)

    v = torch.randn(b, h, d, n, generator=g) * 20
    scales = [torch.rand(b, h, size, generator=g) * 0.02 + 0.005 for size in (m, n, d)]
    return [codes(b, h, m, d), codes(b, h, n, d), v.round().to(torch.int8) if values == torch.int8 else v.to(values), *scales]


def agrees(arguments: list, mask: Tensor | None = None, causal: bool = False, config: Config | None = None) -> None:
    expected = attention8_reference(*arguments, mask, causal, torch.float32)
    got = kernel.attention8(*arguments, mask, causal, torch.float32, capability=90, config=config)
    assert torch.isfinite(got).all()
    # A probability may round to the next of 255 steps; e4m3 has 8 a power of two.
    limit = {torch.float8_e4m3fn: 4e-3, torch.float16: 1e-3, torch.bfloat16: 5e-3}.get(arguments[2].dtype, 1e-3)
    assert float((got - expected).norm() / expected.norm()) < limit


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(("m", "n", "d"), [(70, 130, 64), (128, 64, 32)])
def test_every_kind_of_values(values: str, m: int, n: int, d: int) -> None:
    agrees(made(2, 1, m, n, d, VALUES[values]))


@pytest.mark.parametrize("config", {config for configs in kernel.CONFIGS.values() for config in configs})
def test_every_configuration(config: Config) -> None:
    agrees(made(1, 1, 96, 96, 64, torch.int8), config=config)


def test_masks_of_every_shape() -> None:
    arguments = made(2, 2, 33, 70, 32, torch.int8)
    g = torch.Generator().manual_seed(1)
    for shape in ((33, 70), (2, 1, 1, 70), (2, 2, 33, 70), (1, 2, 33, 1)):
        agrees(arguments, torch.randn(shape, generator=g))
    hidden = torch.zeros(2, 1, 33, 70)
    hidden[..., 10:] = -torch.inf
    hidden[1, :, 5] = -torch.inf  # a query that sees nothing
    agrees(arguments, hidden)
    assert not kernel.attention8(*arguments, hidden, False, torch.float32, capability=90)[1, :, 5].any()


def test_causal() -> None:
    agrees(made(1, 2, 150, 150, 32, torch.int8), causal=True)


def test_it_is_what_attention_runs_on_a_gpu(gpu: Callable[[int], None]) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 80, 64, generator=g) for _ in range(3))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    here = attend(q, k, v, AttentionSpec())
    gpu(90)
    there = attend(q, k, v, AttentionSpec())
    assert float((there - here).norm() / here.norm()) < 3e-3
    assert float((there - plain).norm() / plain.norm()) < 2e-2
