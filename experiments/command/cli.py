"""What the command lines share: one line an error, exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from experiments.command import interrupts
from experiments.command.errors import ExperimentError, Interrupted, ToldElsewhere, reason
from experiments.command.streams import lenient
from experiments.command.torchrun import place

RESULTS = Path("results")


class UsageError(ExperimentError):
    """Arguments that the command line does not have."""


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def user_path(text: str) -> Path:
    """A path as a person writes it: `~` and `~name` at its beginning mean a home."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # nobody has that name
        return Path(text)


def file_path(text: str) -> Path:
    """As `user_path`, for a file that is to be written: its folder has to be there before anything is done."""
    path = user_path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def run_command(command: Callable[[], int], *, answers: bool = False, together: bool = False) -> int:
    """The exit code of `command`: its own, 2 after a known error, 130 or 143 after SIGINT or SIGTERM.

    Whatever becomes of stdout and stderr, it goes on; text that is lost is told at the end.

    Args:
        answers: what it prints is all that it does, so that to lose it is an error.
        together: torchrun may start it in several processes; others are refused there.
    """
    with lenient() as output:
        code = _exit_code(command if together else lambda: _alone(command))
        output.flush()
        if output.lost is not None:
            print(f"{'error' if answers else 'note'}: standard output: {reason(output.lost)}", file=sys.stderr)
            code = code or 2 * answers
    return code


def _alone(command: Callable[[], int]) -> int:
    here = place()
    if here is None:
        return command()
    if here.rank:
        raise ToldElsewhere
    raise UsageError(f"torchrun started {here.size} processes; only python -m experiments.run trains in several")


def _exit_code(command: Callable[[], int]) -> int:
    try:
        with interrupts.raised():
            return command()
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a path that the system refuses, as too long say, or no more processes
        path = "" if error.filename is None else f"{str(error.filename)[:100]!r}: "
        print(f"error: {path}{reason(error)}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"interrupted: {error}", file=sys.stderr)
        return error.exit_code
    except ToldElsewhere:
        return 0
