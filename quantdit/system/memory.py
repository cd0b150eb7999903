"""Memory of the machine and of this process, in bytes."""

from __future__ import annotations

import ctypes
import math
import os
import re
import resource
from pathlib import Path

STATUS = Path("/proc/self/status")
M_MMAP_THRESHOLD = -3  # of malloc.h


def physical() -> int:
    """Return the memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak() -> int:
    """Return the largest resident size of this process so far."""
    # The kernel's own count, where it has one: ru_maxrss begins with what the process that started this one held.
    if STATUS.exists() and (found := re.search(r"^VmHWM:\s*(\d+) kB", STATUS.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_gib(size: int) -> str:
    """Return a size as `2.5GiB`, rounded up; below a tenth of that in MiB."""
    if size < 2**30 / 10:
        return f"{math.ceil(size / 2**20 * 10) / 10:g}MiB"
    return f"{math.ceil(size / 2**30 * 10) / 10:g}GiB"


def give_back() -> None:
    """Return to the system what was freed: glibc keeps freed tensors of up to 32 MiB, in pieces, for gigabytes after some blocks.

    Does nothing where the C library is another one.
    """
    _tell_glibc("malloc_trim", 0)


def give_back_at_once() -> None:
    """From now on return freed tensors of 1 MiB or more to the system at once, which costs some time and saves gigabytes."""
    _tell_glibc("mallopt", M_MMAP_THRESHOLD, 2**20)


def _tell_glibc(function: str, *arguments: int) -> None:
    try:
        getattr(ctypes.CDLL(None), function)(*arguments)
    except (AttributeError, OSError, TypeError):
        return
