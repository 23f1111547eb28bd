"""How far a run in a folder has come."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.config import Config
from experiments.errors import RecordError
from experiments.lock import holder
from experiments.record import CONFIG, METRICS, read_config, read_metrics, read_summary


@dataclass(frozen=True)
class RunStatus:
    """What a run's folder holds.

    `status` is 'finished', 'diverged', 'running' (a process has the folder) or 'interrupted' (by whatever: the same
    command goes on).
    """

    folder: Path
    status: str
    config: Config
    metrics: pd.DataFrame
    summary: dict[str, Any] | None

    @property
    def epoch(self) -> int:
        """How many epochs are recorded."""
        return int(self.metrics["epoch"].iloc[-1]) if len(self.metrics) else 0

    @property
    def epochs(self) -> int:
        """How many there are to be."""
        return self.config.epochs

    def last(self, column: str) -> float | None:
        """The last value of a column of the metrics."""
        return float(self.metrics[column].iloc[-1]) if len(self.metrics) else None

    @property
    def test_accuracy(self) -> float | None:
        return None if self.summary is None else self.summary["test_accuracy"]

    @property
    def seconds_per_epoch(self) -> float | None:
        """The median over the epochs, which a slow first one leaves alone."""
        trained = self.metrics["epoch_seconds"].iloc[1:]
        return float(trained.median()) if len(trained) else None

    @property
    def seconds_left(self) -> float | None:
        """Training alone; None of a run that is over, or has no epoch to judge by."""
        if self.summary is not None or self.seconds_per_epoch is None:
            return None
        return (self.epochs - self.epoch) * self.seconds_per_epoch


def read_status(folder: Path) -> RunStatus:
    """
    Raises:
        RecordError: a file of the run cannot be read.
    """
    summary = read_summary(folder)
    unfinished = "interrupted" if holder(folder) is None else "running"
    status = unfinished if summary is None else str(summary["status"])
    return RunStatus(folder, status, read_config(folder), read_metrics(folder), summary)


def find_runs(root: Path) -> list[Path]:
    """The folders of all runs in `root`, itself or below, sorted.

    Raises:
        RecordError: there is no such folder.
    """
    if not root.is_dir():
        raise RecordError(f"{root}: no such folder")
    return sorted(path.parent for path in root.rglob(CONFIG) if (path.parent / METRICS).exists())
