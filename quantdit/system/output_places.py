"""Whether something can be written to a place, asked before minutes are spent on making it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

PICTURES = (".png",)
ANIMATIONS = (".webp", ".gif", ".mp4")


def require_suffix(path: Path, known: Sequence[str], what: str) -> None:
    """Check that the name of a file says in which form it is to be written.

    Args:
        path: of the file.
        known: suffixes, in lower case.
        what: is written, in the plural.

    Raises:
        ValueError: it has another suffix, or none; names those that there are.
    """
    if path.suffix.lower() not in known:
        raise ValueError(f"{path}: {what} are written as {', '.join(known)}; call it {path.with_suffix(known[0]).name}")


def require_folder(folder: Path) -> None:
    """Check that files can be written into a folder, which need not be there yet.

    Raises:
        ValueError: a file or a link to nothing is in its place or in that of a folder above, or it cannot be written.
    """
    place = folder.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    _check_link(place)
    if not place.is_dir():
        raise ValueError(f"{folder}: {place} is a file, a folder is needed there; choose another path")
    if not os.access(place, os.W_OK | os.X_OK, effective_ids=True):
        raise ValueError(f"{folder}: nothing can be written into {place}; choose another path, or change its permissions")


def require_file(path: Path) -> None:
    """Check that a file can be written, its folder included.

    Raises:
        ValueError: a folder, a device, a pipe, a link to nothing or a file that cannot be written is in its place, or its folder
            cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; choose the name of a file")
    require_folder(path.parent)
    _check_link(path)
    if path.exists() and not path.is_file():  # what is written is renamed, and would take its place
        raise ValueError(f"{path} is no file, but a device or a pipe; choose the name of a file")
    if path.exists() and not os.access(path, os.W_OK, effective_ids=True):
        raise ValueError(f"{path} cannot be written; choose another name, or change its permissions")


def require_picture(path: Path) -> None:
    """Check that a file can be written, and that its name says it is a picture or an animation.

    Raises:
        ValueError: as `require_file` and `require_suffix`.
    """
    require_file(path)
    require_suffix(path, (*PICTURES, *ANIMATIONS), "images (.png) or clips")


def _check_link(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to {os.readlink(path)}, which does not exist; remove it, or choose another path")
