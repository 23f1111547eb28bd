"""The runs of a results folder, as the figures and the table want them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.command.errors import RecordError
from experiments.config import differing_keys
from experiments.config.sweep_file import without_seed
from experiments.folder.read import RecordedRun, find_runs, read_run

SEED_KEYS = {"name", "seed", "order_seed"}


@dataclass(frozen=True)
class Stat:
    """Mean and standard deviation (of a sample) over seeds; NaN where there is nothing to take it of."""

    mean: float
    std: float = math.nan

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Stat:
        known = np.array([value for value in values if value is not None], dtype=float)
        if not known.size:
            return cls(math.nan)
        return cls(float(known.mean()), float(known.std(ddof=1)) if known.size > 1 else math.nan)


@dataclass(frozen=True)
class Replicates:
    """The runs of one config that differ in their seeds alone; mostly one."""

    name: str
    runs: tuple[RecordedRun, ...]

    @property
    def is_proxprop(self) -> bool:
        return self.runs[0].config.proxprop.optimization_mode != "gradient"

    @property
    def status(self) -> str:
        """'finished' when all are, else how the others ended: 'diverged', '1 of 3 diverged, 1 of 3 running'."""
        others = pd.Series([run.status for run in self.runs if run.status != "finished"]).value_counts()
        if others.empty:
            return "finished"
        if len(self.runs) == 1:
            return self.runs[0].status
        return ", ".join(f"{count} of {len(self.runs)} {status}" for status, count in others.items())

    @property
    def epochs(self) -> int:
        return max(run.epochs for run in self.runs)

    @property
    def seconds(self) -> float:
        return max(run.seconds for run in self.runs)

    @property
    def seconds_per_epoch(self) -> float:
        """The median over seeds; NaN before the first epoch."""
        known = [run.seconds_per_epoch for run in self.runs if run.seconds_per_epoch is not None]
        return float(np.median(known)) if known else math.nan

    def stat(self, number: Callable[[RecordedRun], float | None]) -> Stat:
        """Over the runs that did not diverge, or over all if all did."""
        return Stat.of(map(number, steady(self.runs)))

    def train_loss(self, epoch: int) -> Stat:
        """The full-batch training loss after `epoch`, of the runs that came so far."""
        return self.stat(lambda run: run.value("train_loss", epoch))


def load_runs(results: Path) -> dict[str, Replicates]:
    """All runs in `results` by name, those that differ in their seeds alone together.

    Raises:
        RecordError: `results` is no folder, no run in it has recorded anything, or runs that are named as seeds of one
            config differ in more.
    """
    by_name: dict[str, list[RecordedRun]] = {}
    for folder in find_runs(results):
        run = read_run(folder)
        if len(run.metrics):
            by_name.setdefault(without_seed(folder.name), []).append(run)
    if not by_name:
        raise RecordError(f"{results} holds no run that has recorded anything")
    for runs in by_name.values():
        for run in runs[1:]:
            keys = set(differing_keys(runs[0].config, run.config)) - SEED_KEYS
            if keys:
                raise RecordError(f"{runs[0].folder} and {run.folder}: by their names two seeds of one config, "
                                  f"but they also differ in {', '.join(sorted(keys))}")  # fmt: skip
    return {name: Replicates(name, tuple(runs)) for name, runs in by_name.items()}


def steady(runs: Sequence[RecordedRun]) -> Sequence[RecordedRun]:
    """Those that did not diverge, or all if all did."""
    return [run for run in runs if run.status != "diverged"] or runs


@dataclass(frozen=True)
class Points:
    """A curve: the mean over seeds, and the band of one standard deviation about it (NaN for one seed)."""

    xs: np.ndarray
    ys: np.ndarray
    std: np.ndarray


def points(runs: Sequence[RecordedRun], x: str, y: str, x_end: float) -> Points:
    """The curve of ``y`` over ``x``, up to one point past ``x_end``, over the epochs that all ``runs`` have.

    Runs that diverged are left out unless all did; so are epochs whose training loss is not finite, since a diverged
    run's accuracy means nothing.
    """
    tables = [_finite(run.metrics, y).set_index("epoch") for run in steady(runs)]
    epochs = tables[0].index
    for table in tables[1:]:
        epochs = epochs.intersection(table.index)
    xs = np.mean([epochs if x == "epoch" else table.loc[epochs, x] for table in tables], axis=0)
    ys = np.array([table.loc[epochs, y] for table in tables], dtype=float)
    visible = int(np.searchsorted(xs, x_end, side="right")) + 1
    std = ys.std(axis=0, ddof=1) if len(tables) > 1 else np.full(len(epochs), np.nan)
    return Points(xs[:visible], ys.mean(axis=0)[:visible], std[:visible])


def _finite(metrics: pd.DataFrame, y: str) -> pd.DataFrame:
    return metrics[np.isfinite(metrics[y]) & np.isfinite(metrics["train_loss"])]
