"""What a run leaves on disk, and how it is read back.

A folder for each run: `config.yaml` (resolved), `metrics.csv` (a row an epoch, as it goes), `checkpoint.pt` (while the
run is not over) and `summary.json` (written last: a folder without it holds an unfinished run). Every file is written
whole or not at all.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.command.errors import ConfigError, RecordError
from experiments.config import Config, dump_config, load_resolved
from experiments.folder.atomic import write_atomically
from experiments.folder.checkpoint import remove_checkpoint, save_checkpoint
from experiments.folder.lock import locked
from experiments.training.train import EpochRecord

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.csv", "summary.json"
COLUMNS = [field.name for field in fields(EpochRecord)]
_SUMMARY_KEYS = {"status", "epochs", "test_loss", "test_accuracy"}


class RunWriter:
    """A run's folder, held by this process alone, as it takes records, checkpoints and the summary.

    Raises:
        RecordError: here or later, when the folder cannot be written, or is in use by another process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: list[list[Any]] = []

    def __enter__(self) -> RunWriter:
        with writing(self.folder), ExitStack() as stack:
            self.folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(self.folder))
            self._held = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.__exit__(*error)

    def start(self, config: Config, records: Sequence[EpochRecord] = ()) -> None:
        """Begin with `records`, which a checkpoint brought, in place of whatever the folder held.

        Without any, that is a fresh start, and a checkpoint is removed, too.
        """
        self._rows = [COLUMNS, *map(_row, records)]
        with writing(self.folder):
            self._write(CONFIG, dump_config(config))  # first: where it cannot be written, all else is kept
            (self.folder / SUMMARY).unlink(missing_ok=True)
            if not records:
                remove_checkpoint(self.folder)
            self._write_metrics()

    def append(self, record: EpochRecord) -> None:
        self._rows.append(_row(record))
        with writing(self.folder):
            self._write_metrics()

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint; see `save_checkpoint`."""
        with writing(self.folder):
            save_checkpoint(self.folder, state)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, with which the run is over, and remove the checkpoint."""
        with writing(self.folder):
            self._write(SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")
            remove_checkpoint(self.folder)

    def _write_metrics(self) -> None:
        # The whole file each time: a row is never half there, and a thousand epochs are 100 kB.
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self._rows)
        self._write(METRICS, text.getvalue())

    def _write(self, name: str, text: str) -> None:
        write_atomically(self.folder / name, lambda file: file.write(text.encode()))


def _row(record: EpochRecord) -> list[Any]:
    epoch, *numbers = astuple(record)
    return [epoch, *(f"{number:.8g}" for number in numbers)]


def read_metrics(folder: Path) -> pd.DataFrame:
    """The rows recorded so far, one an epoch; a row cut off (by a copy that broke off) is left out.

    Raises:
        RecordError: there is no `metrics.csv`, or it is not one.
    """
    path = Path(folder) / METRICS
    try:
        text = path.read_text()
        metrics = pd.read_csv(io.StringIO(text[: text.rfind("\n") + 1])).astype(float)
        metrics = metrics.astype({column: int for column in metrics if column == "epoch"})
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot be read as metrics: {_reason(error)}") from error
    if list(metrics.columns) != COLUMNS:
        raise RecordError(f"{path}: must have the columns {','.join(COLUMNS)}")
    return metrics


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished or diverged run, None of an unfinished or missing one."""
    path = Path(folder) / SUMMARY
    try:
        summary = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot be read as a summary: {_reason(error)}") from error
    if not isinstance(summary, dict) or not summary.keys() >= _SUMMARY_KEYS:
        raise RecordError(f"{path}: must be a JSON object with {', '.join(sorted(_SUMMARY_KEYS))}")
    return summary


def refuse_finished(folder: Path) -> None:
    """
    Raises:
        RecordError: the folder holds a run that is over.
    """
    summary = read_summary(folder)
    if summary is not None:
        raise RecordError(f"{folder}: already holds a {summary['status']} run; "
                          "give --overwrite or another --output")  # fmt: skip


def read_config(folder: Path) -> Config:
    """The resolved config a run was made with."""
    path = Path(folder) / CONFIG
    try:
        return load_resolved(path)
    except ConfigError as error:
        raise RecordError(f"{folder}: cannot read the run's config: {error}") from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses into a `RecordError`."""
    try:
        yield
    except OSError as error:
        raise RecordError(f"{folder}: cannot write the run here: {_reason(error)}; "
                          "choose another --output") from error  # fmt: skip


def _reason(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error)).split())
