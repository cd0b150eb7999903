"""Types of arguments, and options that several commands have."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import Any

# Options that are fields of Sampling.
SAMPLING = ("samples", "seed", "steps", "guidance", "negative_prompt", "height", "width", "frames", "dtype", "batch", "classes")


def add_accept_config(parser: argparse._ActionsContainer) -> None:
    """Add --accept-config."""
    parser.add_argument(
        "--accept-config",
        action="store_true",
        help="load a quantized model although its config or its scheduler's config was changed since it was written",
    )


def add_sampling(sub: argparse.ArgumentParser) -> None:
    """Add the options of sampling that generate and evaluate share."""
    group = sub.add_argument_group("sampling (what is not given is the pipeline's own)")
    group.add_argument("--steps", type=positive, default=20, help="sampling steps (%(default)s)")
    group.add_argument("--guidance", type=finite, help="guidance scale")
    group.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    group.add_argument("--height", type=positive, help="height of a sample, in pixels")
    group.add_argument("--width", type=positive, help="width of a sample, in pixels")
    group.add_argument("--frames", type=positive, help="number of frames of a clip")
    group.add_argument("--seed", type=seed, default=0, help="(%(default)s)")
    add_accept_config(group)
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of weights and activations that are not quantized (%(default)s)",
    )
    group.add_argument("--device", default="cpu", help="(%(default)s)")


def asked(args: argparse.Namespace) -> dict[str, Any]:
    """Return what is asked of a model, by the names of Sampling."""
    found = {key: getattr(args, key, None) for key in SAMPLING}
    found["prompts"] = read_prompts(args.prompts) if args.prompts else getattr(args, "prompt", None)
    return {key: value for key, value in found.items() if value is not None}


def read_prompts(path: Path) -> list[str]:
    """Return the prompts in a text file, one a line.

    Raises:
        ValueError: there is none, or the file is not UTF-8.
        OSError: the file cannot be read.
    """
    from quantdit.system import files

    # Only line ends end a prompt: str.splitlines would cut it at U+2028 and others.
    prompts = [line for line in files.read_text(path).split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts


def quiet() -> None:
    """Leave the terminal to our own progress bars."""
    from diffusers.utils import logging

    logging.disable_progress_bar()


def path(text: str) -> Path:
    """Parse the path of a file or a folder."""
    return Path(model_name(text))


def model_name(text: str) -> str:
    """Parse a name, a hub id or a folder: any text but an empty one."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; . is the folder that you are in")
    return text


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def positive(text: str) -> int:
    """Parse a whole number, at least 1."""
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def count(text: str) -> int:
    """Parse a whole number, at least 0."""
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def size(text: str) -> int:
    """Parse a size with a unit, such as 8GiB; returns bytes."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(?:([KMGT])(i?))?B?", text)
    if found is None or not (value := float(found[1])) > 0:
        raise argparse.ArgumentTypeError(f"a size is a number with a unit, such as 8GiB or 500MB, got {text!r}")
    return int(value * (1024 if found[3] else 1000) ** (" KMGT".index(found[2] or " ")))


def seed(text: str) -> int:
    """Parse a seed."""
    value = _whole(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"a seed lies in 0..2147483647, got {value}")
    return value


def number(text: str) -> float:
    """Parse a number, infinities and NaN included."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def class_label(text: str) -> int | str:
    """Parse the number of a class, or its name."""
    return int(text) if re.fullmatch("-?[0-9]+", text) else text


def finite(text: str) -> float:
    """Parse a finite number."""
    value = number(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value
