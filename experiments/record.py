"""What a run leaves on disk, and how it is read back.

A folder for each run: `config.yaml` (resolved), `metrics.csv` (a row an epoch, appended as it
goes) and `summary.json` (written last, at once: a folder without it holds an unfinished run).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd

from experiments.config import Config, dump_config, load_resolved
from experiments.errors import ConfigError, RecordError
from experiments.train import EpochRecord

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.csv", "summary.json"
COLUMNS = [field.name for field in fields(EpochRecord)]


class RunWriter:
    """Starts a run's folder afresh, then takes its records and its summary.

    Raises:
        RecordError: here or later, when the folder cannot be written.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder = folder
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SUMMARY).unlink(missing_ok=True)
            (folder / CONFIG).write_text(dump_config(config))
            self._metrics = (folder / METRICS).open("w", newline="")
            self._write_row(COLUMNS)

    def append(self, record: EpochRecord) -> None:
        epoch, *numbers = astuple(record)
        with _writing(self.folder):
            self._write_row([epoch, *(f"{number:.8g}" for number in numbers)])

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary under another name and rename it, so that it is never half there."""
        temporary = self.folder / (SUMMARY + ".tmp")
        with _writing(self.folder):
            temporary.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
            temporary.replace(self.folder / SUMMARY)

    def _write_row(self, cells: list[Any]) -> None:
        csv.writer(self._metrics, lineterminator="\n").writerow(cells)
        self._metrics.flush()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._metrics.close()


def read_metrics(folder: Path) -> pd.DataFrame:
    """The rows recorded so far, one an epoch; a row cut off by a crash is left out.

    Raises:
        RecordError: there is no `metrics.csv`, or it is not one.
    """
    path = Path(folder) / METRICS
    try:
        text = path.read_text()
        metrics = pd.read_csv(io.StringIO(text[: text.rfind("\n") + 1]))
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
    if not isinstance(summary, dict) or "status" not in summary:
        raise RecordError(f"{path}: must be a JSON object with a status")
    return summary


def read_config(folder: Path) -> Config:
    """The resolved config a run was made with."""
    path = Path(folder) / CONFIG
    try:
        return load_resolved(path)
    except ConfigError as error:
        raise RecordError(f"{folder}: cannot read the run's config: {error}") from error


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RecordError(f"{folder}: cannot write the run here: {_reason(error)}; "
                          "choose another --output") from error  # fmt: skip


def _reason(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error)).split())
