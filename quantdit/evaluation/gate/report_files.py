"""Reports and baselines as files: reading them, and checking every number that the gate uses."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path

from quantdit.evaluation.metrics.table import FORMAT, LARGEST, LAYERS, METRICS, is_share
from quantdit.system import files

REPORT = "report.json"
Sample = tuple[str, int]


def report_in(path: Path) -> Path:
    """Return a report's file: the path itself, or what `quantdit evaluate` wrote into that folder.

    Raises:
        ValueError: a folder without a report.
    """
    if not path.is_dir():
        return path
    if not (path / REPORT).exists():
        raise ValueError(f"{path}: a folder without {REPORT}; give the --output of quantdit evaluate, or the file")
    return path / REPORT


def read(path: Path, what: str) -> dict:
    """Return a report or a baseline.

    Raises:
        ValueError: it is not there or not whole.
    """
    if path.is_dir():
        raise ValueError(f"{path}: a folder; a {what} is a JSON file in it")
    if not path.exists():
        advice = "; --update-baseline makes it" if what == "baseline" else "; quantdit evaluate writes it"
        raise ValueError(f"{path}: no such {what}{advice}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: empty; make it again")
    content = files.read_json(path, finite=False)  # `check` names the key
    try:
        check(content, what)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return content


def check(content: dict, what: str) -> None:
    """Refuse a report or a baseline that lacks a key, or in which a number that the gate uses is not finite or out of range.

    Raises:
        ValueError: naming the key, what it holds and what was expected.
    """
    if content.get("format") != FORMAT:
        again = "remove it, and --update-baseline makes it anew" if what == "baseline" else "run quantdit evaluate again"
        raise ValueError(
            f"the {what}'s format is {_short(content.get('format'))}, expected {FORMAT}, which this version of quantdit writes;"
            f" {again}"
        )
    if what == "report":
        _check_report(content, "")
        _all_finite(content, "")
        return
    report = _object(content.get("report"), "report")
    _check_report(report, "report.")
    known = (*METRICS, *report["sets"], LAYERS)
    for name, margin in _object(content.get("margins"), "margins").items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"a margin for {_short(name)}, which nothing measures; {hint}")
        _real(margin, f"margins[{name!r}]", 1.0 if name in report["sets"] and not is_share(name) else 0.0)
    _all_finite(report, "report")


def _all_finite(value: object, where: str) -> None:
    """Refuse NaN and infinities anywhere, also where only people read the number."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, expected a finite number; make it again")
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        _all_finite(inner, f"{where}.{key}" if where else str(key))


def _check_report(report: dict, at: str) -> None:
    for key in ("identity", "versions", "reference", "candidate", "sampling", "sets", "probe", "floor"):
        _object(report.get(key), at + key)
    for key, value in report["identity"].items():
        _plain(value, f"{at}identity.{key}")
    for key, value in report["versions"].items():
        _words(value, f"{at}versions.{key}")
    _check_rows(report.get("samples"), f"{at}samples", [n for n in METRICS if n != "output_error"])
    if not report["samples"]:
        raise ValueError(f"{at}samples is empty; run quantdit evaluate again")
    for name, entry in report["sets"].items():
        where = f"{at}sets[{_short(name)}]"
        for key in ("drift", "standard_error", "noise_floor", "noise_floor_error"):
            _real(_object(entry, where).get(key), f"{where}.{key}", 0.0 if key.endswith("error") else -LARGEST)
    for kind, entry in report["floor"].items():
        for name, found in _object(entry, f"{at}floor[{_short(kind)}]").items():
            for key in ("mean", "harm"):
                where = f"{at}floor[{_short(kind)}][{_short(name)}]"
                _real(_object(found, where).get(key), f"{where}.{key}")
    probe = report["probe"]
    _check_rows(probe.get("samples"), f"{at}probe.samples", ["output_error"])
    for name, errors in _object(probe.get("layers"), f"{at}probe.layers").items():
        where = f"{at}probe.layers[{_short(name)}]"
        if len(_list(errors, where)) != len(probe["samples"]):
            raise ValueError(
                f"{where} has {len(errors)} numbers, expected one for each of {len(probe['samples'])} probed samples"
            )
        for i, error in enumerate(errors):
            _real(error, f"{where}[{i}]")


def _check_rows(rows: object, where: str, names: Sequence[str]) -> None:
    """Refuse rows that differ in their measures, and two rows of the same sample."""
    seen: set[Sample] = set()
    measured: set[str] = set()
    for i, row in enumerate(_list(rows, where)):
        key = _words(_object(row, f"{where}[{i}]").get("prompt"), f"{where}[{i}].prompt"), row.get("seed")
        if isinstance(key[1], bool) or not isinstance(key[1], int):
            raise ValueError(f"{where}[{i}].seed is {_short(key[1])}, expected a whole number")
        if key in seen:
            raise ValueError(f"{where}[{i}] has the prompt and seed of an earlier row; run quantdit evaluate again")
        seen.add(key)
        having = {name for name in names if name in row}
        measured = measured or having
        if having != measured or not having:
            raise ValueError(f"{where}[{i}] holds other measures than {where}[0]; run quantdit evaluate again")
        for name in having:
            metric = METRICS[name]
            _real(row[name], f"{where}[{i}].{name}", metric.low, metric.high)
            if metric.equal:
                for side in ("reference", "candidate"):
                    _real(row.get(f"{name}_{side}"), f"{where}[{i}].{name}_{side}")


def _real(value: object, where: str, low: float = -LARGEST, high: float = LARGEST) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{where} is {_short(value)}, expected a number from {low:g} to {high:g}")


def _object(value: object, where: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {_short(value)}, expected an object; run quantdit evaluate again")
    return value


def _list(value: object, where: str) -> list:
    if not isinstance(value, list):
        raise ValueError(f"{where} is {_short(value)}, expected a list; run quantdit evaluate again")
    return value


def _words(value: object, where: str) -> str:
    if not isinstance(value, str) or _unprintable(value):
        raise ValueError(f"{where} is {_short(value)}, expected a text")
    return value


def _plain(value: object, where: str) -> None:
    """Refuse what is neither a text, a number, nothing, nor a list of these."""
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, str):
            _words(part, where)
        elif part is not None:
            _real(part, where)


def _unprintable(text: str) -> bool:
    """Tell halves of characters (lone surrogates), which no terminal or file takes."""
    return any("\ud800" <= c <= "\udfff" for c in text)


def _short(value: object) -> str:
    """Return a value as a message shows it: a container by its kind, anything else cut, and on one line."""
    return {dict: "an object", list: "a list", type(None): "missing"}.get(type(value)) or repr(value)[:60]
