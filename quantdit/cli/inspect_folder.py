"""The command `quantdit inspect`."""

from __future__ import annotations

import argparse
import json
import shutil

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
    from quantdit.inspection import inspection
    from quantdit.system.output_places import PICTURES, require_file, require_suffix

    if args.plot:
        require_file(args.plot)
        require_suffix(args.plot, PICTURES, "plots")
    found = inspection.read(args.folder, args.accept_config)
    if args.json:
        print(json.dumps(inspection.as_json(found), indent=2))
        return 0
    if args.plot:
        inspection.check_plot(found)
    print(inspection.describe(found, shutil.get_terminal_size().columns, args.all, args.by))
    if args.plot:
        inspection.plot(found, args.plot)
        print(args.plot)
    return 0
