"""How properties are searched for counterexamples: the same examples in every run, and no limit of time."""

from __future__ import annotations

from hypothesis import settings

LAW = settings(derandomize=True, deadline=None, max_examples=40)
