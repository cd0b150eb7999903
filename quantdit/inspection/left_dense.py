"""What of a written component stayed as it was: `quantdit calibrate` says so, for it may outweigh the quantized layers."""

from __future__ import annotations

from pathlib import Path

from quantdit.system import files

SHARE = 0.05  # of the component's bytes, from which on a module is named


def left_dense(folder: Path) -> dict[str, int]:
    """Return the bytes of modules without a quantized layer in them, the largest first, those of at least SHARE alone.

    A module is named by its path, which is as short as it can be: `model.visual` rather than each linear in it.

    Raises:
        files.CheckpointError: no quantized component, or a damaged one.
    """
    layers = files.read_json(folder / "config.json")["quantization_config"]["layers"]
    with_quantized = {prefix for name in layers for prefix in _prefixes(name)}
    sizes, found = files.tensor_bytes(folder), dict[str, int]()
    for key, size in sizes.items():
        path = next((prefix for prefix in _prefixes(key)[:-1] if prefix not in with_quantized), None)
        if path is not None:
            found[path] = found.get(path, 0) + size
    least = SHARE * sum(sizes.values())
    return {path: size for path, size in sorted(found.items(), key=lambda entry: -entry[1]) if size >= least}


def _prefixes(path: str) -> list[str]:
    """Return `a`, `a.b` and `a.b.c` for `a.b.c`."""
    names = path.split(".")
    return [".".join(names[: count + 1]) for count in range(len(names))]
