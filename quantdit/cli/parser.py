"""An argument parser whose errors are one line that names what may have been meant."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Any, NoReturn, TypeAlias


def print_error(text: str) -> None:
    """Print a user's error on stderr, as one line."""
    print("quantdit: error:", re.sub(r"\s*\n\s*", " ", text), file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations, whose errors are one line that names what may have been meant."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Print an error of usage and leave with exit code 2."""
        print_error(f"{message}; see {self.prog} --help")
        sys.exit(2)

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride] - the stubs have an overload for each namespace
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        given = sys.argv[1:] if args is None else list(args)
        known = self._option_string_actions
        # Before argparse complains of the option that is missing since its name was misspelled.
        for text in takewhile(lambda text: text.startswith("-"), given) if self._subparsers else given:
            name = text.partition("=")[0]
            if text.startswith("--") and " " not in text and name not in known:
                if name == "--":
                    break
                self.error(f"unknown option {name}{meant(name, known)}")
        found, rest = super().parse_known_args(given, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}{meant(rest[0].partition('=')[0], known)}")
        return found, rest

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            known = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(
                action, f"invalid choice {value!r}{meant(str(value), action.choices)}; choose from {known}"
            )


def meant(given: str, known: Iterable[str]) -> str:
    """Return a question that names the nearest of what is known, or nothing."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_command(commands: Commands, name: str, run: Callable[[argparse.Namespace], int], text: str, example: str) -> Parser:
    """Add a command that `run` carries out; returns its parser, to add arguments to.

    Args:
        commands: of `add_subparsers`.
        name: of the command.
        run: takes what was parsed, returns the exit code.
        text: says what the command does.
        example: a whole command, or several, each but the first indented by two spaces.
    """
    parser = commands.add_parser(name, help=text, description=text, epilog=f"example:\n  {example}")
    parser.add_argument("--traceback", action="store_true", help="print the whole traceback of an error")
    parser.set_defaults(run=run)
    return parser
