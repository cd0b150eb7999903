"""Tile configurations: a literal few for each kernel and architecture, the first of them unless a timing chose another.

With QUANTDIT_TUNE=1 the first call of a shape times all of its configurations, for at most LIMIT seconds, and keeps the fastest
in `$XDG_CACHE_HOME/quantdit/kernels.json`, which later processes read, tuning or not.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import triton

LIMIT = 10.0  # seconds for all configurations of one shape, compilation included
ROUNDS = 5


_CHOSEN: dict[str, Config] = {}


@dataclass(frozen=True)
class Config:
    """A tile of bm tokens by bn outputs, bk inputs at a time, by `warps` with `stages` loads under way; `splits` of k."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    splits: int = 1


def cache_file() -> Path:
    """Return where chosen configurations are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantdit" / "kernels.json"


def chosen(kernel: str, shape: tuple, configs: tuple[Config, ...], run: Callable[[Config], object]) -> Config:
    """Return the configuration for one shape: the one kept, the fastest if tuning, else the first.

    Args:
        kernel: name under which the choice is kept.
        shape: whatever the choice depends on, besides device and versions.
        configs: candidates, the best guess first.
        run: calls the kernel with a configuration.
    """
    if len(configs) == 1:
        return configs[0]
    key = " ".join(map(str, (kernel, _device(), torch.__version__, triton.__version__, *shape)))
    if key not in _CHOSEN:
        kept = _read(cache_file()).get(key)
        if kept in configs:
            _CHOSEN[key] = kept
        elif os.environ.get("QUANTDIT_TUNE") == "1" and torch.cuda.is_available():
            _CHOSEN[key] = _fastest(configs, run)
            _write(cache_file(), key, _CHOSEN[key])
        else:
            _CHOSEN[key] = configs[0]
    return _CHOSEN[key]


def _fastest(configs: tuple[Config, ...], run: Callable[[Config], object]) -> Config:
    times: dict[Config, float] = {}
    end = time.monotonic() + LIMIT
    for config in configs:
        if times and time.monotonic() > end:
            break
        try:
            run(config)  # compiles
            times[config] = statistics.median(_milliseconds(run, config) for _ in range(ROUNDS))
        except triton.runtime.errors.OutOfResources:
            continue
    return min(times, key=times.__getitem__) if times else configs[0]


def _milliseconds(run: Callable[[Config], object], config: Config) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run(config)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


@lru_cache(maxsize=1)
def _device() -> str:
    return torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu"


def _read(path: Path) -> dict[str, Config]:
    try:
        return {key: Config(**fields) for key, fields in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):  # none yet, or of another version
        return {}


def _write(path: Path, key: str, config: Config) -> None:
    content = {k: vars(c) for k, c in (_read(path) | {key: config}).items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            file.write(json.dumps(content, indent=0, sort_keys=True))
        os.replace(file.name, path)
    except OSError:
        return  # a read-only home: this process keeps the choice, the next one times again
