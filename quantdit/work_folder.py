"""The work folder of a calibration, `OUTPUT.partial`: begun, resumed, given its final name; and what to do about disk errors."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from quantdit import files

STATE = "identity.json"
WORK = "work"
FINISHED = "finished"


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that is there already.

    Raises:
        ValueError: a file, or a folder that is not empty and not to be overwritten.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; give a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"output {output} is not empty; choose another folder or pass --overwrite")


def open_partial(output: Path, identity: dict, resume: bool, overwrite: bool) -> Path:
    """Return the work folder, fresh or holding the blocks of an interrupted run of the same identity.

    Raises:
        ValueError: the output or the work folder holds something else, or a run of another identity.
    """
    check_output(output, overwrite)
    partial = output.with_name(output.name + ".partial")
    state = partial / STATE
    stored = json.loads(json.dumps(identity))
    if partial.exists() and resume and state.exists():
        if _identity(state) != stored:
            raise ValueError(
                f"{partial} was begun with another source, recipe or settings; --resume needs the same, --overwrite begins again"
            )
        return partial
    if partial.exists():
        if not partial.is_dir() or (not state.exists() and any(p.name != f"{STATE}.part" for p in partial.iterdir())):
            raise ValueError(f"{partial} is where work on {output.name} would go, but holds something else; move it away")
        if not resume and not overwrite and state.exists():
            raise ValueError(f"{partial} holds an interrupted run; pass --resume to go on with it, or --overwrite to begin again")
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    files.write_json(state, stored)
    return partial


def is_finished(folder: Path, identity: dict) -> bool:
    """Return whether a folder is the whole result of a run of this identity: killed before, or while, it got its name."""
    state = folder / STATE
    return state.exists() and files.read_json(state) == json.loads(json.dumps(identity | {FINISHED: True}))


def _identity(state: Path) -> dict:
    return {k: v for k, v in files.read_json(state).items() if k != FINISHED}


def copy_rest(source: Path, partial: Path, leave: Collection[str]) -> None:
    """Copy the pipeline's other parts, so that the output is whole, but for hidden ones and those of the names to leave."""
    for path in sorted(source.iterdir()):
        if path.name in leave or path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.copytree(path, partial / path.name, dirs_exist_ok=True)
        else:
            shutil.copy2(path, partial / path.name)


def publish(partial: Path, output: Path, identity: dict) -> None:
    """Give the finished folder its name; an old one is moved away first and removed last.

    Killed at any moment, `is_finished` holds for the folder that has the result, and calling this again ends the work.
    """
    if partial.exists():
        files.write_json(partial / STATE, identity | {FINISHED: True})
        shutil.rmtree(partial / WORK, ignore_errors=True)
        grave = None
        if output.exists():
            grave = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
            os.replace(output, grave / output.name)
        os.replace(partial, output)
        if grave is not None:
            shutil.rmtree(grave, ignore_errors=True)
    (output / STATE).unlink()


_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space and run the same command with --resume",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command with --resume",
    errno.EFBIG: "the file would be larger than the system allows (ulimit -f); raise the limit and use --resume",
    errno.EACCES: "no permission to write there; choose another --output",
    errno.EPERM: "no permission to write there; choose another --output",
    errno.EROFS: "the file system is read-only; choose another --output",
    errno.ENOTDIR: "a part of the path is a file; choose another --output",
    errno.EIO: "the disk reports an error of its own; choose another --output",
}


@contextmanager
def clear_disk_errors(output: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one line that says what to do.

    Raises:
        ValueError: no space, no permission, read-only, and the like.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors and shutil.copytree keep the error number only in their text.
        found = re.search(r"(?:os error |\[Errno )(\d+)", str(error))
        number = getattr(error, "errno", None) or (int(found[1]) if found else None)
        if number not in _REMEDIES:
            raise
        raise ValueError(f"cannot write {output}: {_REMEDIES[number]}") from error
