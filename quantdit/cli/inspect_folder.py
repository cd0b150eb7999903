"""The command `quantdit inspect`."""

from __future__ import annotations

import argparse
import json

from quantdit.cli import options
from quantdit.cli.parser import Commands, add_command


def add(commands: Commands) -> None:
    """Add the command and its arguments."""
    sub = add_command(
        commands,
        "inspect",
        run,
        "Show what is inside a quantized folder.",
        "quantdit inspect out/fashion-dit-w4a8 --plot layers.png",
    )
    sub.add_argument("folder", type=options.path, metavar="DIR")
    options.add_accept_config(sub)
    sub.add_argument("--all", action="store_true", help="list every layer in its order, not the worst ten alone")
    sub.add_argument("--by", choices=("role", "block"), default="role", help="what layers are grouped by (%(default)s)")
    shown = sub.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print all of it as JSON")
    shown.add_argument(
        "--plot", type=options.path, metavar="FILE.png", help="draw weights and levels, errors, activations per timestep"
    )


def run(args: argparse.Namespace) -> int:
    """Print tables or JSON, and draw the picture that was asked for."""
    from quantdit.inspection import plot
    from quantdit.inspection.inspection import inspect

    if args.plot:
        plot.check_output(args.plot)  # reading takes seconds
    found = inspect(args.folder, args.accept_config)
    if args.plot:
        found.plot(args.plot)
    print(json.dumps(found.to_dict(), indent=2) if args.json else found.text(every=args.all, by=args.by))
    if args.plot:
        print(args.plot)
    return 0
