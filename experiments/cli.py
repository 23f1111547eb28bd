"""What the command lines share: one line an error, exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from experiments.config import Config
from experiments.errors import ExperimentError

RESULTS = Path("results")


class UsageError(ExperimentError):
    """Arguments that the command line does not have."""


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def run_command(command: Callable[[], int]) -> int:
    """The exit code of `command`: its own, 2 after a known error, 130 when interrupted."""
    try:
        return command()
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was recorded so far is kept", file=sys.stderr)
        return 130


def run_folder(results: Path, config_path: Path, config: Config) -> Path:
    """`<results>/<folder of the config>/<name>`."""
    return results / config_path.resolve().parent.name / config.name
