"""Samples kept on disk, each under a hash of all that it depends on, and checked against what was written."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantdit.pipelines.generate import Sampling
from quantdit.pipelines.source import Source
from quantdit.pipelines.step_plans import followed
from quantdit.system import files

PACKAGES = ("quantdit", "torch", "diffusers", "numpy")
RECORD = "sample"  # key of what a kept file says of its sample


def identity_of(pipeline: Any, source: Source, asked: Sampling) -> dict:
    """Return all that a sample depends on besides its prompt and seed."""
    options = {key: value for key, value in asdict(asked).items() if key not in ("samples", "seed", "prompts", "classes")}
    return (
        options
        | {
            "model": folder_digest(source.folder),
            "pipeline": type(pipeline).__name__,
            "device": str(getattr(pipeline, "device", "cpu")).split(":")[0],
            "loaded dtype": str(getattr(pipeline, "dtype", "")),
            "versions": versions(),
            "code": _code_digest(),
        }
        | ({"step plans": {part: plan.to_dict() for part, plan in plans.items()}} if (plans := followed(pipeline)) else {})
    )


def versions() -> dict[str, str]:
    """Return the versions of the packages whose arithmetic a sample goes through."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def folder_digest(folder: Path) -> str:
    """Return a sha256 over the names and contents of a model's safetensors and JSON files."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json", ".txt", ".model") and p.is_file()):
        if path.name == "calibration_report.json":
            continue  # says how long things took
        total.update(f"{path.relative_to(folder).as_posix()} {files.sha256(path)}\n".encode())
    return total.hexdigest()


def _code_digest() -> str:
    """Return a sha256 over quantdit's own source: samples that other code made are not reused."""
    others = [import_module(f"quantdit.{name}").__path__ for name in ("kernels", "calibration")]
    homes = [Path(__file__).parents[1], *(Path(path) for paths in others for path in paths)]
    total = hashlib.sha256()
    for path in sorted(p for home in homes for p in home.rglob("*.py") if "evaluation" not in p.parts):
        total.update(path.read_bytes())
    return total.hexdigest()


def find(cache: Path | None, keys: Sequence[dict]) -> dict[int, dict[str, Tensor]]:
    """Return the kept samples by their places in `keys`; warns once if some are damaged, which are sampled again."""
    if cache is None:
        return {}
    found: dict[int, dict[str, Tensor]] = {}
    damaged = []
    for i, key in enumerate(keys):
        path = _path(cache, key)
        if not path.exists():
            continue
        kept = _read(path, key) if path.is_file() else None  # reading a pipe would block
        if kept is None:
            damaged.append(path.name)
        else:
            found[i] = kept
    if damaged:
        warnings.warn(
            f"{cache}: {len(damaged)} of {len(damaged) + len(found)} kept samples are not what was written ({damaged[0]});"
            " they are sampled again",
            files.Advice,
            stacklevel=2,
        )
    return found


def _path(cache: Path, key: dict) -> Path:
    return cache / f"{hashlib.sha256(_text(key).encode()).hexdigest()}.safetensors"


def _text(key: dict) -> str:
    return json.dumps(key, sort_keys=True)


def _read(path: Path, key: dict) -> dict[str, Tensor] | None:
    """Return a kept sample; None for one that is damaged, or of another prompt, seed or model."""
    try:
        with safe_open(path, framework="pt") as file:
            made = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            whole = (file.metadata() or {}).get(RECORD) == _record(made, key)
    except (SafetensorError, OSError):
        return None
    return made if whole else None


def _record(made: dict[str, Tensor], key: dict) -> str:
    """Return what a file says of its sample: all it was made with, shapes, dtypes, and a sha256 of that and the numbers."""
    tensors = {name: [str(t.dtype), list(t.shape)] for name, t in sorted(made.items())}
    text = _text(key | {"tensors": tensors})
    total = hashlib.sha256(text.encode())
    for _, tensor in sorted(made.items()):
        total.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return f"{total.hexdigest()} {text}"


def write(made: dict[str, Tensor], cache: Path, key: dict) -> None:
    path = _path(cache, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, part, metadata={RECORD: _record(made, key)})
    files.fsync(part)
    os.replace(part, path)
