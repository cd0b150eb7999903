"""Sealed JSON: the JSON files of a work folder, each with a sha256 that exposes damage and files of another run.

`{..., "seal": sha256 of the rest and of the run}`. Interrupted runs go on from such files, so a wrong one must never pass.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from quantdit.system import files

SEAL = "seal"
REMEDY = "begin again with --overwrite in place of --resume"


def write(path: Path, content: dict, run: str) -> None:
    """Write a JSON object atomically with the seal of a run, flushed to the disk.

    Args:
        path: of the file.
        content: to write.
        run: names the run; any text.
    """
    files.write_json(path, content | {SEAL: _seal(content, run)})


def read(path: Path, run: str) -> dict:
    """Return what `write` was given.

    Raises:
        ValueError: missing, damaged, or written by another run.
    """
    try:
        content = files.read_json(path)
    except files.CheckpointError as error:
        raise ValueError(f"{path} is missing or damaged ({error.__cause__ or error}); {REMEDY}") from error
    if content.pop(SEAL, None) != _seal(content, run):
        raise ValueError(f"{path} is damaged, or of another run; {REMEDY}")
    return content


def _seal(content: dict, run: str) -> str:
    return hashlib.sha256((run + json.dumps(content)).encode()).hexdigest()
