"""What models of transformers need that models of diffusers do not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def without_cache(models: Iterable[nn.Module]) -> Iterator[None]:
    """Have language models keep no keys and values while the body runs: blocks that write into a cache cannot be run again."""
    found: list[Any] = [getattr(module, "config", None) for model in models for module in model.modules()]
    configs = {id(config): config for config in found if hasattr(config, "use_cache")}
    before = {key: config.use_cache for key, config in configs.items()}
    try:
        for config in configs.values():
            config.use_cache = False
        yield
    finally:
        for key, config in configs.items():
            config.use_cache = before[key]
