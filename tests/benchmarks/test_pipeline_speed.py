"""`quantdit bench pipeline`: the arithmetic, and a row for each variant of a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import quantdit
import tiny_models
from quantdit.benchmarks import pipeline_speed
from quantdit.benchmarks.pipeline_prediction import Speeds, flops_of, seconds_of, tokens_of
from quantdit.layers.quant_attention import modules_of
from quantdit.models.adapter import adapter_for
from quantdit.models.synthetic import synthetic_inputs
from quantdit.step_plans.forecasts import placed, polynomial


def test_products_are_counted_from_the_shapes() -> None:
    tokens = tokens_of(480, 832)
    assert tokens == 21 * 30 * 52
    linears, attention = flops_of("wan-1.3b", tokens)
    # 30 blocks: 4 square linears of self-attention, q and out of the other, two of 8960; text's k and v aside.
    assert linears == pytest.approx(2 * 30 * tokens * (6 * 1536**2 + 2 * 1536 * 8960) / 1e12, rel=0.01)
    assert attention == pytest.approx(4 * 30 * 1536 * tokens**2 / 1e12, rel=0.02)


def test_what_is_faster_makes_its_part_shorter_alone() -> None:
    speeds = Speeds(untouched=0.0)
    linears, attention = flops_of("wan-14b", 1000)
    assert seconds_of("wan-14b", 1000, speeds, True, False) == pytest.approx(linears / 1000 + attention / 550)
    assert seconds_of("wan-14b", 1000, speeds, False, True) == pytest.approx(linears / 650 + attention / 850)


def test_the_command_predicts(tmp_path: Path, cli) -> None:
    ran = cli("bench", "pipeline", "--predict", "--assume-w4a8", 650, "--output", tmp_path / "rows.jsonl")
    assert ran.code == 0, ran.err
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {(row["model"], row["size"]) for row in rows} == {(m, s) for m in ("wan-1.3b", "wan-14b") for s in ("480p", "720p")}
    assert all(row["w4a8"] == 1.0 and row["w4a8, step plan"] == 2.0 for row in rows)
    assert "650 (W4A8)" in ran.out


def test_every_variant_has_a_row_and_leaves_the_model_as_it_was() -> None:
    model, size = tiny_models.tiny("WanTransformer3DModel")
    quantdit.quantize(model, "w4a8")
    steps = pipeline_speed.STEPS
    times = [1000.0 - 10 * i for i in range(steps)]
    calls = [synthetic_inputs(model, adapter_for(model), size, torch.Generator().manual_seed(0), t) for t in times]
    counted = []

    def sample() -> None:
        for call in calls:
            model(**call)
        counted.append(1)

    plan = polynomial("taylor1", times, placed(steps, steps // 2))
    rows = list(pipeline_speed.rows_of(pipeline_speed.Case("tiny", 1, sample, sample, model, plan)))
    assert [row["variant"] for row in rows] == [pipeline_speed.FULL, *pipeline_speed.VARIANTS]
    assert [row["steps_computed"] for row in rows] == [steps, steps, steps, steps // 2, steps // 2]
    assert len(counted) == 1 + 5 * pipeline_speed.ROUNDS
    assert not model.attention_specs
    assert all(module.processor._attention_backend is None for module in modules_of(model).values())
