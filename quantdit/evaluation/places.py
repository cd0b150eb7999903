"""Whether something can be written to a place, asked before minutes are spent on making it."""

from __future__ import annotations

import os
from pathlib import Path


def require_folder(folder: Path) -> None:
    """Check that files can be written into a folder, which need not be there yet.

    Raises:
        ValueError: a file is in its place or in that of a folder above, or it cannot be written.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"{folder}: {place} is a file, a folder is needed there; choose another path")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: nothing can be written into {place}; choose another path, or change its permissions")


def require_file(path: Path) -> None:
    """Check that a file can be written, its folder included.

    Raises:
        ValueError: a folder is in its place, or its own cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; choose the name of a file")
    require_folder(path.parent)
