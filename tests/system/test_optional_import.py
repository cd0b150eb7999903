"""What a missing package's message has a user run: a command that works where quantdit is installed as it is."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path

import pytest

from quantdit.system import optional_import

ROOT = Path(__file__).resolve().parents[2]
URL = "https://example.org/quantdit"


def test_in_a_clone_an_extra_is_installed_from_it():
    assert shlex.split(optional_import.install("onnx")) == [sys.executable, "-m", "pip", "install", "-e", f"{ROOT}[onnx]"]
    with pytest.raises(
        ModuleNotFoundError, match=re.escape(f"'nowhere' is not installed; run: {optional_import.install('plot')}")
    ):
        optional_import.require("nowhere.at_all", "plot")


@pytest.mark.parametrize(
    ("noted", "wanted"),
    [
        (None, "quantdit[onnx]"),
        ({"url": f"{URL}.whl", "archive_info": {}}, f"quantdit[onnx] @ {URL}.whl"),
        ({"url": "file:///a/quantdit", "dir_info": {}}, "quantdit[onnx] @ file:///a/quantdit"),
        ({"url": URL, "vcs_info": {"vcs": "git", "commit_id": "0123"}}, f"quantdit[onnx] @ git+{URL}@0123"),
    ],
    ids=["an index", "a wheel", "a folder", "git"],
)
def test_elsewhere_from_what_quantdit_was_installed_from(noted, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    places = [tmp_path / "site-packages"]
    information = places[0] / "quantdit-1.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Name: quantdit\nVersion: 1\n")
    if noted is not None:
        (information / "direct_url.json").write_text(json.dumps(noted))
    monkeypatch.setattr(optional_import, "distribution", lambda name: next(iter(metadata.distributions(name=name, path=places))))
    monkeypatch.setattr(optional_import, "__file__", str(places[0] / "quantdit/system/optional_import.py"))
    assert shlex.split(optional_import.install("onnx"))[-2:] == ["install", wanted]


def test_every_extra_that_is_named_exists_and_none_is_said_to_be_on_an_index():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = set(config["options.extras_require"])
    sources = [path for part in ("quantdit", "calibration", "kernels", "exporters") for path in (ROOT / part).rglob("*.py")]
    for path in (*sources, ROOT / "README.md"):
        text = path.read_text()
        assert not re.search(r"pip install '?quantdit", text), path
        named = re.findall(r"""install\(["'](\w[\w-]*)["']\)|require\(".+?", "([\w-]+)"\)|'\.\[([\w-]+)\]'""", text)
        assert {name for found in named for name in found if name} <= extras, path
