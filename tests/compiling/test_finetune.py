"""Calibrated assignments: candidates against a search, soft layers against the quantized one, and that training helps."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantdit.calibration import stats as statistics
from quantdit.calibration.layer import Quantized, quantize_layer
from quantdit.calibration.observe.recorded_calls import Call
from quantdit.calibration.stats import Stats
from quantdit.compiling.compile import compile
from quantdit.compiling.finetune import Examples, cut, held_out_error, parts, train
from quantdit.compiling.plan import Plan
from quantdit.compiling.report import REPORT
from quantdit.compiling.soft_linear import CERTAIN, best_codes, bytes_of, is_trainable, soft_linear
from quantdit.layers.quant_linear import QuantLinear
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.finetuning import FineTuning
from quantdit.recipes.presets import from_bits, with_weight_format
from quantdit.recipes.rules import LayerPlan, Rule
from quantdit.recipes.sampling_plan import SamplingPlan
from quantdit.system import files

WIDTH, OUT = 32, 24


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(rows: int = 512, seed: int = 1) -> Tensor:
    return random(rows, WIDTH, seed=seed) @ random(WIDTH, WIDTH, seed=9) / WIDTH**0.5 + 0.5


def made_of(linear: nn.Linear, **rule: object) -> tuple[Quantized, Stats]:
    seen = statistics.update(statistics.init(WIDTH, 1), inputs(), 0)
    plan = LayerPlan(Rule("*", **{"weight": "vq256x4", "cd_passes": 1, **rule}), linear.in_features, 0)
    return quantize_layer(linear.weight, linear.bias, seen, plan, 0), seen


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, OUT).requires_grad_(False)


@pytest.mark.parametrize("d", [1, 2, 4])
def test_candidates_are_those_of_a_search(d: int):
    W, X, codebook = random(5, 16, seed=2), random(200, 16, seed=3) @ random(16, 16, seed=4), random(9, d, seed=5)
    H = (X.T @ X).double()
    codes = torch.randint(9, (5, 16 // d), generator=torch.Generator().manual_seed(6))
    found, errors = best_codes(codes, W, H, codebook, 3)
    D = (codebook[codes].flatten(1) - W).double()
    for row in range(5):
        for g in range(16 // d):
            whole = []
            for word in codebook:
                tried = D[row].clone()
                tried[g * d : g * d + d] = word.double() - W[row, g * d : g * d + d]
                whole.append(float(tried @ H @ tried))
            has = int(codes[row, g])
            order = [has, *(c for c in sorted(range(9), key=whole.__getitem__) if c != has)]
            assert found[:, row, g].tolist() == order[:3]
            # Errors differ from those of the whole row by what does not depend on the group.
            gaps = [whole[c] - whole[has] for c in order[:3]]
            torch.testing.assert_close(errors[:, row, g] - errors[0, row, g], torch.tensor(gaps).float(), rtol=1e-2, atol=1e-2)


RULES = (
    {},
    {"weight": "table3"},
    {"weight": "vq64x2", "rotation": "outlier"},
    {"smooth": "rms", "low_rank": 4},
    {"weight": "table4", "activation_bits": 8},
    {"weight": "ssvq256x4"},
    {"weight": "ssvq256x8", "activation_bits": 8},
)
TRELLIS = ({"weight": "trellis2_l10"}, {"weight": "trellis3_l12", "activation_bits": 8, "smooth": "rms", "low_rank": 4})


@pytest.mark.parametrize("rule", RULES, ids=lambda r: "-".join(map(str, r.values())) or "plain")
@pytest.mark.parametrize("bias", [True, False])
def test_a_decided_layer_is_the_quantized_one(linear: nn.Linear, rule: dict, bias: bool):
    if not bias:
        linear = nn.Linear(WIDTH, OUT, bias=False).requires_grad_(False)
    made, seen = made_of(linear, **rule)
    assert is_trainable(made)
    soft = soft_linear(made, linear.weight, linear.bias, seen, FineTuning(candidates=2))
    x = inputs(40, seed=7)
    has = QuantLinear.from_tensors(made.spec, made.tensors, made.bias)
    with torch.no_grad():
        soft.logits[0], soft.logits[1] = CERTAIN, -CERTAIN
        torch.testing.assert_close(soft(x), has(x), rtol=1e-4, atol=1e-4)
    decided = soft.decided(made, linear.weight, linear.bias, seen)
    again = QuantLinear.from_tensors(decided.spec, decided.tensors, decided.bias)
    assert float((again(x) - has(x)).norm() / has(x).norm()) < 0.02  # the codebook is rounded once more
    assert torch.equal(decided.tensors["data"], made.tensors["data"])


@pytest.mark.parametrize("rule", TRELLIS, ids=lambda r: r["weight"])
@pytest.mark.parametrize("bias", [True, False])
def test_trellis_codes_stay_and_their_scales_and_biases_are_trained(rule: dict, bias: bool):
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, 2 * OUT, bias=bias).requires_grad_(False)
    made, seen = made_of(linear, **rule)
    assert is_trainable(made) and bytes_of(made, FineTuning(candidates=2)) == bytes_of(made, FineTuning(candidates=1))
    x = inputs(40, seed=7)
    soft = soft_linear(made, linear.weight, linear.bias, seen, FineTuning(candidates=2))
    with torch.no_grad():
        torch.testing.assert_close(soft(x), QuantLinear.from_tensors(made.spec, made.tensors, made.bias)(x), rtol=1e-4, atol=1e-4)
        soft.gain *= 1.25  # something to find
    examples = examples_of(linear)

    def run(call: Call) -> list[Tensor]:
        return [torch.tanh(soft(call.args[0]))]

    report = train([soft], run, examples, FineTuning(steps=40, candidates=2, codebook_rate=1e-2), 0)
    assert report["held_out"] < 0.9 * report["held_out_assigned"]
    decided = soft.decided(made, linear.weight, linear.bias, seen)
    assert torch.equal(decided.tensors["data"], made.tensors["data"])
    assert not torch.equal(decided.tensors["scale"], made.tensors["scale"])
    assert bias == (decided.bias is not None and not torch.equal(decided.bias, made.bias))
    again = QuantLinear.from_tensors(decided.spec, decided.tensors, decided.bias)
    with torch.no_grad():
        assert float((again(x) - soft(x)).norm() / soft(x).norm()) < 2e-3  # scales are rounded to 16 bits


def test_the_mean_output_is_kept_whatever_the_ratios(linear: nn.Linear):
    made, seen = made_of(linear)
    soft = soft_linear(made, linear.weight, linear.bias, seen, FineTuning(candidates=3, initial="uniform"))
    assert torch.equal(soft.ratios, torch.full_like(soft.ratios, 1 / 3))
    with torch.no_grad():
        torch.testing.assert_close(soft(inputs()).mean(0), linear(inputs()).mean(0), rtol=0, atol=1e-4)


def test_ratios_begin_in_inverse_proportion_to_the_errors(linear: nn.Linear):
    made, seen = made_of(linear)
    soft = soft_linear(made, linear.weight, linear.bias, seen, FineTuning(candidates=3))
    assert bool((soft.ratios[1:].diff(dim=0) <= 0).all()) and float(soft.ratios.detach()[0].mean()) > 0.4


def test_freezing_decides_what_is_nearly_certain_and_nothing_else(linear: nn.Linear):
    made, seen = made_of(linear)
    soft = soft_linear(made, linear.weight, linear.bias, seen, FineTuning(initial="uniform"))
    with torch.no_grad():
        soft.logits[1, :3] = 6.0
    before = soft.logits.detach().clone()
    assert soft.freeze() == pytest.approx(3 / OUT)
    assert torch.equal(soft.logits[:, 3:], before[:, 3:]) and bool((soft.logits[1, :3] == CERTAIN).all())
    assert soft.freeze(0.0) == 1.0 and bool((soft.ratios.amax(0) == 1).all())


def examples_of(linear: nn.Linear) -> Examples:
    calls = [Call((inputs(64, seed=20 + i),), {}, 0) for i in range(6)]
    return Examples(calls, lambda number: [torch.tanh(linear(calls[number].args[0]))])


@pytest.mark.parametrize("candidates", [1, 2, 3])
@pytest.mark.parametrize("weight", ["vq64x2", "table2"])
def test_training_lowers_the_held_out_error_and_ends_with_one_codeword_each(linear: nn.Linear, candidates: int, weight: str):
    made, seen = made_of(linear, weight=weight, method="rtn")
    training = FineTuning(steps=120, candidates=candidates, rows=32)
    soft = soft_linear(made, linear.weight, linear.bias, seen, training)
    examples = examples_of(linear)

    def run_of(layer: nn.Module):
        return lambda call: [torch.tanh(layer(call.args[0]))]

    before = held_out_error(run_of(QuantLinear.from_tensors(made.spec, made.tensors, made.bias)), examples)
    seeds = torch.get_rng_state()
    report = train([soft], run_of(soft), examples, training, 0)
    assert torch.equal(torch.get_rng_state(), seeds)
    decided = soft.decided(made, linear.weight, linear.bias, seen)
    after = held_out_error(run_of(QuantLinear.from_tensors(decided.spec, decided.tensors, decided.bias)), examples)
    assert after < (0.95 if candidates > 1 else 1) * before and after == pytest.approx(report["held_out"], rel=0.02)
    assert bool((soft.ratios.amax(0) == 1).all())
    assert 0 < decided.report["codebook_rounding"] < 0.02


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_two_candidates_beat_one_in_as_many_steps(linear: nn.Linear, optimizer: str):
    how = {"steps": 240, "rows": 32, "optimizer": optimizer}
    how |= {"distance": "weight", "codebook_rate": 1e-4} if optimizer == "rmsprop" else {}
    made, seen = made_of(linear, weight="vq64x2", method="rtn", rotation="none", bias_correction=False)
    examples = examples_of(linear)

    def ends(candidates: int, seed: int) -> float:
        training = FineTuning(candidates=candidates, **how)
        soft = soft_linear(made, linear.weight, linear.bias, seen, training)
        report = train([soft], lambda call: [torch.tanh(soft(call.args[0]))], examples, training, seed)
        return report["held_out"]

    one, two = ([ends(candidates, seed) for seed in range(3)] for candidates in (1, 2))
    assert max(two) < 0.9 * min(one)


@pytest.mark.parametrize("weight", ["trellis2_l10", "vq256x4"])
def test_training_does_as_well_where_two_outputs_are_a_thousand_times_as_large(weight: str):
    """As a model's values are with outliers that the layer after takes back: one rate for all channels suits these two alone."""
    torch.manual_seed(0)
    plain = nn.Linear(WIDTH, 64).requires_grad_(False)
    size = torch.ones(64)
    size[:2] = 1024.0
    large = copy.deepcopy(plain)
    large.weight.mul_(size[:, None])
    large.bias.mul_(size)
    found = []
    for layer, unit in ((plain, torch.ones(64)), (large, size)):
        made, seen = made_of(layer, weight=weight, rotation="none", method="rtn")
        training = FineTuning(steps=40, candidates=1)
        soft = soft_linear(made, layer.weight, layer.bias, seen, training)

        def run(call: Call, soft: nn.Module = soft, unit: Tensor = unit) -> list[Tensor]:
            return [soft(*call.args) / unit]

        examples = examples_of(plain)
        before = held_out_error(run, examples)
        train([soft], run, examples, training, seed=0)
        found.append(held_out_error(run, examples) / before)
    assert found[0] < 0.98
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_same_seed_same_layer(linear: nn.Linear):
    ends = []
    for seed in (0, 0, 1):
        made, seen = made_of(linear)
        soft = soft_linear(made, linear.weight, linear.bias, seen, FineTuning(steps=10))
        train([soft], lambda call, soft=soft: [torch.tanh(soft(call.args[0]))], examples_of(linear), FineTuning(steps=10), seed)
        ends.append(
            soft.decided(made, linear.weight, linear.bias, seen).tensors["codebook"].float() * float(soft.scale.detach().mean())
        )
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_layers_too_large_to_be_trained_at_once_are_trained_in_parts(linear: nn.Linear):
    weights = ("vq64x2", "int4", "vq64x2", "vq64x2", "vq64x2")
    made = {name: made_of(linear, weight=weight)[0] for name, weight in zip("abcde", weights, strict=True)}
    training = FineTuning(candidates=2)
    one = bytes_of(made["a"], training)
    # Codes, logits with their gradients and averages of each of the pairs; the layer's soft weights.
    assert one == OUT * WIDTH // 2 * 2 * 13 + OUT * WIDTH * 4 * 5
    assert parts(made, training) == [("a", "c", "d", "e")]
    assert parts(made, replace(training, memory=2 * one)) == [("a", "c"), ("d", "e")]
    assert parts(made, replace(training, memory=1)) == [("a",), ("c",), ("d",), ("e",)]
    assert parts({"b": made["b"]}, training) == []


def test_what_is_trained_reports_its_own_error(linear: nn.Linear):
    made, seen = made_of(linear, method="rtn")
    soft = soft_linear(made, linear.weight, linear.bias, seen, FineTuning(candidates=1))
    with torch.no_grad():
        soft.gain.mul_(1.5)
    report = soft.decided(made, linear.weight, linear.bias, seen).report
    before = made.report["weight_only_rel_rmse"]
    assert 1.2 * before < report["weight_only_rel_rmse"] < 0.9 and report["weight_only_rel_rmse"] > 0.3
    assert report["weight_histogram"]["reach"] < 0.8 * made.report["weight_histogram"]["reach"]


def test_assignments_that_do_no_good_are_forgotten_and_codebooks_are_trained_all_the_same(linear: nn.Linear):
    made, seen = made_of(linear, method="rtn")
    training = FineTuning(steps=60, logit_rate=50.0, regulariser=0.0)  # jumps about
    soft = soft_linear(made, linear.weight, linear.bias, seen, training)

    def run(call: Call) -> list[Tensor]:
        return [torch.tanh(soft(call.args[0]))]

    report = train([soft], run, examples_of(linear), training, 0)
    assert not report["assignments_kept"] and report["held_out_found"] > report["held_out_had"] > report["held_out"]
    decided = soft.decided(made, linear.weight, linear.bias, seen)
    assert torch.equal(decided.tensors["data"], made.tensors["data"])


def test_the_first_ratios_do_not_move_all_groups_at_once(linear: nn.Linear):
    """Codes of rounding alone: for most groups another would be better, all else held; for all of them at once it would not."""
    made, seen = made_of(linear, method="rtn")
    soft = soft_linear(made, linear.weight, linear.bias, seen, FineTuning(candidates=2))
    assert bool((soft.ratios[0] >= 0.5).all())
    has = QuantLinear.from_tensors(made.spec, made.tensors, made.bias)
    x = inputs(300, seed=30)
    with torch.no_grad():
        assert float((soft(x) - linear(x)).norm()) < 1.2 * float((has(x) - linear(x)).norm())


def test_training_ends_when_nothing_is_gained_any_more(linear: nn.Linear):
    made, seen = made_of(linear)
    training = FineTuning(steps=100, candidates=1, codebook_rate=0.0)
    soft = soft_linear(made, linear.weight, linear.bias, seen, training)
    done = []
    report = train([soft], lambda call: [torch.tanh(soft(call.args[0]))], examples_of(linear), training, 0, done.append)
    assert report["codebook_steps"] == 30 and sum(done) == 100


def test_training_never_sees_what_is_held_out():
    calls = [Call((torch.arange(32.0)[:, None] + 100 * i,), {"other": torch.arange(3)}, i) for i in range(5)]
    examples = Examples(calls, lambda number: [calls[number].args[0] * 2])
    held = {float(v) for call, _ in examples.held_out() for v in call.args[0]}
    batches = examples.batches(6, torch.Generator().manual_seed(0))
    seen = set()
    for _ in range(200):
        call, (outputs,) = next(batches)
        assert len(call.args[0]) == 6 and torch.equal(outputs, call.args[0] * 2) and len(call.kwargs["other"]) == 3
        seen |= {float(v) for v in call.args[0]}
    assert held and not held & seen and len(seen) == 5 * 28


def test_of_calls_with_few_samples_the_last_are_held_out():
    calls = [Call((torch.full((2, 1), float(i)),), {}, 0) for i in range(16)]
    examples = Examples(calls, lambda number: [calls[number].args[0]])
    assert {float(call.args[0][0]) for call, _ in examples.held_out()} == {14.0, 15.0}
    batches = examples.batches(4, torch.Generator().manual_seed(0))
    assert {float(next(batches)[0].args[0][0]) for _ in range(300)} == set(map(float, range(14)))


def test_rows_of_nested_arguments():
    call = Call((torch.arange(4),), {"pair": (torch.arange(8).reshape(4, 2), None), "scale": 2.0}, 3)
    smaller, outputs = cut(call, [torch.arange(4) * 10, torch.zeros(())], torch.tensor([1, 3]), 4)
    assert smaller.args[0].tolist() == [1, 3] and smaller.kwargs["pair"][0].tolist() == [[2, 3], [6, 7]] and smaller.bucket == 3
    assert smaller.kwargs["pair"][1] is None and outputs[0].tolist() == [10, 30] and outputs[1].ndim == 0


@pytest.mark.parametrize("given", [{"steps": 0}, {"candidates": 5}, {"candidates": 0}, {"mode": "whole"}, {"initial": "zero"}])
def test_impossible_training_is_refused(given: dict):
    with pytest.raises(ValueError, match=str(next(iter(given.values())))):
        FineTuning(**given)


# ---- through the command line


@pytest.mark.parametrize("mode", ["block", "end-to-end"])
def test_calibrate_with_assignments(cli, pixel_dit: Path, tmp_path: Path, mode: str):
    few = ("--samples", "16", "--steps", "3", "--bits", "w2a16", "--weight-format", "vq")
    steps = ("--finetune-steps", "20", "--finetune-mode", mode, "--candidates", "2")
    for name, more in (("plain", ("--finetune-steps", "0")), ("first", steps)):
        ran = cli("calibrate", "--model", pixel_dit, "--output", tmp_path / name, *few, *more)
        assert ran.code == 0, ran.err
    pipeline, source = load_pipeline(str(pixel_dit))
    settings, training = SamplingPlan(samples=16, steps=3), FineTuning(steps=20, mode=mode, candidates=2)
    plan = with_weight_format(from_bits("w2a16"), "vq")
    compile(pipeline, source, Plan(plan, settings, finetuning=training), tmp_path / "second")
    digests = [files.digest(tmp_path / name / "transformer") for name in ("plain", "first", "second")]
    assert digests[1] == digests[2] != digests[0]
    plain, report = (files.read_json(tmp_path / name / REPORT) for name in ("plain", "first"))
    trained = [name for name, layer in report["layers"].items() if layer.get("assignments", {}).get("helped")]
    assert trained
    for name in trained:
        assert report["layers"][name]["rel_rmse"] != plain["layers"][name]["rel_rmse"]
        assert 0 < report["layers"][name]["assignments"]["bytes"] <= FineTuning().memory
    found = [layer["assignments"] for layer in report["layers"].values() if "assignments" in layer]
    assert found and all(row["held_out_before"] > 0 for row in found)
    assert report["provenance"]["training"] == {**report["provenance"]["training"], "steps": 20, "mode": mode}
    assert report["seconds_of_quantize"]["assignments"] > 0
    loaded, _ = load_pipeline(str(tmp_path / "first"))
    layers = [m for m in loaded.transformer.modules() if isinstance(m, QuantLinear)]
    assert layers and all(m.spec.format == "vq256x4" for m in layers)
    # What is loaded is to the bit what calibration ended with and evaluated.
    in_memory, stored = pipeline.transformer.state_dict(), loaded.transformer.state_dict()
    assert in_memory.keys() == stored.keys() and all(torch.equal(in_memory[key], stored[key]) for key in stored)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--bits", "w2a16", "--samples", "0", "--finetune-steps", "5"), ("--samples 0", "--finetune-steps")),
        (("--bits", "w8a8", "--weight-format", "vq"), ("w2 or w3 or w4",)),
        (("--bits", "w2a16", "--weight-format", "vq", "--finetune-steps", "5", "--candidates", "9"), ("9 candidates", "4")),
        (("--bits", "w2a16", "--candidates", "2"), ("--candidates 2", "w2a16", "trellis", "--weight-format vq")),
        (("--bits", "w8a8", "--finetune-steps", "5"), ("codebooks", "int8", "weight format table, vq or trellis")),
    ],
)
def test_what_cannot_be_is_one_line(cli, pixel_dit: Path, tmp_path: Path, given: tuple, words: tuple):
    ran = cli("calibrate", "--model", pixel_dit, "--output", tmp_path / "out", *given)
    assert ran.code == 1 and all(word in ran.error for word in words)
    assert not (tmp_path / "out.partial").exists()
