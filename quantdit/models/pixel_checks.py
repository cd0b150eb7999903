"""What both pixel pipelines refuse: another size than their one, and tensors that a callback cannot have."""

from __future__ import annotations

from collections.abc import Sequence


def check_size(pipeline: object, **asked: int | None) -> None:
    """Refuse a size that is not the one a pipeline of one size makes (`pipeline.sizes`).

    Raises:
        ValueError: it is another one.
    """
    for name, value in asked.items():
        if value not in (None, pipeline.sizes[name]):
            own = " x ".join(str(side) for side in pipeline.sizes.values())
            raise ValueError(f"{name} is {value}, but this model makes {own} pixels and nothing else; leave {name} out")


def check_callback(pipeline: object, names: Sequence[str]) -> None:
    """Refuse tensors that a callback cannot be given.

    Raises:
        ValueError: there is no such tensor.
    """
    if unknown := [name for name in names if name not in pipeline._callback_tensor_inputs]:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs has {unknown[0]!r}; there is {', '.join(pipeline._callback_tensor_inputs)}"
        )
