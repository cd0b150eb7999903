"""The committed baselines and the workflow that uses them: readable, and of commands that the program takes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

import detection
from quantdit.cli import calibrate, evaluate, gate
from quantdit.cli.command_line import command_parser
from quantdit.evaluation.gate import judge
from quantdit.evaluation.metrics.table import FORMAT

ROOT = Path(__file__).resolve().parents[2]
BASELINES = sorted((ROOT / "reports" / "baselines").glob("*.json"))
WORKFLOW = ROOT / ".github" / "workflows" / "gate.yml"


def test_both_embedded_models_have_a_baseline():
    assert [path.stem for path in BASELINES] == ["emoji-wan-w4a8", "fashion-dit-w4a8"]


@pytest.mark.parametrize("path", BASELINES, ids=lambda p: p.stem)
def test_a_baseline_passes_itself_and_fails_once_a_layer_is_off(path: Path):
    baseline = judge.read(path, "baseline")
    report = json.loads(path.read_text())["report"] | {"format": FORMAT}
    assert judge.gate(report, baseline).verdict == judge.PASS
    name = next(iter(report["probe"]["layers"]))
    report["probe"]["layers"][name] = [value + 9 for value in report["probe"]["layers"][name]]
    failed = judge.gate(report, baseline)
    assert failed.verdict == judge.FAIL and name in judge.summary(failed)
    assert set(report["floor"]) == {"other seeds", "other batch", "other dtype"}


def test_layers_that_the_report_lacks_are_said_and_distances_alone_decide_nothing():
    baseline = judge.read(BASELINES[0], "baseline")
    report = json.loads(BASELINES[0].read_text())["report"] | {"format": FORMAT}
    layers = report["probe"]["layers"]
    report["probe"]["layers"] = dict(list(layers.items())[3:])
    assert "3 layers of the baseline are not in the report" in judge.summary(judge.gate(report, baseline))
    sets = baseline | {"margins": {name: baseline["margins"][name] for name in report["sets"]}}
    with pytest.raises(ValueError, match=r"none of the measures in common that decide \(PSNR, .*--update-baseline"):
        judge.gate(report, sets)


def test_the_detection_table_is_what_its_rows_say():
    home = ROOT / "reports" / "gate"
    rows = [json.loads(line) for line in (home / "detection.jsonl").read_text().splitlines()]
    text = detection.table(rows)
    assert text == (home / "detection.md").read_text()
    assert "20 of 20 | 83 to 100 %" in text and "100 of 100 caught, 96 to 100 %" in text  # 1 - 0.025 ** (1 / n), by hand


def test_the_workflow_s_commands_are_those_of_the_program():
    text = WORKFLOW.read_text()
    variables = dict(re.findall(r"^  ([A-Z]+): (.*?)(?:  #.*)?$", text, re.MULTILINE))
    found = []
    for line in re.findall(r"run: quantdit (.*)$", text, re.MULTILINE):
        words = shlex.split(re.sub(r"\$([A-Z]+)", lambda m: variables[m[1]].strip(), line))
        found.append(command_parser().parse_args(words).run)
    assert found == [calibrate.run, evaluate.run, gate.run]
    assert (ROOT / variables["BASELINE"].strip()).exists()
