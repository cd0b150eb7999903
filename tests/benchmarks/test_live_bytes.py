"""What is counted as live bytes is what torch's allocator gives out, and what a kernel's scratch memory is said to be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quantdit.benchmarks.live_bytes import measured, predicted, quantized_linear
from quantdit.kernels import ops


class Steps(nn.Module):
    """A linear of 256 to 512 and back, some of whose outputs outlive it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(256, 512), nn.Linear(512, 256)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.relu(self.up(x))  # 2 x 512 a token at once
        kept = wide[:, :256]  # a view
        return self.down(wide) + kept + self.up.weight[0, :256]


def test_counted_bytes_are_those_of_the_allocator() -> None:
    x, model = torch.randn(64, 256, dtype=torch.float32), Steps()
    found = measured(lambda: model(x))
    assert found == 4 * 64 * (512 + 512), "the linear's output and relu's; then relu's and twice 256"
    model.to("meta")

    inputs = x.to("meta")
    assert predicted(model, lambda: model(inputs)) == found


def test_views_of_weights_and_what_is_gone_do_not_count() -> None:
    model = nn.Linear(16, 16, device="meta")
    assert predicted(model, lambda: model.weight.T[:4]) == 0
    x = torch.empty(8, 16, device="meta", dtype=torch.float32)

    def chain() -> Tensor:
        y = x
        for _ in range(5):
            y = y + 1
        return y

    assert predicted(model, chain) == 2 * x.nbytes


def test_attention_keeps_no_scores() -> None:
    q = torch.empty(1, 2, 4096, 32, device="meta", dtype=torch.bfloat16)
    attend = nn.functional.scaled_dot_product_attention

    def call() -> Tensor:
        y = attend(q, q, q)
        assert y.shape == q.shape
        return y.transpose(1, 2).flatten(2)

    assert predicted(nn.Identity(), call) == q.nbytes


def test_a_convolution_copies_what_it_takes_and_gives() -> None:
    conv = nn.Conv2d(4, 8, 3, padding=1, bias=False, device="meta", dtype=torch.bfloat16)
    x = torch.empty(1, 4, 16, 16, device="meta", dtype=torch.bfloat16)
    y = 2 * 8 * 16 * 16
    assert predicted(conv, lambda: conv(x)) == x.nbytes + conv.weight.nbytes + 2 * y


def test_a_quantized_linear_takes_what_its_parts_take() -> None:
    """The definitions, which run where no kernel does, measured here."""
    m, n, k = 256, 384, 512
    x, weight = torch.randn(m, k).bfloat16(), torch.randint(-127, 128, (n, k), dtype=torch.int8)
    rotating = measured(lambda: ops.rotate_reference(x, torch.rand(k) + 0.5, 128)) - 2 * 4 * k
    assert rotating <= 10 * m * k <= rotating + 4 * 2 * k
    assert quantized_linear(m, n, k, "int8", 8) == 10 * m * k
    many = 40_000  # tokens, rotated in five parts
    codes, chunk = many * (k + 4), many // 5 * k
    assert quantized_linear(many, 1, k, "int8", 8) == codes + 10 * chunk
    assert quantized_linear(many, 1, k, "int8", 16) == max(2 * many * k + 10 * chunk, 2 * many * k + 9 * k)
    multiplying = measured(lambda: ops.gemm_w8a16_reference(x[:8], weight, torch.ones(n), None))
    assert multiplying == pytest.approx(8 * n * k, rel=0.01)
    assert quantized_linear(8, n, 4 * k, "trellis2_l12", 16) == 2 * 8 * 4 * k + 9 * n * 4 * k, "and the decoded weight itself"


def test_a_quantized_linear_counts_in_its_model() -> None:
    model = Steps().to("meta")
    x = torch.empty(64, 256, device="meta", dtype=torch.float32)
    dense, quantized = (predicted(model, lambda: model(x), kinds) for kinds in ({}, {"down": ("int8", 8)}))
    relu = 4 * 64 * 512
    assert dense == 2 * relu and quantized == relu + 10 * 64 * 512
