"""What the command lines share: one line an error, exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from experiments.command import interrupts
from experiments.command.errors import ExperimentError, Interrupted

RESULTS = Path("results")


class UsageError(ExperimentError):
    """Arguments that the command line does not have."""


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def run_command(command: Callable[[], int]) -> int:
    """The exit code of `command`: its own, 2 after a known error, 130 or 143 after SIGINT or SIGTERM."""
    try:
        with interrupts.raised():
            return command()
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a path that the system refuses, as too long say
        print(f"error: {str(error.filename)[:100]!r}: {error.strerror}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"interrupted: {error}", file=sys.stderr)
        return error.exit_code
