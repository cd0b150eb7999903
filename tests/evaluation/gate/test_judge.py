"""The gate's verdicts on made-up measurements whose truth is known, and on a real model."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from quantdit.compiling.compile import compile
from quantdit.compiling.plan import Plan
from quantdit.evaluation.gate import judge
from quantdit.evaluation.gate.judge import FAIL, INCONCLUSIVE, PASS
from quantdit.evaluation.metrics.table import FORMAT, decibels, meanings
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.presets import from_bits
from quantdit.recipes.sampling_plan import SamplingPlan

PROMPTS, SEEDS = 8, 3
FLOORS = {"other seeds": 12.0, "other batch": 90.0, "other dtype": 60.0}


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
        "format": FORMAT,
        "identity": {"quantdit": "1", "backbone": "b", "steps": 4},
        "versions": {"torch": "2"},
        "reference": {},
        "candidate": {},
        "sampling": {},
        "samples": rows,
        "sets": {"FD-b": {"drift": 10.0, "standard_error": 1.0, "noise_floor": 100.0, "noise_floor_error": 5.0}},
        "floor": {kind: {"psnr": {"mean": db, "harm": -db}} for kind, db in FLOORS.items()},
        "probe": {
            "samples": [{"prompt": p, "seed": s, "output_error": -35.0 + draw.normal(0, 0.7)} for p, s in names],
            "layers": {f"l{i}": errors[i].tolist() for i in range(layers)},
        },
    }


def verdicts(report: dict, baseline: dict) -> dict[str, str]:
    return {f.name: f.verdict for f in judge.gate(report, baseline).findings}


@pytest.fixture(scope="module")
def baseline() -> dict:
    return judge.make_baseline(made_up(0))


def test_a_model_as_good_passes_with_other_seeds_twenty_times_of_twenty(baseline: dict):
    found = [judge.gate(made_up(seed, first=100 * seed), baseline) for seed in range(1, 21)]
    assert [v.verdict for v in found].count(PASS) >= 19
    assert all(v.exit_code == 0 for v in found if v.verdict == PASS)


def without_probe(report: dict) -> dict:
    return report | {"probe": {"samples": [], "layers": {}}}


def test_a_worse_model_fails_and_one_at_the_margin_is_inconclusive(baseline: dict):
    assert verdicts(made_up(1, psnr=34.0, first=100), baseline)["PSNR"] == FAIL
    at_margin = made_up(1, psnr=38.2, first=100)
    # Its pictures alone leave it open, and decide where there is nothing better.
    assert verdicts(at_margin, baseline)["PSNR"] == INCONCLUSIVE and judge.gate(at_margin, baseline).verdict == PASS
    close = judge.gate(without_probe(at_margin), baseline)
    assert (close.verdict, close.exit_code) == (INCONCLUSIVE, 3)
    assert close.more > 0 and f"about {close.more} more samples" in judge.summary(close)
    total = PROMPTS * SEEDS + close.more
    assert f"would decide; run quantdit evaluate again with --samples {total}" in judge.headline(close)


def test_too_few_probes_are_answered_with_more_probes_and_the_samples_that_they_need(baseline: dict):
    close = made_up(1, first=100)
    for row in close["probe"]["samples"]:
        row["output_error"] += 1.4
    found = judge.gate(close, baseline)
    error = next(f for f in found.open if f.name == "model output error")
    total = PROMPTS * SEEDS + found.more
    assert found.verdict == INCONCLUSIVE and error.more and error.probed
    assert judge.headline(found).endswith(
        f"; run quantdit evaluate again with --samples {total} --probes {total}, for the baseline too"
    )


def test_noise_floor_is_the_same_seeds_and_other_seeds_are_a_column_of_their_own():
    report, stored = made_up(1), made_up(0)
    stored["floor"]["other dtype"]["FD-b"] = {"mean": 3.0, "harm": 3.0}
    found = {f.name: f for f in judge.gate(report, judge.make_baseline(stored)).findings}
    assert (found["FD-b"].floor, found["FD-b"].other_seeds) == (3.0, 100.0)
    assert (found["PSNR"].floor, found["PSNR"].other_seeds) == (
        min(FLOORS["other batch"], FLOORS["other dtype"]),
        FLOORS["other seeds"],
    )
    assert found["FD-b"].cells()[-2:] == ("3.00", "100.00") and judge.COLUMNS[-2:] == ("noise floor", "other seeds")
    text = judge.summary(judge.gate(report, judge.make_baseline(stored)))
    assert "noise floor on the same seeds" in text and "-100 dB stands for no error" in text and "may lie below zero" in text


def test_as_many_more_samples_as_it_says_do_decide(baseline: dict):
    """Of twelve models 1 dB worse, half of the margin: each undecided one is decided with the samples it asks for."""
    psnr = baseline | {"margins": {"psnr": 2.0}}
    asked = [judge.gate(made_up(seed, psnr=39.0, first=100), psnr) for seed in range(1, 13)]
    more = [v.more for v in asked if v.verdict == INCONCLUSIVE]
    assert more and None not in more
    rows = [made_up(seed, psnr=39.0, first=100 * seed)["samples"] for seed in range(100, 140)]
    many = [row for part in rows for row in part][: PROMPTS * SEEDS + max(more)]
    base = copy.deepcopy(psnr)
    base["report"]["samples"] = [row for seed in range(200, 240) for row in made_up(seed, first=10000 + seed * 100)["samples"]]
    assert judge.gate(made_up(1) | {"samples": many}, base).verdict == PASS


def test_one_bad_layer_of_many_fails_and_is_named(baseline: dict):
    found = [judge.gate(made_up(seed, layer=-20.0, first=100 * seed), baseline) for seed in range(1, 11)]
    worst = [next(f for f in v.findings if f.name == "largest growth of a layer's error") for v in found]
    assert all(f.verdict == FAIL and "l19" in f.note for f in worst)
    assert all(v.exit_code == 1 for v in found)


def test_where_no_layer_grew_none_is_named(baseline: dict):
    same = next(f for f in judge.gate(made_up(0), baseline).findings if f.name == judge.LAYER_GROWTH)
    assert (same.verdict, same.note, same.difference.estimate) == (PASS, "no layer's error grew", 0.0)
    better = made_up(0)
    for errors in better["probe"]["layers"].values():
        errors[:] = [v - 1 for v in errors]
    text = judge.summary(judge.gate(better, baseline))
    assert f"- {judge.LAYER_GROWTH}: no layer's error grew\n" in text and "grew most" not in text


def with_alignment(report: dict, full: float, own: float) -> dict:
    """Give every sample a text alignment, of full precision and its own."""
    given = {"text_alignment_proxy": own - full, "text_alignment_proxy_reference": full, "text_alignment_proxy_candidate": own}
    return report | {"samples": [row | given for row in report["samples"]]}


@pytest.mark.parametrize(
    ("own", "expected"), [(0.77, PASS), (0.735, PASS), (0.845, PASS), (0.72, FAIL), (0.86, FAIL)], ids=lambda v: str(v)
)
def test_what_may_change_neither_way_is_held_to_full_precision_and_the_baseline(own: float, expected: str):
    """Full precision has 0.80, the baseline 0.78: from 0.05 below the baseline's to 0.05 above full precision's is as good."""
    base = judge.make_baseline(with_alignment(made_up(0), 0.8, 0.78))
    verdict = judge.gate(with_alignment(made_up(1), 0.8, own), base)
    found = next(f for f in verdict.findings if f.name == "text alignment (proxy)")
    assert found.verdict == expected
    # All of one kind: means of the candidate and of the baseline, and what lies between them.
    assert (found.candidate, found.baseline, found.difference.estimate) == pytest.approx((own, 0.78, own - 0.78))
    assert found.cells()[5] == "-0.05 to 0.07"
    label = meanings(verdict_row := with_alignment(made_up(1), 0.8, own)["samples"][0])["text_alignment_proxy"]
    assert label == "text alignment (proxy), less full precision's" and "psnr" in verdict_row


def test_people_read_natural_units(baseline: dict):
    """A PSNR is a PSNR; decibels of error stand only where it says by how much a model is worse."""
    report = made_up(1, psnr=38.5, first=100)
    for rows, loss in ((report["samples"], 0.02), (baseline["report"]["samples"], 0.01)):
        for row in rows:
            row |= {"ssim": 1 - loss, "perceptual": 10 * loss, "latent_cosine": 1 - loss / 1000}
    baseline = baseline | {"margins": baseline["margins"] | {"ssim": 3.0, "perceptual": 3.0, "latent_cosine": 3.0}}
    text = judge.summary(judge.gate(report, baseline))
    rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[3:7]] for line in text.splitlines() if "| " in line}
    assert rows["measure"][2] == "worse by (dB: of error) [95 %]"
    mean, stored = (np.mean([row["psnr"] for row in r["samples"]]) for r in (report, baseline["report"]))
    assert rows["PSNR"][:2] == [f"{mean:.2f} dB", f"{stored:.2f} dB"]
    assert rows["SSIM"][:3] == ["0.98", "0.99", "3.01 dB [3.01, 3.01]"]
    assert rows["perceptual distance (proxy)"][:3] == ["0.2", "0.1", "6.02 dB [6.02, 6.02]"]
    assert rows["latent cosine"][:2] == ["0.999980", "0.9999900"]
    assert "-" not in "".join("".join(cells[:2]) for name, cells in rows.items() if name in ("PSNR", "SSIM"))
    assert judge.NOTE in text


def test_a_better_model_passes(baseline: dict):
    best = made_up(1, psnr=80.0, layer=-80.0, first=100)
    assert judge.gate(best, baseline).verdict == PASS
    nothing = made_up(2)
    nothing["samples"] = [row | {"psnr": 100.0} for row in nothing["samples"]]
    nothing["probe"]["layers"] = {}
    assert judge.gate(nothing, baseline).verdict == PASS


def test_the_same_samples_are_compared_pair_by_pair(baseline: dict):
    """A change of 0.5 dB of every sample is known to the last digit, though the samples differ by 3 dB."""
    worse = copy.deepcopy(baseline["report"]) | {"format": FORMAT}
    for row in worse["samples"]:
        row["psnr"] -= 0.5
    difference = next(f for f in judge.gate(worse, baseline).findings if f.name == "PSNR").difference
    assert (difference.low, difference.high) == pytest.approx((0.5, 0.5))


def test_the_limit_never_lies_below_the_noise_floor(baseline: dict):
    """Full precision in bfloat16 has 36 dB: a candidate of 37 dB cannot be called worse than it."""
    noisy = copy.deepcopy(baseline)
    noisy["report"]["floor"]["other dtype"]["psnr"] = {"mean": 30.0, "harm": -30.0}
    worse = made_up(1, psnr=34.0, first=100)
    assert verdicts(worse, baseline)["PSNR"] == FAIL and verdicts(worse, noisy)["PSNR"] == PASS


def set_verdict(drift: float, error: float, base: tuple[float, float] = (10.0, 1.0), floor: float = 100.0) -> judge.Finding:
    """The finding on a distance of `drift` ± `error`, of a baseline's `base` and another seed's `floor`."""
    report, stored = made_up(1), made_up(0)
    report["sets"]["FD-b"] |= {"drift": drift, "standard_error": error}
    stored["sets"]["FD-b"] |= {"drift": base[0], "standard_error": base[1], "noise_floor": floor}
    found = judge.gate(report, judge.make_baseline(stored))
    assert found.verdict == (FAIL if any(f.verdict == FAIL for f in found.findings) else PASS)
    return next(f for f in found.findings if f.name == "FD-b")


def test_a_distance_of_sets_is_held_to_twice_the_baselines_own():
    """10 ± 1 of eight prompts may be as much as 12.5, twice of which is 25; far below the 100 of other seeds."""
    reach = 12.5
    assert set_verdict(11.0, 1.0).verdict == PASS and set_verdict(11.0, 0.0).limit + 10 == pytest.approx(2 * reach, abs=0.1)
    # Eleven times the baseline's distance, which other seeds would not even reach.
    assert set_verdict(80.0, 10.0).verdict == FAIL
    unsure = set_verdict(22.0, 10.0)
    assert unsure.verdict == INCONCLUSIVE and unsure.cells()[1] == "not decisive" and unsure.more > 0
    # No larger than other seeds', where the baseline's own is smaller than theirs; never smaller than the baseline's own.
    assert set_verdict(21.0, 0.0, floor=5.0).verdict == FAIL and set_verdict(14.0, 0.0, floor=5.0).verdict == PASS
    # An unbiased distance may be negative: its interval is what counts.
    assert set_verdict(0.001, 0.002, (-0.001, 0.002)).verdict == PASS
    assert set_verdict(0.2, 0.01, (-0.001, 0.002)).verdict == FAIL


def test_an_undecided_distance_is_no_green_pass_and_says_how_many_samples():
    report = made_up(1)
    report["sets"]["FD-b"] |= {"drift": 22.0, "standard_error": 10.0}
    verdict = judge.gate(report, judge.make_baseline(made_up(0)))
    more = next(f.more for f in verdict.findings if f.name == "FD-b")
    assert f"too few samples to say so of FD-b (about {more} more)" in judge.headline(verdict)
    assert "| not decisive |" in next(line for line in judge.summary(verdict).splitlines() if "FD-b" in line and "|" in line)


@pytest.mark.parametrize("key", ["quantdit", "backbone", "steps"])
def test_a_baseline_made_otherwise_is_refused_with_the_reason(baseline: dict, key: str):
    report = made_up(1)
    report["identity"][key] = "another"
    with pytest.raises(ValueError, match=f"{key}: the baseline's is .* the report's 'another'"):
        judge.gate(report, baseline)


def test_other_prompts_are_refused(baseline: dict):
    report = made_up(1)
    report["samples"] = [row | {"prompt": f"x{row['prompt']}"} for row in report["samples"]]
    with pytest.raises(ValueError, match="other prompts"):
        judge.gate(report, baseline)


def test_a_baseline_needs_a_noise_floor_and_keeps_edited_margins():
    report = made_up(0)
    wrong = copy.deepcopy(report)
    wrong["floor"]["other dtype"]["psnr"] = {"mean": 10.0, "harm": -10.0}
    with pytest.raises(ValueError, match=r"another dtype has a PSNR of 10\.00 dB against itself, less than with other seeds"):
        judge.make_baseline(wrong)
    edited = judge.make_baseline(report, {"psnr": 0.25, "of another model": 1.0})["margins"]
    assert edited["psnr"] == 0.25 and "of another model" not in edited
    del report["floor"]["other dtype"]
    with pytest.raises(ValueError, match="--noise-floor"):
        judge.make_baseline(report)


@pytest.mark.parametrize(
    ("content", "what", "words"),
    [
        ("[]", "report", "JSON object"),
        ("", "report", "empty"),
        ("{}", "report", "format is missing"),
        ('{"format": 1}', "report", "format is 1, expected 2, which this version of quantdit writes"),
        ('{"format": 2}', "report", "identity is missing, expected an object"),
        ('{"format": 2, "margins": {}, "report": []}', "baseline", "report is a list, expected an object"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: str, what: str, words: str):
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=words):
        judge.read(path, what)
    with pytest.raises(ValueError, match="no such"):
        judge.read(tmp_path / "none.json", what)


NUMBERS = (
    ("samples", 3, "psnr"),
    ("sets", "FD-b", "drift"),
    ("sets", "FD-b", "standard_error"),
    ("floor", "other dtype", "psnr", "harm"),
    ("probe", "samples", 0, "output_error"),
    ("probe", "layers", "l3", 5),
)


@pytest.mark.parametrize("keys", NUMBERS, ids=lambda keys: ".".join(map(str, keys)))
@pytest.mark.parametrize("what", ["report", "baseline"])
def test_what_is_no_number_never_passes(tmp_path: Path, cli, what: str, keys: tuple):
    """NaN and infinity, words, yes, nothing, lists, and 1e308, whose sums overflow: one line that names file and key."""
    good = {"report": made_up(0), "baseline": judge.make_baseline(made_up(0))}
    paths = {name: tmp_path / f"{name}.json" for name in good}
    for value in (math.nan, math.inf, -math.inf, "1.0", True, None, [1.0], {}, 1e308, 10**400):
        content = copy.deepcopy(good)
        place = content["report"] if what == "report" else content["baseline"]["report"]
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        for name, path in paths.items():
            path.write_text(json.dumps(content[name]))
        ran = cli("gate", paths["report"], "--baseline", paths["baseline"])
        assert ran.code == 1 and str(paths[what]) in ran.error and str(keys[-1]) in ran.error, (value, ran)


@pytest.mark.parametrize("margin", [math.nan, -1.0, "2", True, math.inf])
def test_a_margin_is_a_number(tmp_path: Path, margin: object):
    baseline = judge.make_baseline(made_up(0))
    baseline["margins"]["psnr"] = margin
    with pytest.raises(ValueError, match=r"margins\['psnr'\] is .*, expected a number from 0"):
        judge.gate(made_up(0), baseline)
    baseline["margins"] |= {"psnr": 2.0, "FD-b": 0.5}
    with pytest.raises(ValueError, match=r"margins\['FD-b'\] is 0.5, expected a number from 1"):
        judge.gate(made_up(0), baseline)


def test_an_error_that_is_no_number_is_not_perfect():
    assert decibels(0.0) == decibels(-1e-9) == -100.0
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="is no number"):
            decibels(value)


def test_rows_that_do_not_fit_together_are_refused(baseline: dict):
    report = made_up(1)
    report["samples"][4] = dict(report["samples"][3])
    with pytest.raises(ValueError, match=r"samples\[4\] has the prompt and seed of an earlier row"):
        judge.gate(report, baseline)
    del report["samples"][4]["psnr"]
    report["samples"][4]["seed"] = 99
    with pytest.raises(ValueError, match=r"samples\[4\] holds other measures than samples\[0\]"):
        judge.gate(report, baseline)
    report = made_up(1)
    report["probe"]["layers"]["l3"].pop()
    with pytest.raises(ValueError, match=r"layers\['l3'\] has 23 numbers, expected one for each of 24"):
        judge.gate(report, baseline)


def test_what_the_report_lacks_is_said(baseline: dict):
    assert "model output error: in the baseline, not measured here" in judge.gate(without_probe(made_up(1)), baseline).notes


def test_hostile_names_stay_text_in_the_summary():
    """A name that would end a table's cell, make HTML, a link or code, or begin a new line does none of it."""
    name = "a|b\n# `c` <img src=x> [d](http://e) *f*"
    report = made_up(0)
    report["sets"] = {name: report["sets"]["FD-b"]}
    report["probe"]["layers"] = {name: report["probe"]["layers"]["l0"]}
    stored = judge.make_baseline(report)
    worse = copy.deepcopy(report)
    worse["probe"]["layers"][name] = [v + 20 for v in worse["probe"]["layers"][name]]
    worse["versions"] = {"torch": "<b>|2"}
    text = judge.summary(judge.gate(worse, stored))
    assert "<img" not in text and "<b>" not in text and "\n#" not in text and "](http" not in text
    assert r"a\|b # \`c\` &lt;img src=x&gt; [d]\(http://e) \*f\*" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1


def test_files_and_contents_are_taken_alike(tmp_path: Path, baseline: dict):
    import quantdit

    (tmp_path / "report.json").write_text(json.dumps(made_up(1)))
    (tmp_path / "base.json").write_text(json.dumps(baseline))
    verdicts = [quantdit.gate(r, b) for r, b in ((tmp_path, tmp_path / "base.json"), (made_up(1), baseline))]
    assert verdicts[0] == verdicts[1]


def test_a_misspelt_margin_is_refused(tmp_path: Path):
    baseline = judge.make_baseline(made_up(0))
    baseline["margins"]["psnrr"] = baseline["margins"].pop("psnr")
    (tmp_path / "file.json").write_text(json.dumps(baseline))
    with pytest.raises(ValueError, match="a margin for 'psnrr', which nothing measures; did you mean 'psnr'"):
        judge.read(tmp_path / "file.json", "baseline")


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
        compile(pipeline, source, Plan(from_bits(bits), SamplingPlan(samples=2, steps=2)), folder / bits)
    return folder / "full", folder / "w8a8", folder / "w2a16"
