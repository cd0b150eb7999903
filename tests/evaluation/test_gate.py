"""The gate's verdicts on made-up measurements whose truth is known, and on a real model."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from quantdit import recipe
from quantdit.compiler import Settings, calibrate
from quantdit.evaluation import gate
from quantdit.evaluation.gate import FAIL, INCONCLUSIVE, PASS
from quantdit.evaluation.intervals import bootstrap, bootstrap_many, jackknife
from quantdit.pipeline import load_pipeline

PROMPTS, SEEDS = 8, 3


def made_up(seed: int, psnr: float = 40.0, layer: float = -30.0, layers: int = 20, first: int = 0, spread: float = 2.0) -> dict:
    """A report whose PSNRs vary by 3 dB between prompts and `spread` between seeds, and layers by 0.5 dB.

    Of all layers the last alone has the error `layer`.
    """
    draw = np.random.default_rng(1000 + seed)
    of_prompt = np.random.default_rng(7).normal(0, 3, PROMPTS)  # a prompt is as hard in every report
    names = [(f"p{p}", first + s) for s in range(SEEDS) for p in range(PROMPTS)]
    rows = [{"prompt": p, "seed": s, "psnr": psnr + of_prompt[int(p[1:])] + draw.normal(0, spread)} for p, s in names]
    errors = draw.normal(-30, 0.5, (layers, len(names)))
    errors[-1] += layer + 30
    return {
        "format": 1,
        "identity": {"quantdit": "1", "backbone": "b", "steps": 4},
        "versions": {"torch": "2"},
        "reference": {},
        "candidate": {},
        "sampling": {},
        "samples": rows,
        "sets": {"FD-b": {"drift": 10.0, "standard_error": 1.0, "noise_floor": 100.0, "noise_floor_error": 5.0}},
        "floor": {"other batch": {"psnr": -90.0}, "bfloat16": {"psnr": -60.0}},
        "probe": {
            "samples": [{"prompt": p, "seed": s, "output_error": -35.0 + draw.normal(0, 0.7)} for p, s in names],
            "layers": {f"l{i}": errors[i].tolist() for i in range(layers)},
        },
    }


def verdicts(report: dict, baseline: dict) -> dict[str, str]:
    return {f.name: f.verdict for f in gate.gate(report, baseline).findings}


@pytest.fixture(scope="module")
def baseline() -> dict:
    return gate.make_baseline(made_up(0))


def test_a_model_as_good_passes_with_other_seeds_twenty_times_of_twenty(baseline: dict):
    found = [gate.gate(made_up(seed, first=100 * seed), baseline) for seed in range(1, 21)]
    assert [v.verdict for v in found].count(PASS) >= 19
    assert all(v.exit_code == 0 for v in found if v.verdict == PASS)


def without_probe(report: dict) -> dict:
    return report | {"probe": {"samples": [], "layers": {}}}


def test_a_worse_model_fails_and_one_at_the_margin_is_inconclusive(baseline: dict):
    assert verdicts(made_up(1, psnr=34.0, first=100), baseline)["PSNR"] == FAIL
    at_margin = made_up(1, psnr=38.2, first=100)
    # Its pictures alone leave it open, and decide where there is nothing better.
    assert verdicts(at_margin, baseline)["PSNR"] == INCONCLUSIVE and gate.gate(at_margin, baseline).verdict == PASS
    close = gate.gate(without_probe(at_margin), baseline)
    assert (close.verdict, close.exit_code) == (INCONCLUSIVE, 3)
    assert close.more > 0 and f"about {close.more} more samples" in gate.summary(close)


def test_as_many_more_samples_as_it_says_do_decide(baseline: dict):
    """Of twelve models 1 dB worse, half of the margin: each undecided one is decided with the samples it asks for."""
    psnr = baseline | {"margins": {"psnr": 2.0}}
    asked = [gate.gate(made_up(seed, psnr=39.0, first=100), psnr) for seed in range(1, 13)]
    more = [v.more for v in asked if v.verdict == INCONCLUSIVE]
    assert more and None not in more
    rows = [made_up(seed, psnr=39.0, first=100 * seed)["samples"] for seed in range(100, 140)]
    many = [row for part in rows for row in part][: PROMPTS * SEEDS + max(more)]
    base = copy.deepcopy(psnr)
    base["report"]["samples"] = [row for seed in range(200, 240) for row in made_up(seed, first=10000 + seed * 100)["samples"]]
    assert gate.gate(made_up(1) | {"samples": many}, base).verdict == PASS


def test_one_bad_layer_of_many_fails_and_is_named(baseline: dict):
    found = [gate.gate(made_up(seed, layer=-20.0, first=100 * seed), baseline) for seed in range(1, 11)]
    worst = [next(f for f in v.findings if f.name == "largest growth of a layer's error") for v in found]
    assert all(f.verdict == FAIL and "l19" in f.note for f in worst)
    assert all(v.exit_code == 1 for v in found)


def test_where_no_layer_grew_none_is_named(baseline: dict):
    same = next(f for f in gate.gate(made_up(0), baseline).findings if f.name == gate.LAYER_GROWTH)
    assert (same.verdict, same.note, same.difference.estimate) == (PASS, "no layer's error grew", 0.0)
    better = made_up(0)
    for errors in better["probe"]["layers"].values():
        errors[:] = [v - 1 for v in errors]
    text = gate.summary(gate.gate(better, baseline))
    assert f"- {gate.LAYER_GROWTH}: no layer's error grew\n" in text and "grew most" not in text


def test_a_difference_from_full_precision_says_so(baseline: dict):
    """The candidate's 0.03 less than full precision is the difference; the baseline's own 0.01 is not taken off it."""
    base, report = copy.deepcopy(baseline), made_up(1)
    base["margins"]["text_alignment_proxy"] = 0.05
    for rows, value in ((base["report"]["samples"], -0.01), (report["samples"], -0.03)):
        for row in rows:
            row["text_alignment_proxy"] = value
    verdict = gate.gate(report, base)
    found = next(f for f in verdict.findings if f.name == "text alignment (proxy)")
    assert (found.difference.estimate, found.equal) == (pytest.approx(-0.03), True)
    line = next(line for line in gate.summary(verdict).splitlines() if "text alignment" in line)
    assert "text alignment (proxy), from full precision" in line and "-0.03 [-0.03, -0.03]" in line and "±0.05" in line
    assert gate.NOTE in gate.summary(verdict)
    of_psnr = next(line for line in gate.summary(verdict).splitlines() if line.startswith("| PSNR"))
    assert "full precision" not in of_psnr and "±" not in of_psnr
    assert gate.meanings(report["samples"][0])["text_alignment_proxy"] == found.label


def test_a_better_model_passes(baseline: dict):
    best = made_up(1, psnr=99.0, layer=-80.0, first=100)
    assert gate.gate(best, baseline).verdict == PASS
    nothing = made_up(2)
    nothing["samples"] = [row | {"psnr": 100.0} for row in nothing["samples"]]
    nothing["probe"]["layers"] = {}
    assert gate.gate(nothing, baseline).verdict == PASS


def test_the_same_samples_are_compared_pair_by_pair(baseline: dict):
    """A change of 0.5 dB of every sample is known to the last digit, though the samples differ by 3 dB."""
    worse = copy.deepcopy(baseline["report"]) | {"format": 1}
    for row in worse["samples"]:
        row["psnr"] -= 0.5
    difference = next(f for f in gate.gate(worse, baseline).findings if f.name == "PSNR").difference
    assert (difference.low, difference.high) == pytest.approx((0.5, 0.5))


def test_the_limit_never_lies_below_the_noise_floor(baseline: dict):
    """Full precision in bfloat16 has 36 dB: a candidate of 37 dB cannot be called worse than it."""
    noisy = copy.deepcopy(baseline)
    noisy["report"]["floor"]["bfloat16"]["psnr"] = -30.0
    worse = made_up(1, psnr=34.0, first=100)
    assert verdicts(worse, baseline)["PSNR"] == FAIL and verdicts(worse, noisy)["PSNR"] == PASS


def test_distances_of_sets_may_reach_those_of_other_seeds(baseline: dict):
    report = made_up(1)
    report["sets"]["FD-b"]["drift"] = 80.0
    assert verdicts(report, baseline)["FD-b"] == PASS
    report["sets"]["FD-b"]["drift"] = 300.0
    assert verdicts(report, baseline)["FD-b"] == FAIL


def test_dynamic_degree_may_neither_rise_nor_fall(baseline: dict):
    for change, expected in ((0.0, PASS), (0.6, FAIL), (-0.6, FAIL)):
        base, report = copy.deepcopy(baseline), made_up(1)
        base["margins"]["dynamic_degree_proxy"] = 0.15
        for row in (*base["report"]["samples"], *report["samples"]):
            row["dynamic_degree_proxy"] = 0.0
        for row in report["samples"]:
            row["dynamic_degree_proxy"] = change
        assert verdicts(report, base)["dynamic degree (proxy)"] == expected


@pytest.mark.parametrize("key", ["quantdit", "backbone", "steps"])
def test_a_baseline_made_otherwise_is_refused_with_the_reason(baseline: dict, key: str):
    report = made_up(1)
    report["identity"][key] = "another"
    with pytest.raises(ValueError, match=f"{key}: the baseline's is .* the report's 'another'"):
        gate.gate(report, baseline)


def test_other_prompts_are_refused(baseline: dict):
    report = made_up(1)
    report["samples"] = [row | {"prompt": f"x{row['prompt']}"} for row in report["samples"]]
    with pytest.raises(ValueError, match="other prompts"):
        gate.gate(report, baseline)


def test_a_baseline_needs_a_noise_floor_and_keeps_edited_margins():
    report = made_up(0)
    edited = gate.make_baseline(report, {"psnr": 0.25, "of another model": 1.0})["margins"]
    assert edited["psnr"] == 0.25 and "of another model" not in edited
    del report["floor"]["bfloat16"]
    with pytest.raises(ValueError, match="--noise-floor"):
        gate.make_baseline(report)


@pytest.mark.parametrize(
    ("content", "what", "words"),
    [
        ("[]", "report", "JSON object"),
        ("", "report", "empty"),
        ("{}", "report", "format None"),
        ('{"format": 2}', "report", "of format 2, expected 1, which this version of quantdit writes"),
        ('{"format": 1}', "report", "no whole report"),
        ('{"format": 1, "margins": {"psnr": "1"}, "report": {}}', "baseline", "numbers of at least 0"),
        ('{"format": 1, "margins": {"psnr": 1}, "report": {"samples": []}}', "baseline", "no whole report"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: str, what: str, words: str):
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=words):
        gate.read(path, what)
    with pytest.raises(ValueError, match="no such"):
        gate.read(tmp_path / "none.json", what)


def test_a_misspelt_margin_is_refused(tmp_path: Path):
    baseline = gate.make_baseline(made_up(0))
    baseline["margins"]["psnrr"] = baseline["margins"].pop("psnr")
    (tmp_path / "file.json").write_text(json.dumps(baseline))
    with pytest.raises(ValueError, match="a margin for 'psnrr', which nothing measures; did you mean 'psnr'"):
        gate.read(tmp_path / "file.json", "baseline")


def test_intervals_cover_as_often_as_they_say():
    """Means of 12 prompts with 2 seeds each: the 95 % interval holds the truth in 93 to 100 % of 400 draws.

    Resampling prompts and then seeds counts the spread between seeds twice in part: never too narrow, somewhat too wide.
    """
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(12), 2)
    held = 0
    for i in range(400):
        values = rng.normal(0, 1, 12)[clusters] + rng.normal(0, 1, 24)
        found = bootstrap(values, clusters, seed=i)
        held += found.low <= 0 <= found.high
    assert held / 400 >= 0.93


def test_simultaneous_intervals_hold_all_layers_at_once():
    rng = np.random.default_rng(0)
    missed = sum(
        any(not f.low <= 0 <= f.high for f in bootstrap_many(rng.normal(0, 1, (20, 40)), np.arange(20), i, simultaneous=True))
        for i in range(100)
    )
    assert missed <= 12  # 5 expected; 12 or more happen once in two hundred times


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(0, 1, 20)
    whole, error = jackknife(lambda rows: float(values[rows].mean()), np.arange(20))
    assert whole == pytest.approx(values.mean()) and error == pytest.approx(values.std(ddof=1) / 20**0.5)


def test_gate_from_the_command_line(pixel_16: tuple[Path, Path, Path], tmp_path: Path, cli):
    """The model that made the baseline passes with its seeds and others, a 2-bit one fails, and the page shows it."""
    pytest.importorskip("efficientnet_lite_pytorch")
    full, good, bad = pixel_16
    sampling = ("--samples", 9, "--steps", 3, "--cache", tmp_path / "kept")
    stored = tmp_path / "baselines" / "good.json"
    assert cli("evaluate", full, good, *sampling, "--noise-floor", "--output", tmp_path / "good").code == 0
    none = cli("gate", tmp_path / "good" / "report.json", "--baseline", stored)
    assert none.code == 1 and "--update-baseline makes it" in none.error
    made = cli("gate", tmp_path / "good" / "report.json", "--baseline", stored, "--update-baseline")
    assert made.code == 0 and "PASS" in made.out
    assert json.loads(stored.read_text())["report"]["versions"]["quantdit"]
    assert cli("evaluate", full, bad, *sampling, "--output", tmp_path / "bad").code == 0
    summary = tmp_path / "comment.md"
    failed = cli("gate", tmp_path / "bad" / "report.json", "--baseline", stored, "--summary", summary)
    by_folder = cli("gate", tmp_path / "bad", "--baseline", stored)
    assert (by_folder.code, by_folder.out) == (failed.code, failed.out)
    assert "a folder without report.json" in cli("gate", tmp_path, "--baseline", stored).error
    assert "a folder; a baseline is a JSON file in it" in cli("gate", tmp_path / "bad", "--baseline", tmp_path).error
    assert failed.code == 1 and "**FAIL**" in failed.out and "grew most: " in summary.read_text()
    page = (tmp_path / "bad" / "report.html").read_text()
    assert 'class="verdict fail"' in page and page.count("<!--verdict-->") == 1
    assert cli("evaluate", full, good, *sampling, "--steps", 2, "--output", tmp_path / "short").code == 0
    refused = cli("gate", tmp_path / "short" / "report.json", "--baseline", stored)
    assert refused.code == 1 and "steps: the baseline's is 3, the report's 2" in refused.error


@pytest.fixture(scope="module")
def pixel_16(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model of 16 x 16 pixels, and its w8a8 and w2a16 forms."""
    from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

    from quantdit.models.pixel_dit import PixelDiTPipeline

    folder = tmp_path_factory.mktemp("gate")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 1, "out_channels": 1, "num_layers": 2}
    model = DiTTransformer2DModel(**sizes, sample_size=16, patch_size=4, num_embeds_ada_norm=3)
    PixelDiTPipeline(model, FlowMatchEulerDiscreteScheduler()).save_pretrained(folder / "full")
    for bits in ("w8a8", "w2a16"):
        pipeline, source = load_pipeline(str(folder / "full"))
        calibrate(pipeline, source, recipe.from_bits(bits), folder / bits, Settings(samples=2, steps=2))
    return folder / "full", folder / "w8a8", folder / "w2a16"
