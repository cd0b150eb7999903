"""The calibration report, and the errors in a transformer's config, checked as they are read: they are files like any other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from quantdit.inspection.inspected_layer import WITH_DATA, WITHOUT_DATA
from quantdit.system import files

LARGEST = 1e30


def stated_errors(folder: Path, names: Collection[str]) -> dict[str, dict]:
    """Return the errors that quantdit.quantize left in a transformer's config.json; {} if none are there.

    Raises:
        files.CheckpointError: something else is there.
    """
    provenance = files.read_json(folder / "config.json")["quantization_config"].get("provenance")
    stated = provenance.get("layers", {}) if isinstance(provenance, dict) else {}
    if not (isinstance(stated, dict) and stated.keys() in (set(), set(names)) and all(map(_is_measured, stated.values()))):
        raise files.CheckpointError(
            f"{folder / 'config.json'}: quantization_config.provenance.layers does not fit the checkpoint; copy it again"
        )
    return stated


def checked_report(content: dict, layers: Collection[str], path: Path) -> dict[str, dict]:
    """Return what a calibration report says of each layer.

    Raises:
        files.CheckpointError: it does not fit.
    """
    report = content.get("layers")
    if not isinstance(report, dict) or report.keys() != set(layers) or not all(map(_is_entry, report.values())):
        raise files.CheckpointError(f"{path} does not fit the checkpoint; remove it (inspect works without) or calibrate again")
    if len({len(entry["activation_absmax"]) for entry in report.values() if WITH_DATA in entry}) > 1:
        raise files.CheckpointError(f"{path}: its layers differ in activation_absmax; remove it or calibrate again")
    return report


def checked_allocation(content: dict, names: Collection[str], path: Path) -> dict | None:
    """Return the report's allocation, None if the weights were not chosen by one.

    Raises:
        files.CheckpointError: it is damaged.
    """
    allocation = content.get("allocation")
    if allocation is None:
        return None
    if isinstance(allocation, dict) and "max_drift" in allocation:  # of earlier versions
        allocation = allocation | {"max_output_error": allocation["max_drift"]}
    whole = (
        _has(allocation, ALLOCATION)
        and allocation["layers"].keys() == set(names)
        and all(_has(e, CHOICE) and e["chosen"] in e["weights"] for e in allocation["layers"].values())
        and all(_has(w, WEIGHT) for e in allocation["layers"].values() for w in e["weights"].values())
        and all(_has(a, ATTEMPT) for a in allocation["attempts"])
        and (allocation["size_budget"] is None) != (allocation["max_output_error"] is None)
    )
    if not whole:
        raise files.CheckpointError(
            f"{path}: its allocation does not fit the checkpoint; remove the file (inspect works without) or calibrate again"
        )
    return allocation


def _is_entry(entry: object) -> bool:
    """Return whether a report's entry of a layer has all that is shown of it."""
    return (
        _has(entry, {"weight_histogram": lambda value: _has(value, HISTOGRAM) and sum(value["counts"]) > 0})
        and _is_measured(entry)
        and (WITH_DATA not in entry or _has(entry, {"activation_absmax": _are_numbers}))
        and all(_is_choice(entry.get(key)) for key in ("rotation", "smoothing"))
    )


def _is_measured(entry: object) -> bool:
    """Return whether an entry has the errors of a layer that saw calibration data, or of one that did not."""
    return _has(entry, SEEN if isinstance(entry, dict) and WITH_DATA in entry else UNSEEN)


def _is_choice(choice: object) -> bool:
    """Return whether this is how a rotation or smoothing was chosen, or None: there was nothing to choose."""
    errors = choice.get("errors") if isinstance(choice, dict) else None
    return choice is None or (isinstance(choice, dict) and (not errors or _is_table(errors)))


def _has(content: object, kinds: Mapping[str, Callable[[Any], bool]]) -> TypeGuard[dict]:
    return isinstance(content, dict) and all(key in content and is_one(content[key]) for key, is_one in kinds.items())


def _is_a(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kind)


def _is_number(value: object) -> bool:
    """Return whether a value is a number that no error exceeds: neither NaN nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < LARGEST


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and len(values) > 0 and all(map(_is_number, values))


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_number_or_none(value: object) -> bool:
    return value is None or _is_number(value)


SEEN = {WITH_DATA: _is_number, "weight_only_rel_rmse": _is_number, "rms": _is_number}
UNSEEN = {WITHOUT_DATA: _is_number}
HISTOGRAM = {"counts": _are_numbers, "reach": _is_number}
ALLOCATION = {
    "size_budget": _is_number_or_none,
    "max_output_error": _is_number_or_none,
    "bytes": _is_number,
    "bytes_in_16_bits": lambda value: _is_number(value) and value > 0,
    "predicted_model_rel_rmse": _is_number,
    "model_rel_rmse": _is_number,
    "attempts": _is_a(list),
    "layers": _is_a(dict),
}
CHOICE = {"chosen": _is_a(str), "weights": _is_a(dict)}
WEIGHT = {"error": _is_number, "measured": _is_a(bool)}
ATTEMPT = {"bytes": _is_number, "predicted": _is_number, "measured": _is_number}
