"""The command `quantdit models`."""

from __future__ import annotations

import argparse

from quantdit.cli.parser import Commands, add_command
from quantdit.recipes.sampling_plan import SamplingPlan


def add(commands: Commands) -> None:
    """Add the command and its arguments."""
    add_command(
        commands,
        "models",
        run,
        "List the models known by name, and what each is calibrated on.",
        "quantdit models",
    )


def run(args: argparse.Namespace) -> int:
    """Print tables of the known models."""
    from quantdit.models.known_models import KNOWN_MODELS

    rows = [("name", "size", "embedded", "transformer", "hub id", "what it makes")]
    rows += [
        (name, a.parameters, "no" if a.hub else "yes", a.transformer, a.hub or "-", a.about) for name, a in KNOWN_MODELS.items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for name, size, *texts, about in rows:
        cells = [name.ljust(widths[0]), size.rjust(widths[1]), *(t.ljust(w) for t, w in zip(texts, widths[2:], strict=True))]
        print(*cells, about, sep="  ")
    print("\nwhat quantdit calibrate samples of each, but for what --samples, --steps, --guidance, --height, ... say")
    rows = [("name", "on a CPU", "on a GPU"), *((name, _captured(a.cpu), _captured(a.gpu)) for name, a in KNOWN_MODELS.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for row in rows:
        print(row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2], sep="  ")
    return 0


def _captured(known: SamplingPlan) -> str:
    """Return what of a known model calibration samples: its plan in words."""
    frames = f"{known.frames} frames of " if known.frames and known.frames > 1 else ""
    steps = f"{known.timesteps} of {known.steps}" if known.timesteps else f"{known.steps}"
    return f"{known.samples} samples, {steps} steps, guidance {known.guidance:g}, {frames}{known.width}x{known.height}"
