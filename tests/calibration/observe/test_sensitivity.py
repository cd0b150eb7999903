"""Sensitivities: what is predicted of a layer is what happens to the model, and the model is left as it was found."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from quantdit.calibration.layer import quantize_layer
from quantdit.calibration.observe import block_order, capture, sensitivity
from quantdit.calibration.observe.recorded_calls import Call
from quantdit.calibration.observe.sensitivity import MeasuredBlock
from quantdit.layers.quant_linear import QuantLinear
from quantdit.models import adapter as adapters
from quantdit.pipelines.generate import generate
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.presets import from_bits
from quantdit.recipes.resolve import options
from quantdit.recipes.rules import WEIGHTS, LayerPlan
from quantdit.tensors.layer_spec import as_stored

BLOCK = "transformer_blocks.1"


@dataclass(frozen=True)
class Found:
    """A tiny model, its calls, one of its blocks, and the sensitivities of that block's layers."""

    transformer: nn.Module
    calls: list[Call]
    part: MeasuredBlock
    plans: dict[str, dict[str, LayerPlan]]
    result: dict[str, dict[str, dict]]


def build(made) -> QuantLinear:
    return QuantLinear.from_tensors(made.spec, made.tensors, made.bias)


def layers_of(transformer: nn.Module, bits: str) -> dict[str, dict[str, LayerPlan]]:
    return options(from_bits(bits), adapters.layers(transformer, adapters.adapter_for(transformer)))


def part_of(transformer: nn.Module, module: nn.Module, calls: list[Call], names: list[str]) -> MeasuredBlock:
    linears = {name: transformer.get_submodule(name) for name in names}
    stats = {}
    with capture.collecting(linears, 4, stats) as set_bucket:
        for call in calls:
            set_bucket(call.bucket)
            block_order.run_call(module, call)
    return MeasuredBlock(module, linears, calls, stats)


@pytest.fixture(scope="module")
def found(pixel_dit: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    torch.manual_seed(0)
    pipeline, _ = load_pipeline(str(pixel_dit))
    transformer = pipeline.transformer.eval()
    folder, part = tmp_path_factory.mktemp("calls"), {"transformer": transformer}
    calls = list(capture.transformer_calls(lambda: generate(pipeline, 4, 0, 4), part, 4, 4, folder)["transformer"])
    plans = layers_of(transformer, "autoa8")
    block = transformer.get_submodule(BLOCK)
    block_calls = [block_order.first_call(transformer, BLOCK, call) for call in calls]
    part = part_of(transformer, block, block_calls, [n for n in plans if n.startswith(f"{BLOCK}.")])
    before = {n: id(m) for n, m in transformer.named_modules()}
    result = sensitivity.sensitivity(part, plans, transformer, calls, build, 0)
    assert {n: id(m) for n, m in transformer.named_modules()} == before, "every layer is put back"
    return Found(transformer, calls, part, plans, result)


def test_every_width_of_every_layer_has_bytes_and_an_error(found: Found):
    assert found.result.keys() == found.part.linears.keys() and len(found.result) == 9
    for name, widths in found.result.items():
        assert list(widths) == list(WEIGHTS.values()) == list(found.plans[name])
        errors, sizes = [w["error"] for w in widths.values()], [w["bytes"] for w in widths.values()]
        assert sizes == sorted(sizes)
        assert errors == sorted(errors, reverse=True) and 0 < errors[-1] < errors[0] < 1
        assert [w["measured"] for w in widths.values()] == [True, False, True, False, True]


def test_bytes_are_those_of_the_tensors_also_where_nothing_was_quantized(found: Found):
    for name, linear in list(found.part.linears.items())[2:5]:
        for weight, plan in found.plans[name].items():
            made = quantize_layer(linear.weight, linear.bias, found.part.stats[name], plan, 0)
            assert found.result[name][weight]["bytes"] == sum(as_stored(n, t).nbytes for n, t in made.tensors.items())


def test_prediction_is_the_error_of_the_model(found: Found):
    """The gain is the block's, not each layer's own: it may be off by a factor, never by an order."""
    for name, linear in found.part.linears.items():
        for weight, known in found.result[name].items():
            made = quantize_layer(linear.weight, linear.bias, found.part.stats[name], found.plans[name][weight], 0)
            with sensitivity.replaced(found.transformer, {name: build(made)}):
                truth = capture.model_error(found.transformer, found.calls)
            assert known["error"] / 3 < truth < known["error"] * 3, (name, weight)


def test_layers_measured_on_the_model_itself_are_exact(found: Found):
    plans = {"proj_out_2": {w: replace(p, rule=replace(p.rule)) for w, p in found.plans[f"{BLOCK}.attn1.to_q"].items()}}
    part = part_of(found.transformer, found.transformer, found.calls, ["proj_out_2"])
    result = sensitivity.sensitivity(part, plans, found.transformer, found.calls, build, 0)["proj_out_2"]
    linear = part.linears["proj_out_2"]
    for weight in ("table2", "int8"):
        made = quantize_layer(linear.weight, linear.bias, part.stats["proj_out_2"], plans["proj_out_2"][weight], 0)
        with sensitivity.replaced(found.transformer, {"proj_out_2": build(made)}):
            truth = capture.model_error(found.transformer, found.calls)
        assert result[weight]["error"] == pytest.approx(truth, rel=1e-4)


def test_a_fixed_layer_has_one_measured_option(found: Found):
    name = f"{BLOCK}.ff.net.2"
    plans = {name: {"table4": found.plans[name]["table4"]}}
    part = replace(found.part, linears={name: found.part.linears[name]})
    result = sensitivity.sensitivity(part, plans, found.transformer, found.calls, build, 0)[name]
    assert result["table4"]["measured"] and list(result) == ["table4"]
    # The gain is measured with another block now, here of this layer alone: its error is the model's.
    made = quantize_layer(part.linears[name].weight, part.linears[name].bias, part.stats[name], plans[name]["table4"], 0)
    with sensitivity.replaced(found.transformer, {name: build(made)}):
        assert result["table4"]["error"] == pytest.approx(capture.model_error(found.transformer, found.calls), rel=1e-3)


def test_model_is_put_back_when_something_fails(found: Found):
    before = {n: id(m) for n, m in found.transformer.named_modules()}
    with pytest.raises(KeyError), sensitivity.replaced(found.transformer, {f"{BLOCK}.attn1.to_q": nn.Identity()}):
        raise KeyError
    assert {n: id(m) for n, m in found.transformer.named_modules()} == before


def _call(images: int, **more) -> Call:
    x = torch.arange(images).float()[:, None].expand(images, 4).contiguous()
    return Call((x,), {"timestep": torch.tensor(3.0), "labels": torch.arange(images), **more}, 0, x * 2)


def test_calls_are_thinned_to_other_images_each_time():
    thin = sensitivity.few([_call(64, table=torch.zeros(5, 4), nested={"mask": [torch.arange(64)]}) for _ in range(3)])
    for number, call in enumerate(thin):
        kept = call.args[0][:, 0]
        assert kept.tolist() == [number + 8 * i for i in range(8)]
        assert torch.equal(call.output[:, 0], kept * 2)
        assert torch.equal(call.kwargs["labels"].float(), kept) and torch.equal(call.kwargs["nested"]["mask"][0].float(), kept)
        assert call.kwargs["table"].shape == (5, 4) and call.kwargs["timestep"].ndim == 0


def test_calls_that_cannot_be_thinned_stay_whole():
    small, other = _call(15), replace(_call(64), args=(torch.zeros(3, 64),))
    silent, keyword = replace(_call(64), output=None), replace(_call(64), args=(), kwargs={"x": torch.zeros(64, 4)})
    for call in (small, other, silent, keyword):
        assert sensitivity.few([call]) == [call]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 20, 40, 100])
def test_few_calls_are_spread_over_all(count: int):
    numbers = sensitivity.few([replace(_call(2), bucket=i) for i in range(count)])
    buckets = [call.bucket for call in numbers]
    assert buckets == sorted(set(buckets)) and 1 <= len(buckets) <= 20 and buckets[0] == 0
    assert len(buckets) >= min(count, 10) and max(buckets) >= 0.8 * (count - 1)
    if count in (40, 100):
        assert len({b % 2 for b in buckets}) == 2, "both calls of guidance"
    chosen = sensitivity.measured(buckets)
    assert 1 <= len(chosen) <= 5 and set(chosen) <= set(buckets)
