"""What the process takes, and how sizes are written."""

from __future__ import annotations

import subprocess
import sys

from quantdit.system import memory


def test_the_peak_is_that_of_this_process_alone() -> None:
    """A process starts with the ru_maxrss of the one that forked it."""
    held = bytearray(300 << 20)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    code = "from quantdit.system import memory; print(memory.peak())"
    # A function before the start makes Python fork, which vfork would spare.
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, preexec_fn=lambda: None)
    assert memory.peak() > 300 << 20
    assert 0 < int(made.stdout) < 250 << 20
