"""`quantdit.inspect`: what it returns, and that the command shows the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import quantdit


def test_the_command_shows_what_the_function_returns(cli, everything, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "90")
    found = quantdit.inspect(str(everything.folder))
    assert cli("inspect", everything.folder).out == f"{found}\n"
    assert cli("inspect", everything.folder, "--all", "--by", "block").out == found.text(every=True, by="block") + "\n"
    assert json.loads(cli("inspect", everything.folder, "--json").out) == json.loads(json.dumps(found.to_dict()))
    assert max(map(len, found.text(60).splitlines())) <= 60 and len(repr(found).splitlines()) == 1


def test_layers_are_those_of_the_report(everything):
    found, report = quantdit.inspect(everything.folder), everything.report["layers"]
    assert found.layers.keys() == found.modules.keys() == report.keys()
    for name, layer in found.layers.items():
        assert (layer.name, layer.error, layer.has_data) == (name, report[name]["rel_rmse"], True)
        assert layer.shape == (found.modules[name].out_features, found.modules[name].in_features)
    assert found.report == report and found.size == everything.report["size"] and found.allocation is None


def test_what_cannot_be_inspected_or_shown_is_a_value_error(everything, pixel_dit: Path, tmp_path: Path):
    for folder, words in ((3, "folder is a int, expected a path"), ("", "folder is empty"), (pixel_dit, str(pixel_dit))):
        with pytest.raises(ValueError, match=words):
            quantdit.inspect(folder)
    found = quantdit.inspect(everything.folder)
    with pytest.raises(ValueError, match="cannot group layers by 'size'; use role or block"):
        found.text(by="size")
    with pytest.raises(ValueError, match=r"plots are written as \.png; call it x\.png"):
        found.plot(tmp_path / "x.jpg")
