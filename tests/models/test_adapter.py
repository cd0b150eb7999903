"""Adapters: roles of linears, and what is derived for a class that nobody described."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from quantdit.compiling.compile import compile
from quantdit.compiling.plan import Plan
from quantdit.models.adapter import ADAPTERS, adapter_for, blocks, layers
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.presets import from_bits
from quantdit.recipes.rules import Recipe, Rule
from quantdit.recipes.sampling_plan import SamplingPlan


def test_every_linear_of_a_dit_has_a_role(pixel_dit: Path) -> None:
    transformer = load_pipeline(str(pixel_dit))[0].transformer
    found = layers(transformer, adapter_for(transformer))
    assert {layer.name for layer in found} == {n for n, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    roles = {layer.name.removeprefix("transformer_blocks.0."): layer.role for layer in found}
    assert roles["attn1.to_q"] == roles["attn1.to_out.0"] == "attention"
    assert roles["ff.net.0.proj"] == roles["ff.net.2"] == "feed_forward"
    assert roles["norm1.linear"] == "modulation"
    assert roles["norm1.emb.timestep_embedder.linear_1"] == "embedder"
    assert roles["proj_out_1"] == "outside"
    assert "other" not in roles.values()


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.ModuleList([nn.Linear(8, 8)])
        self.stack = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(3)])


def test_the_list_with_most_linears_of_an_unknown_class_is_taken_for_its_blocks() -> None:
    model = Unknown()
    adapter = adapter_for(model)
    assert adapter.blocks == ("stack",)
    assert [path for path, _ in blocks(model, adapter)] == ["stack.0", "stack.1", "stack.2"]
    assert {layer.name: layer.role for layer in layers(model, adapter)}["before.0"] == "outside"


class Blocks(nn.Module):
    """Two stacks of blocks, an adapter's light list, an embedder's own list, and lists inside blocks."""

    def __init__(self) -> None:
        super().__init__()

        def block(width: int) -> nn.Module:
            return nn.ModuleDict({"attn": nn.Linear(width, width), "ff": nn.ModuleList([nn.Sequential(nn.Linear(width, width))])})

        self.joint = nn.ModuleList([block(16)])
        self.single = nn.ModuleList([block(32) for _ in range(4)])
        self.projections = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(100)])
        self.embedder = nn.ModuleDict({"layers": nn.ModuleList([block(32) for _ in range(2)])})
        self.norms = nn.ModuleList([nn.LayerNorm(32) for _ in range(4)])


def test_all_outer_lists_of_heavy_blocks_are_taken_and_no_others() -> None:
    assert adapter_for(Blocks()).blocks == ("joint", "single")


def test_skipped_linears_are_no_layers() -> None:
    model = Blocks()
    adapter = replace(adapter_for(model), skip=("single.0.*", "embedder.layers.?.attn"))
    left_out = {layer.name for layer in layers(model, adapter_for(model))} - {layer.name for layer in layers(model, adapter)}
    assert left_out == {"single.0.attn", "single.0.ff.0.0", "embedder.layers.0.attn", "embedder.layers.1.attn"}


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has no list of blocks with linears"):
        adapter_for(nn.Sequential(nn.Linear(4, 4)))


def test_a_derived_adapter_compiles_like_a_written_one(pixel_dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for name in ("written", "derived"):
        if name == "derived":
            monkeypatch.delitem(ADAPTERS, "DiTTransformer2DModel")
        pipeline, source = load_pipeline(str(pixel_dit))
        settings = SamplingPlan(samples=2, steps=2)
        results.append(compile(pipeline, source, Plan(from_bits("w4a8"), settings), tmp_path / name).sha256)
    assert results[0] == results[1]


def test_blocks_see_what_the_quantized_blocks_before_them_left(pixel_dit: Path, tmp_path: Path) -> None:
    """The second block's statistics must change when the first is quantized coarsely: feedback needs the inputs it will get."""
    reports = []
    for first in ("dense", "int2"):
        rules = (Rule("transformer_blocks.0.*", weight=first), Rule("transformer_blocks.1.*", weight="int8"))
        ending = Rule("*", weight="dense")
        pipeline, source = load_pipeline(str(pixel_dit))
        torch.manual_seed(0)
        report = compile(
            pipeline, source, Plan(Recipe(first, (*rules, ending)), SamplingPlan(samples=2, steps=2)), tmp_path / first
        )
        reports.append(report.layers["transformer_blocks.1.attn1.to_q"]["rms"])
    assert reports[0] != reports[1]
