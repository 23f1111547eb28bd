"""Where the numbers of a benchmark go, beside the screen."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from experiments.command.cli import file_path
from experiments.folder.atomic import write_atomically


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option ``--json``, whose folder has to be there before anything is measured."""
    parser.add_argument("--json", type=file_path, metavar="FILE", help="write the numbers there, too, row by row")


def write_json(path: Path | None, facts: dict[str, Any]) -> None:
    """Replace the file of ``--json``, where one is asked for: after every row, as the next one may not come.

    Raises:
        OSError: it cannot be written.
    """
    if path is not None:
        write_atomically(path, lambda file: file.write(f"{json.dumps(facts, indent=1)}\n".encode()))
