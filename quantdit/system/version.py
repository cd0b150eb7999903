"""The version of quantdit, which what it writes is marked with."""

from __future__ import annotations

VERSION = "0.1.0"
