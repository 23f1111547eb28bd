"""What is there, at a glance: `python -m experiments.show DIR`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import pandas as pd

from experiments.command.cli import Parser, run_command, user_path
from experiments.command.errors import RecordError
from experiments.folder.read import RecordedRun, find_runs, read_run

_HEADINGS = ("run", "status", "epoch", "train loss", "val. acc.", "test acc.", "s/epoch", "time left")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one line on stderr."""
    return run_command(lambda: _show(_parser().parse_args(argv)), answers=True)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m experiments.show",
        description="A table of the runs in a folder and its subfolders. Seconds and time left are of training alone.",
    )
    parser.add_argument("folder", type=user_path, metavar="DIR")
    return parser


def _show(arguments: argparse.Namespace) -> int:
    print_table(find_runs(arguments.folder), arguments.folder)
    return 0


def print_table(folders: Sequence[Path], root: Path, failed: Collection[Path] = ()) -> None:
    """A row for each run, its folder relative to `root`, which holds all or is one; `failed` have just failed."""
    rows, notes = [], []
    for folder in folders:
        try:
            run = read_run(folder)
        except RecordError as error:
            run = None
            notes += [] if folder in failed else [f"note: {error}"]
        name = folder.resolve().name if folder == root else str(folder.relative_to(root))
        rows.append((name, *_cells(run, folder in failed)))
    table = pd.DataFrame(rows, columns=_HEADINGS)
    lines = table.to_string(index=False, justify="left", formatters={"run": _left(table, "run")}).splitlines()
    print("\n".join(line.rstrip() for line in lines))
    counts = table["status"].value_counts()
    print(", ".join(f"{count} {status}" for status, count in counts.items()), flush=True)
    print(*notes, sep="\n", end="\n" * bool(notes), file=sys.stderr)


def _left(table: pd.DataFrame, column: str):
    width = table[column].str.len().max()
    return lambda text: text.ljust(width)


def _cells(run: RecordedRun | None, has_failed: bool) -> tuple[str, ...]:
    if run is None:
        return ("failed" if has_failed else "unreadable", *[""] * 6)
    status = "failed" if has_failed else run.status
    return (
        status,
        f"{run.epochs}/{run.expected_epochs}",
        _number(run.value("train_loss"), ".4g"),
        _number(run.value("val_accuracy"), ".2%"),
        _number(run.test_accuracy, ".2%"),
        _number(run.seconds_per_epoch, ".3g"),
        _duration(run.seconds_left),
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _duration(seconds: float | None) -> str:
    """'1 h 05 min', '12 min', '40 s'."""
    if seconds is None:
        return ""
    minutes = math.ceil(seconds / 60)
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


if __name__ == "__main__":
    sys.exit(main())
