"""A run as its folder holds it, whether it is over or not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.command.errors import RecordError
from experiments.config import Config
from experiments.folder.lock import holder
from experiments.folder.write import CONFIG, METRICS, read_config, read_metrics, read_summary


@dataclass(frozen=True)
class RecordedRun:
    """What a run's folder holds.

    `status` is 'finished', 'diverged', 'running' (a process has the folder) or 'interrupted' (by whatever: the same
    command goes on). `metrics` has a row an epoch, and beside the columns of the file `seconds`, the training time
    until then. `summary` is there once the run is over.
    """

    folder: Path
    status: str
    config: Config
    metrics: pd.DataFrame
    summary: dict[str, Any] | None

    @property
    def epochs(self) -> int:
        """How many epochs are recorded; `config.epochs` is how many there are to be."""
        return int(self.metrics["epoch"].iloc[-1]) if len(self.metrics) else 0

    @property
    def seconds(self) -> float:
        """Spent on training."""
        return float(self.metrics["epoch_seconds"].sum())

    @property
    def seconds_per_epoch(self) -> float | None:
        """The median over the epochs, which a slow first one leaves alone; None before the first."""
        trained = self.metrics["epoch_seconds"].iloc[1:]
        return float(trained.median()) if len(trained) else None

    @property
    def seconds_left(self) -> float | None:
        """Training alone; None of a run that is over, or has no epoch to judge by."""
        if self.summary is not None or self.seconds_per_epoch is None:
            return None
        return (self.config.epochs - self.epochs) * self.seconds_per_epoch

    @property
    def best_val_accuracy(self) -> float | None:
        return float(self.metrics["val_accuracy"].max()) if len(self.metrics) else None

    @property
    def test_accuracy(self) -> float | None:
        return None if self.summary is None else self.summary["test_accuracy"]

    def value(self, column: str, epoch: int | None = None) -> float | None:
        """A number of the metrics after `epoch`, by default the last one; None where there is none."""
        rows = self.metrics if epoch is None else self.metrics[self.metrics["epoch"] == epoch]
        return float(rows[column].iloc[-1]) if len(rows) else None


def read_run(folder: Path) -> RecordedRun:
    """
    Raises:
        RecordError: a file of the run cannot be read.
    """
    unfinished = "interrupted" if holder(folder) is None else "running"  # asked first: the run may just end
    summary = read_summary(folder)
    metrics = read_metrics(folder)
    return RecordedRun(
        folder,
        unfinished if summary is None else str(summary["status"]),
        read_config(folder),
        metrics.assign(seconds=metrics["epoch_seconds"].cumsum()),
        summary,
    )


def find_runs(root: Path) -> list[Path]:
    """The folders of all runs in `root`, itself or below, sorted.

    Raises:
        RecordError: there is no such folder, or no run in it.
    """
    try:
        if not root.is_dir():
            raise RecordError(f"{root} is no folder")
    except OSError as error:  # a name that is too long, say
        raise RecordError(f"{root}: {error.strerror}") from error
    folders = sorted(path.parent for path in root.rglob(CONFIG) if (path.parent / METRICS).exists())
    if not folders:
        raise RecordError(f"{root} holds no run (no folder in it has a config.yaml and a metrics.csv)")
    return folders
