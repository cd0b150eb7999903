"""The command line, a file per command: arguments in, one call of the library, one clear line for a user's error."""

from quantdit.cli.command_line import main

__all__ = ["main"]
