"""What Python functions are given: numbers, dtypes and names of options, checked with errors that say what is expected."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch

# A size of a sample -> what pipelines call it.
SIZES = {"height": ("height",), "width": ("width",), "frames": ("num_frames", "video_length")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SEEDS = 2**31
# The numbers that functions take, with the least and the largest of each; None: any.
NUMBERS: dict[str, tuple[type, int | None, int | None]] = {
    **dict.fromkeys(("samples", "steps", "batch", "columns", "seeds", "probes", "threads", *SIZES), (numbers.Integral, 1, None)),
    **dict.fromkeys(("tokens", "finetune_steps"), (numbers.Integral, 0, None)),
    "seed": (numbers.Integral, 0, SEEDS - 1),
    "guidance": (numbers.Real, None, None),
}


def checked_numbers(given: Mapping[str, Any], optional: Collection[str] = ()) -> dict[str, int | float | None]:
    """Return what was given for some of NUMBERS as Python's own numbers.

    Args:
        given: values by their names in NUMBERS.
        optional: those that may be None.

    Raises:
        ValueError: naming the argument, what was given and what is expected.
    """
    found: dict[str, int | float | None] = {}
    for name, value in given.items():
        if name in optional and given[name] is None:
            found[name] = None
            continue
        kind, least, largest = NUMBERS[name]
        if isinstance(value, bool) or not isinstance(value, kind) or not -math.inf < value < math.inf:
            raise ValueError(f"{name} is {value!r:.60}, expected a {'whole' if kind is numbers.Integral else 'finite'} number")
        if (least is not None and value < least) or (largest is not None and value > largest):
            limits = f"at least {least}" if largest is None else f"{least} to {largest}"
            raise ValueError(f"{name} is {value}, expected {limits}")
        found[name] = int(value) if kind is numbers.Integral else float(value)
    return found


def dtype_of(dtype: str | torch.dtype) -> torch.dtype:
    """Return one of DTYPES, given as torch's own or by its name, `bfloat16` or `torch.bfloat16`.

    Raises:
        ValueError: it is none of them.
    """
    name = str(dtype).removeprefix("torch.")
    if not isinstance(dtype, str | torch.dtype) or name not in DTYPES:
        raise ValueError(f"dtype {dtype!r:.60} is unknown; use {', '.join(DTYPES)}, as text or as torch.{next(iter(DTYPES))}")
    return DTYPES[name]


def as_list(given: str | int | Sequence | None) -> Sequence | None:
    """Return prompts or classes as they are given, a text or a number alone as a tuple of one: letters are no prompts."""
    return (given,) if isinstance(given, str | int) else given


FORMER = {"calibration_steps": "finetune_steps"}  # options under their names of earlier versions
SYNONYMS = {"bits": "recipe", "model": "transformer", "prompt": "prompts"}  # what an option is called elsewhere


def check_options(function: str, given: Iterable[str], known: Collection[str]) -> None:
    """Refuse an option that a function does not have.

    Raises:
        ValueError: naming it, and the nearest that there is.
    """
    for name in given:
        if name not in known:
            meant = SYNONYMS.get(name)
            near = [meant] if meant in known else difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise ValueError(f"{function} has no option {name!r}; {hint}")


Given = ParamSpec("Given")
Made = TypeVar("Made")


def guesses_options(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """Decorate a function so that an option which it does not have is refused as `check_options` does."""
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Made:
        named = {FORMER.get(key, key): value for key, value in kwargs.items()}
        check_options(function.__name__, named, known)
        return function(*args, **named)

    return call
