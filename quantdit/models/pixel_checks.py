"""What both pixel pipelines do: refuse another size than their one and tensors that a callback cannot have; draw noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_size(pipeline: Any, **asked: int | None) -> None:
    """Refuse a size that is not the one a pipeline of one size makes (`pipeline.sizes`).

    Raises:
        ValueError: it is another one.
    """
    for name, value in asked.items():
        if value not in (None, pipeline.sizes[name]):
            own = " x ".join(str(side) for side in pipeline.sizes.values())
            raise ValueError(f"{name} is {value}, but this model makes {own} pixels and nothing else; leave {name} out")


def check_callback(pipeline: Any, names: Sequence[str]) -> None:
    """Refuse tensors that a callback cannot be given.

    Raises:
        ValueError: there is no such tensor.
    """
    if unknown := [name for name in names if name not in pipeline._callback_tensor_inputs]:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs has {unknown[0]!r}; there is {', '.join(pipeline._callback_tensor_inputs)}"
        )


def noise(
    shape: tuple[int, ...], count: int, generator: torch.Generator | list[torch.Generator] | None, device: torch.device, what: str
) -> Tensor:
    """Return `[count, *shape]` float32, drawn on the generator's own device so that dtype and device do not change the sample.

    Args:
        shape: of one sample.
        count: how many.
        generator: one for all, or one for each.
        device: where the noise is wanted.
        what: one sample is called.

    Raises:
        ValueError: another number of generators.
    """
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(f"got {len(generator)} generators for {count} {what}s; give one per {what}")
    generators = generator if isinstance(generator, list) else [generator] * count
    drawn = [torch.randn(shape, generator=g, device=g.device if g is not None else "cpu").to(device) for g in generators]
    return torch.stack(drawn)
