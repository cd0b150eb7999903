"""A width for each layer: within the bytes of the file, below the drift that was asked, the same again after an interruption."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from quantdit.calibration.allocate import Option, allocate, total_error
from quantdit.calibration.layer import quantize_layers
from quantdit.compiling import choose_widths, quantize_blocks
from quantdit.compiling.compile import compile
from quantdit.compiling.plan import Plan, Target
from quantdit.compiling.report import REPORT, to_json
from quantdit.pipelines.pipeline import load_pipeline
from quantdit.recipes.presets import from_bits, with_auto
from quantdit.recipes.resolve import options, resolve
from quantdit.recipes.rules import WEIGHTS, Layer, Recipe, Rule, from_dict
from quantdit.recipes.sampling_plan import SamplingPlan
from quantdit.system import files

QUICK = ("--samples", "2", "--steps", "2")


@dataclass(frozen=True)
class Mixed:
    """A folder calibrated under a size budget, and its report."""

    folder: Path
    report: dict


@pytest.fixture
def run(cli, pixel_dit: Path, tmp_path: Path) -> Callable:
    """Calibrate the tiny model with these arguments into `tmp_path / output`."""

    def go(*more: object, bits: str | None = "w4a8", output: str = "out"):
        how = () if bits is None else ("--bits", bits)
        return cli("calibrate", "--model", pixel_dit, *how, "--output", tmp_path / output, *QUICK, *more)

    return go


@pytest.fixture(scope="session")
def mixed(pixel_dit: Path, tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    pipeline, source = load_pipeline(str(pixel_dit))
    plan = with_auto(from_bits("w4a8"))
    folder = tmp_path_factory.mktemp("mixed") / "out"
    report = compile(pipeline, source, Plan(plan, SamplingPlan(samples=2, steps=2), target=Target(size_budget=0.25)), folder)
    return Mixed(folder, to_json(report))


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (folder / "transformer").iterdir()}


def file_bytes(folder: Path) -> tuple[int, int]:
    """Return bytes of the quantized layers as counted in the file, biases left out, and what they would take in 16 bits."""
    layers = json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]["layers"]
    stored = 0
    with safe_open(folder / "transformer" / files.WEIGHTS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            layer, _, field = key.rpartition(".")
            stored += file.get_tensor(key).nbytes if layer in layers and field != "bias" else 0
    return stored, sum(2 * e["weight"]["out_features"] * e["weight"]["in_features"] for e in layers.values())


# ---- size budgets


@pytest.mark.parametrize("budget", [0.21, 1.0])
def test_budget_is_kept_by_the_bytes_in_the_file(run, tmp_path: Path, budget: float):
    ran = run("--size-budget", budget)
    assert ran.code == 0, ran.err
    stored, whole = file_bytes(tmp_path / "out")
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    allocation = report["allocation"]
    assert stored <= budget * whole
    assert stored >= 0.93 * min(budget * whole, allocation["bytes"]) and stored == allocation["bytes"]
    assert allocation["bytes_in_16_bits"] == whole and allocation["budget_bytes"] == int(budget * whole)
    assert report["size"]["bits_per_weight"] == pytest.approx(16 * stored / whole, abs=1e-4)
    assert "weights: " in ran.out and f"at most {budget:g}" in ran.out
    for name, entry in allocation["layers"].items():
        assert report["layers"][name]["spec"]["weight"]["format"] == entry["chosen"]
    if budget == 1.0:
        for entry in allocation["layers"].values():
            assert entry["weights"][entry["chosen"]]["error"] == min(w["error"] for w in entry["weights"].values())


def test_report_holds_all_errors_and_the_choice_follows_from_them(mixed: Mixed):
    allocation = mixed.report["allocation"]
    assert allocation == json.loads((mixed.folder / REPORT).read_text())["allocation"]
    assert allocation["layers"].keys() == mixed.report["layers"].keys() and len(allocation["layers"]) == 18
    options = {
        name: tuple(Option(w, e["bytes"], e["error"]) for w, e in entry["weights"].items())
        for name, entry in allocation["layers"].items()
    }
    assert all(list(entry["weights"]) == list(WEIGHTS.values()) for entry in allocation["layers"].values())
    chosen = allocate(options, allocation["budget_bytes"])
    assert {name: o.weight for name, o in chosen.items()} == {n: e["chosen"] for n, e in allocation["layers"].items()}
    assert len({o.weight for o in chosen.values()}) > 1, "a random model's layers differ too"
    assert allocation["predicted_model_rel_rmse"] == pytest.approx(total_error(chosen))
    assert allocation["model_rel_rmse"] == mixed.report["model_rel_rmse"]
    # Errors of other layers add up or cancel a little; an order is not to be expected.
    assert 1 / 3 < allocation["model_rel_rmse"] / allocation["predicted_model_rel_rmse"] < 3
    predicted = [total_error(allocate(options, share * allocation["bytes_in_16_bits"])) for share in (0.2, 0.25, 0.3, 0.4, 0.5)]
    assert predicted == sorted(predicted, reverse=True)


def test_activations_and_rotation_stay_those_of_the_preset(mixed: Mixed):
    for name, entry in mixed.report["layers"].items():
        side = ".norm1." in name
        assert entry["spec"]["activation"]["bits"] == (16 if side else 8)
        assert entry["spec"]["rotation"] == "hadamard" and entry["method"] == "gptq"
    assert mixed.report["provenance"]["target"] == {"size_budget": 0.25, "max_output_error": None}
    config = json.loads((mixed.folder / "transformer" / "config.json").read_text())["quantization_config"]
    assert {rule["weight"] for rule in config["recipe"]["rule"]} == {"dense", "auto"}


def test_smallest_possible_budget_gives_the_narrowest_weights(run, tmp_path: Path):
    ran = run("--size-budget", "0.05")
    assert ran.code == 1 and "0.05 is" in ran.error and "need at least" in ran.error and not (tmp_path / "out.partial").exists()
    least = ran.error.rpartition("--size-budget ")[2]
    ran = run("--size-budget", least)
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert Counter(e["chosen"] for e in report["allocation"]["layers"].values()) == {"table2": 18}
    stored, whole = file_bytes(tmp_path / "out")
    assert stored <= float(least) * whole < stored + 0.001 * whole, "what the error advised is the least that works"


@pytest.mark.parametrize("flag", ["--size-budget", "--max-output-error"])
@pytest.mark.parametrize("value", ["0", "-0.25", "nan", "inf", "2.0"])
def test_hostile_targets_are_one_line(run, tmp_path: Path, flag: str, value: str):
    if (flag, value) == ("--max-output-error", "2.0"):
        pytest.skip("a bound that anything keeps is a bound")
    ran = run(f"{flag}={value}")
    assert ran.code == 1 and str(float(value)).removesuffix(".0") in ran.error
    assert not list(tmp_path.iterdir())


def test_both_targets_or_words_are_wrong_usage(run):
    assert run("--size-budget", "0.3", "--max-output-error", "0.1").code == 2
    assert run("--size-budget", "many").code == 2


# ---- recipes


def test_auto_needs_a_target_and_a_target_needs_auto(cli, run, pixel_dit: Path, tmp_path: Path):
    ran = run(bits="auto")
    assert ran.code == 1 and "--size-budget" in ran.error and "--max-output-error" in ran.error
    (tmp_path / "fixed.toml").write_text('[[rule]]\nmatch = "*"\nweight = "int4"\n')
    ran = run("--recipe", tmp_path / "fixed.toml", "--size-budget", "0.3", bits=None)
    assert ran.code == 1 and 'weight = "auto"' in ran.error
    with pytest.raises(ValueError, match="auto"):
        resolve(from_bits("auto"), [Layer("x", "other", 64, 64)])


@pytest.mark.parametrize("bits", ["auto", "autoa4", "autoa16"])
def test_auto_presets_leave_all_quantized_weights_open(bits: str):
    plan, like = from_bits(bits), from_bits(f"w4{bits[4:] or 'a8'}")
    assert plan.name == bits
    assert [r.activation_bits for r in plan.rules] == [r.activation_bits for r in like.rules]
    assert [r.weight for r in plan.rules] == ["dense", "auto", "auto", "auto"]
    assert from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("bits", ["autoa5", "autoa", "wautoa8", "auto "])
def test_unknown_auto_presets_name_the_near_ones(bits: str):
    with pytest.raises(ValueError, match="auto"):
        from_bits(bits)


def test_auto_must_fit_all_its_widths():
    with pytest.raises(ValueError, match="fp8"):
        Rule("*", weight="auto", activation_bits=8, activation_format="fp8")
    with pytest.raises(ValueError, match="hqq"):
        Rule("*", weight="auto", method="hqq")
    found = options(Recipe("r", (Rule("x*", "int4"), Rule("*", "auto"))), [Layer(n, "other", 64, 96) for n in ("x1", "y")])
    assert {name: list(plans) for name, plans in found.items()} == {"x1": ["int4"], "y": list(WEIGHTS.values())}
    assert {w: plan.rule.weight for w, plan in found["y"].items()} == {w: w for w in WEIGHTS.values()}


def test_layers_of_rules_with_a_weight_keep_it(run, tmp_path: Path):
    (tmp_path / "r.toml").write_text(
        '[[rule]]\nmatch = "role:outside"\nweight = "dense"\n[[rule]]\nmatch = "*.ff.net.2"\nweight = "int8"\n'
        '[[rule]]\nmatch = "*"\nweight = "auto"\nactivation_bits = 8\n'
    )
    ran = run("--recipe", tmp_path / "r.toml", "--size-budget", "0.26", bits=None)
    assert ran.code == 0, ran.err
    layers = json.loads((tmp_path / "out" / REPORT).read_text())["allocation"]["layers"]
    fixed = {name: entry for name, entry in layers.items() if name.endswith(".ff.net.2")}
    assert len(fixed) == 2 and all(list(e["weights"]) == ["int8"] and e["chosen"] == "int8" for e in fixed.values())
    assert all(len(e["weights"]) == 5 for name, e in layers.items() if name not in fixed)
    stored, whole = file_bytes(tmp_path / "out")
    assert stored <= 0.26 * whole, "the budget holds for all, fixed ones included"


# ---- drift bounds


def test_measured_drift_keeps_the_bound(run, tmp_path: Path, mixed: Mixed):
    bound = 1.2 * mixed.report["model_rel_rmse"]
    ran = run("--max-output-error", f"{bound:.6f}", bits="auto")
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    allocation = report["allocation"]
    assert report["model_rel_rmse"] <= bound and allocation["model_rel_rmse"] == report["model_rel_rmse"]
    assert 1 <= len(allocation["attempts"]) <= 5
    kept = [a for a in allocation["attempts"] if a["measured"] <= bound]
    assert min(a["bytes"] for a in kept) == allocation["bytes"] == file_bytes(tmp_path / "out")[0]
    assert allocation["bytes"] < 1.1 * mixed.report["allocation"]["bytes"], "a looser bound than this one's drift costs no more"
    assert "the least for an output error" in ran.out
    assert not (tmp_path / "out.partial").exists()


def test_bound_out_of_reach_says_what_the_widest_weights_give(run, tmp_path: Path):
    ran = run("--max-output-error", "0.0001", bits="auto")
    assert ran.code == 1 and "0.0001" in ran.error and "widest weights give 0.0" in ran.error and "autoa16" in ran.error
    assert not (tmp_path / "out").exists()


# ---- interrupted runs


@pytest.mark.parametrize(
    ("stop", "target"), [("sensitivity", ("--size-budget", "0.25")), ("quantize", ("--max-output-error", "0.02"))]
)
def test_resumed_run_gives_the_bytes_of_an_uninterrupted_one(
    run, mixed: Mixed, monkeypatch, tmp_path: Path, target: tuple[str, str], stop: str
):
    whole = mixed.folder if stop == "sensitivity" else tmp_path / "whole"
    if stop == "quantize":
        assert run(*target, output="whole").code == 0

    def broken(real: Callable, calls: int) -> Callable:
        def go(*args, **kwargs):
            nonlocal calls
            calls -= 1
            if calls < 0:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return go

    with monkeypatch.context() as patch:
        if stop == "sensitivity":
            patch.setattr(choose_widths.sensitivity, "sensitivity", broken(choose_widths.sensitivity.sensitivity, 1))
        else:
            patch.setattr(quantize_blocks, "quantize_layers", broken(quantize_layers, 6))
        assert run(*target).code == 130
    kept = {p.name for p in (tmp_path / "out.partial" / "work" / "transformer" / "sensitivity").glob("*.json")}
    assert kept == {f"transformer_blocks.{i}.json" for i in range(1 if stop == "sensitivity" else 2)}
    assert not (tmp_path / "out").exists()

    measured = []
    real = choose_widths.sensitivity.sensitivity
    monkeypatch.setattr(choose_widths.sensitivity, "sensitivity", lambda *a: measured.append(1) or real(*a))
    assert run("--size-budget", "0.3", "--resume").code == 1, "of another target"
    ran = run(*target, "--resume")
    assert ran.code == 0, ran.err
    assert len(measured) == (1 if stop == "sensitivity" else 0), "what was measured is not measured again"
    assert digests(tmp_path / "out") == digests(whole)
    reports = [json.loads((folder / REPORT).read_text()) for folder in (tmp_path / "out", whole)]
    assert reports[0]["allocation"] == reports[1]["allocation"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model_index.json", "scheduler", "transformer", REPORT}


# ---- inspect


def test_inspect_shows_what_was_chosen(cli, mixed: Mixed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    ran = cli("inspect", mixed.folder, "--all")
    assert ran.code == 0
    table = ran.out.partition("* chosen, ~ interpolated")[2]
    for name, entry in mixed.report["allocation"]["layers"].items():
        (line,) = [line for line in table.splitlines() if line.startswith(f"{name} ")]
        cells = dict(zip(WEIGHTS.values(), line.split()[1:], strict=True))
        assert [w for w, cell in cells.items() if cell.endswith("*")] == [entry["chosen"]]
        assert [w for w, cell in cells.items() if cell.startswith("~")] == ["table3", "table6"]
        for weight, cell in cells.items():
            assert cell.strip("~*") == f"{entry['weights'][weight]['error']:.5f}"
    counts = Counter(e["chosen"] for e in mixed.report["allocation"]["layers"].values())
    for weight, count in counts.items():
        assert f"{count} layers in {weight}" in table
    assert f"predicted {mixed.report['allocation']['predicted_model_rel_rmse']:.4f}" in table


def test_inspect_draws_a_panel_for_it(cli, mixed: Mixed, everything, tmp_path: Path):
    pytest.importorskip("matplotlib")
    for name, folder in (("with", mixed.folder), ("without", everything.folder)):
        assert cli("inspect", folder, "--plot", tmp_path / f"{name}.png").code == 0
    widths = [Image.open(tmp_path / f"{name}.png").size[0] for name in ("with", "without")]
    assert widths[0] > widths[1]


@pytest.mark.parametrize(
    "damage", [{"layers": {}}, {"layers": None}, {"bytes": None}, {"bytes_in_16_bits": 0}, {"attempts": [1]}, None]
)
def test_damaged_allocation_is_one_line(cli, mixed: Mixed, tmp_path: Path, damage: dict | None):
    import shutil

    folder = Path(shutil.copytree(mixed.folder, tmp_path / "copied"))
    report = json.loads((folder / REPORT).read_text())
    allocation = [] if damage is None else {k: v for k, v in (report["allocation"] | damage).items() if v is not None}
    (folder / REPORT).write_text(json.dumps(report | {"allocation": allocation}))
    ran = cli("inspect", folder)
    assert ran.code == 1 and REPORT in ran.error


def test_allocation_of_an_earlier_version_can_be_inspected(cli, mixed: Mixed, tmp_path: Path):
    folder = Path(shutil.copytree(mixed.folder, tmp_path / "earlier"))
    report = json.loads((folder / REPORT).read_text())
    report["allocation"]["max_drift"] = report["allocation"].pop("max_output_error")
    (folder / REPORT).write_text(json.dumps(report))
    ran = cli("inspect", folder)
    assert ran.code == 0 and "weights: " in ran.out, ran.err
