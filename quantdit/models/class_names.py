"""Classes of class-conditional pipelines by number and by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def class_names(pipeline: object) -> Sequence[str]:
    """Return the names of a pipeline's classes by their numbers, of its config's `class_names`; none where it has none."""
    return getattr(getattr(pipeline, "config", None), "class_names", None) or ()


def class_number(pipeline: Any, label: int | str) -> int:
    """Return the number of a class that is given by its number or its name.

    Raises:
        ValueError: the model has no such class.
    """
    known, names = pipeline.transformer.config.num_embeds_ada_norm, class_names(pipeline)
    if isinstance(label, str):
        if label in names:
            return list(names).index(label)
        says = f"this model's are {', '.join(names)}" if names else f"this model knows classes by number, 0..{known - 1}"
        raise ValueError(f"no class {label!r}; {says}")
    if not 0 <= label < known:
        raise ValueError(f"class {label} is out of range: this model knows classes 0..{known - 1}")
    return label
