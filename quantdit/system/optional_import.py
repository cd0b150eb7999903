"""Import of the libraries that some commands alone need, so that `import quantdit` stays light, and how to install them."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

PIP = shlex.join([sys.executable, "-m", "pip"])  # of the environment that runs, which need not be the shell's


def require(module: str, extra: str = "eval") -> ModuleType:
    """Import `module`, or say which extra of quantdit brings it.

    Raises:
        ModuleNotFoundError: if the module, or something it imports, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this needs {module!r}, and {error.name!r} is not installed; run: {install(extra)}", name=error.name
        ) from error


def numba_is_installed() -> bool:
    """Return whether numba, of the extra `fast`, compiles what calibration does many times."""
    return find_spec("numba") is not None


def install(extra: str) -> str:
    """Return the command that installs an extra of setup.cfg from where quantdit itself is: a clone, a URL, or else an index."""
    clone = Path(__file__).resolve().parents[2]
    wanted = ["-e", f"{clone}[{extra}]"] if (clone / "setup.cfg").exists() else [f"quantdit[{extra}]{_origin()}"]
    return f"{PIP} install {shlex.join(wanted)}"


def _origin() -> str:
    """Return ` @ URL` of what quantdit was installed from, as pip notes it (PEP 610); nothing of an index."""
    try:
        noted = distribution("quantdit").read_text("direct_url.json")
    except PackageNotFoundError:
        noted = None
    if noted is None:
        return ""
    origin = json.loads(noted)
    vcs = origin.get("vcs_info")
    return f" @ {vcs['vcs']}+{origin['url']}@{vcs['commit_id']}" if vcs else f" @ {origin['url']}"
