"""Where the numbers of a benchmark go, beside the screen."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.command.cli import user_path


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option ``--json``, whose folder has to be there before anything is measured."""
    parser.add_argument("--json", type=_file, metavar="FILE", help="write the numbers there, too")


def _file(text: str) -> Path:
    path = user_path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path
