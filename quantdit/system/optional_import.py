"""Import of the libraries that some commands alone need, so that `import quantdit` stays light."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str = "eval") -> ModuleType:
    """Import `module`, or say which extra of quantdit brings it.

    Raises:
        ModuleNotFoundError: if the module, or something it imports, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this needs {module!r}, and {error.name!r} is not installed; run: pip install 'quantdit[{extra}]'",
            name=error.name,
        ) from error
