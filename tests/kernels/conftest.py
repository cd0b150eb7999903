"""What the tests of the kernels share."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOM = Path(__file__).parents[2] / "kernels" / "triton_ops"


@pytest.fixture(scope="session")
def launched() -> set[str]:
    """Return the names of the kernels that are launched on a grid, `name[grid](...)`, anywhere in the package."""
    found = set()
    for path in ROOM.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name):
                found.add(node.func.value.id)
    return found
