"""The runs of a results folder, as the figures and the table want them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments import record
from experiments.errors import RecordError

Summary = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run's metrics, a row an epoch, with ``seconds``: the training time until then."""

    name: str
    metrics: pd.DataFrame
    summary: Summary | None

    @property
    def status(self) -> str:
        """'finished', 'diverged', or 'unfinished' while there is no summary."""
        return self.summary["status"] if self.summary else "unfinished"

    @property
    def epochs(self) -> int:
        return int(self.metrics["epoch"].iloc[-1])

    @property
    def seconds(self) -> float:
        return float(self.metrics["seconds"].iloc[-1])

    @property
    def seconds_per_epoch(self) -> float:
        """The median over the epochs, which a slow first one leaves alone; NaN before the first."""
        trained = self.metrics.loc[self.metrics["epoch"] > 0, "epoch_seconds"]
        return float(trained.median())

    @property
    def best_val_accuracy(self) -> float:
        return float(self.metrics["val_accuracy"].max())

    @property
    def test_accuracy(self) -> float:
        value = self.summary.get("test_accuracy") if self.summary else None
        return math.nan if value is None else float(value)

    def train_loss(self, epoch: int) -> float:
        """The full-batch training loss after ``epoch``; NaN where the run has no such epoch."""
        row = self.metrics.loc[self.metrics["epoch"] == epoch, "train_loss"]
        return float(row.iloc[0]) if len(row) else math.nan


def load_run(folder: Path) -> Run | None:
    """The run in ``folder``, or None where it has recorded nothing yet."""
    if not (folder / "metrics.csv").is_file():
        return None
    metrics = record.read_metrics(folder)
    if metrics.empty:
        return None
    metrics = metrics.assign(seconds=metrics["epoch_seconds"].cumsum())
    return Run(folder.name, metrics, record.read_summary(folder))


def load_runs(results: Path) -> dict[str, Run]:
    """All runs in ``results`` by name.

    Raises:
        RecordError: ``results`` is no folder, or no run in it has recorded anything.
    """
    if not results.is_dir():
        raise RecordError(f"{results} is no folder")
    runs = [load_run(folder) for folder in sorted(results.iterdir()) if folder.is_dir()]
    by_name = {run.name: run for run in runs if run is not None}
    if not by_name:
        raise RecordError(f"{results} holds no run (no folder in it has a metrics.csv with rows)")
    return by_name


def points(run: Run, x: str, y: str, x_end: float) -> tuple[np.ndarray, np.ndarray]:
    """The curve of ``y`` over ``x``, up to one point past ``x_end``.

    Epochs whose training loss is not finite are left out: a diverged run's accuracy means nothing.
    Several seeds of a run would become a mean and a band here.
    """
    xs = run.metrics[x].to_numpy(dtype=float)
    ys = run.metrics[y].to_numpy(dtype=float)
    visible = int(np.searchsorted(xs, x_end, side="right")) + 1
    finite = np.isfinite(ys) & np.isfinite(run.metrics["train_loss"].to_numpy(dtype=float))
    shown = np.flatnonzero(finite[:visible])
    return xs[shown], ys[shown]
