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


def test_without_a_terminal_nothing_is_cut_or_wrapped(cli, everything, monkeypatch: pytest.MonkeyPatch):
    def no_terminal(descriptor: int) -> None:
        raise OSError(descriptor)

    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("os.get_terminal_size", no_terminal)
    found = quantdit.inspect(everything.folder)
    shown = cli("inspect", everything.folder, "--all").out
    assert shown == found.text(10**6, every=True) + "\n" and "…" not in shown
    lines = {line.split()[0]: line for line in reversed(shown.splitlines()) if line}
    assert all(lines[name].endswith(layer.transform) for name, layer in found.layers.items())


def test_a_narrow_terminal_cuts_the_beginnings_of_names_alone(everything):
    found = quantdit.inspect(everything.folder)
    shortened = 0
    for width in range(60, 200, 4):
        text = found.text(width, every=True)
        assert max(map(len, text.splitlines())) <= width
        assert all(word.startswith("…") for word in text.split() if "…" in word)
        table = text.partition("\nlayer ")[2].partition("\n\n")[0].splitlines()[1:]
        if len(table) != len(found.layers) or "…" not in text:
            assert all(f"\n{name}" in text for name in found.layers), "whole, on a line of its own"
            continue
        shortened += 1
        for line, (name, layer) in zip(table, found.layers.items(), strict=True):
            shown = line.split()[0]
            assert shown == name or (name.endswith(shown.removeprefix("…")) and len(shown) >= 16)
            assert line.endswith(layer.transform) and f" {layer.activations} " in line
    assert shortened


@pytest.fixture
def drawn(everything, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list:
    """The panels below the histograms, and the bar of colors, of a folder sampled with fewer steps than there are buckets."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", figures.append)
    quantdit.inspect(everything.folder).plot(tmp_path / "x.png")
    close("all")
    return figures[0].axes[3:]


def test_picture_names_layers_by_what_tells_them_apart_in_letters_that_can_be_read(drawn, everything):
    labels = drawn[0].get_yticklabels()
    names = [name.removeprefix("transformer_blocks.") for name in everything.report["layers"]]
    assert [label.get_text() for label in labels] == names
    assert "transformer_blocks. left out" in drawn[0].get_ylabel()
    row = drawn[0].get_window_extent().height / len(names) * 72 / drawn[0].figure.get_dpi()
    assert all(10 <= label.get_fontsize() <= row for label in labels), "in points"


def test_picture_leaves_parts_of_sampling_out_that_no_step_fell_into_and_says_so(drawn, everything):
    peaks = list(zip(*(entry["activation_absmax"] for entry in everything.report["layers"].values()), strict=True))
    seen = [str(part) for part, values in enumerate(peaks) if any(values)]
    assert 0 < len(seen) < len(peaks)
    assert [label.get_text() for label in drawn[1].get_xticklabels()] == seen
    assert drawn[1].images[0].get_array().shape == (len(everything.report["layers"]), len(seen))
    caption = " ".join(drawn[1].get_xlabel().split())
    assert f"that no sampling step fell into are left out: {len(peaks) - len(seen)} of {len(peaks)}" in caption
    assert "rel_rmse: root mean square error" in drawn[0].get_xlabel().replace("\n", " ")
