"""The benchmark refuses to time what is wrong, and its rows say what was measured."""

from __future__ import annotations

import pytest
import torch

from quantdit import bench


def test_a_wrong_layer_is_not_timed() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    layer = bench.quant_linear(weight, "w4a8", cached=True)
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    bench.gate_linear(layer, x)
    layer.decoded()[0, 0] += 1
    with pytest.raises(ValueError, match="is wrong by"):
        bench.gate_linear(layer, x)


def test_rows_compare_with_float32_of_the_same_run() -> None:
    rows = bench.rows_for(32, 64, 128, rounds=1, products=True)
    assert rows[0]["what"] == "F.linear float32" and rows[0]["times_float32"] == 1
    exact = {row["what"]: row["exact"] for row in rows if "exact" in row}
    # The routine that quantdit uses must be exact on every machine; the others are what they are.
    assert exact["int8 product: chosen: cpu.scaled_int8_product"]
    assert exact["int8 product: float32 in exact chunks"]
