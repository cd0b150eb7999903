"""The command `quantdit`: its parser, and what happens to errors, to interruptions and to readers that leave early."""

from __future__ import annotations

import io
import signal
import sys
import traceback
from contextlib import redirect_stdout

from quantdit.cli import bench, calibrate, evaluate, export, gate, generate, inspect_folder, models
from quantdit.cli.parser import Parser, print_error
from quantdit.cli.streams import Forgiving, advice_as_lines, discard

COMMANDS = (models, calibrate, generate, inspect_folder, evaluate, gate, export, bench)
EXAMPLES = """examples:
  quantdit models
  quantdit calibrate --model fashion-dit --bits w4a8 --output out/fashion-dit-w4a8
  quantdit generate out/fashion-dit-w4a8 --count 40 --seed 1 --output clothes.png
  quantdit evaluate fashion-dit out/fashion-dit-w4a8 --output out/drift
  quantdit inspect out/fashion-dit-w4a8 --plot layers.png
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for a user's error (one line on stderr), 2 for wrong usage, 130 if interrupted.

    Whoever reads stdout may leave early (`| head -1`); the command ends as it would have. A closed stderr ends it with 141.
    """
    parser = command_parser()
    args = parser.parse_args(argv)
    try:
        with redirect_stdout(Forgiving(sys.stdout or io.StringIO())) as printed, advice_as_lines():
            try:
                return args.run(args)
            finally:
                printed.flush()
    except BrokenPipeError:
        discard(sys.stderr)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        further = "; the same command with --resume goes on" if "resume" in args else ""
        print(f"\nquantdit: interrupted{further}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if args.traceback:
            traceback.print_exc()
        print_error(_text_of(error))
        return 1


def _text_of(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"cannot open {error.filename2 or error.filename}: {error.strerror}; check the path"
    return str(error)


def command_parser() -> Parser:
    """Return the parser of all commands; each sets `run`, a function that takes what was parsed and returns an exit code."""
    parser = Parser("quantdit", description="Quantize diffusion transformers.", epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def _version() -> str:
    from importlib.metadata import version

    return f"quantdit {version('quantdit')}"
