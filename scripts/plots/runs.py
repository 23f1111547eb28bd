"""The runs of a results folder, as the figures and the table want them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.command.errors import RecordError
from experiments.config import Config, differing_keys
from experiments.config.sweep_file import without_seed
from experiments.data.datasets import training_images
from experiments.folder.read import RecordedRun, find_runs, read_run

SEED_KEYS = {"name", "seed", "order_seed", "data.root"}
"""In which the runs of one config may differ: the folder that the images are read from decides no number."""
LENGTH_KEYS = {"epochs", "data.train_samples"}
SPEED_KEYS = ("compile", "diagnostics_every")
"""Which change nothing but the seconds."""


@dataclass(frozen=True)
class Stat:
    """Mean, standard deviation (of a sample), lowest and highest over seeds; NaN where there is nothing to take it of.

    Of one seed there is the mean alone.
    """

    mean: float
    std: float = math.nan
    low: float = math.nan
    high: float = math.nan

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Stat:
        known = np.array([value for value in values if value is not None], dtype=float)
        if not known.size:
            return cls(math.nan)
        if known.size == 1:
            return cls(float(known[0]))
        return cls(*map(float, (known.mean(), known.std(ddof=1), known.min(), known.max())))


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
        """The longest run's; NaN where none is known."""
        return float(pd.Series([run.metrics["seconds"].iloc[-1] for run in self.runs]).max())

    @property
    def seconds_per_epoch(self) -> float:
        """The median over seeds; NaN before the first epoch."""
        return float(pd.Series([run.seconds_per_epoch for run in self.runs], dtype=float).median())

    def stat(self, number: Callable[[RecordedRun], float | None]) -> Stat:
        """Over the runs that did not diverge, or over all if all did."""
        return Stat.of(map(number, steady(self.runs)))

    def train_loss(self, epoch: int) -> Stat:
        """The full-batch training loss after `epoch`, of the runs that came so far."""
        return self.stat(lambda run: run.value("train_loss", epoch))


def load_runs(*results: Path) -> dict[str, Replicates]:
    """All runs in the folders `results` by name, those that differ in their seeds alone together.

    Raises:
        RecordError: one of `results` is no folder, no run in it has recorded anything, two hold runs of one name, or
            runs that are named as seeds of one config differ in more, or are of one seed.
    """
    by_name: dict[str, list[RecordedRun]] = {}
    folders: dict[tuple[str, str], Path] = {}
    for root in results:
        runs = [run for run in map(read_run, find_runs(root)) if len(run.metrics)]
        if not runs:
            raise RecordError(f"{root} holds no run that has recorded anything")
        for run in runs:
            name = config_name(run.folder), run.folder.name
            if other := folders.get(name):
                raise RecordError(f"{other} and {run.folder}: two runs of one name; leave one of them out")
            folders[name] = run.folder
            by_name.setdefault(name[0], []).append(run)
    for runs in by_name.values():
        for run in runs[1:]:
            keys = set(differing_keys(runs[0].config, run.config)) - SEED_KEYS
            if keys:
                raise RecordError(f"{runs[0].folder} and {run.folder}: by their names two seeds of one config, "
                                  f"but they also differ in {', '.join(sorted(keys))}")  # fmt: skip
        refuse_twins(runs)
    return {name: Replicates(name, tuple(runs)) for name, runs in by_name.items()}


def config_name(folder: Path) -> str:
    """What a run's config is called: by its folder, or by the sweep's where that varies the seed alone."""
    return without_seed(folder.name) or folder.parent.name


def refuse_twins(runs: Iterable[RecordedRun]) -> None:
    """
    Raises:
        RecordError: two of these runs of one config are of one seed, and would count twice.
    """
    found: dict[tuple[int, int], Path] = {}
    for run in runs:
        seed, order_seed = run.config.seed, run.config.order_seed
        seeds = seed, seed if order_seed is None else order_seed
        if other := found.get(seeds):
            raise RecordError(f"{other} and {run.folder} are of one config and one seed: leave one of them out")
        found[seeds] = run.folder


def left_out_note(runs: Iterable[RecordedRun]) -> str:
    """Which of ``runs`` are not over, where those are left out; nothing where all are."""
    names = [f"{run.folder.name} ({run.status}, epoch {run.epochs})" for run in runs if run.summary is None]
    return f"not over, and left out: {', '.join(names)}" if names else ""


def with_seconds_of(groups: dict[str, Replicates], quiet: Sequence[RecordedRun]) -> dict[str, Replicates]:
    """`groups` with the seconds an epoch of the `quiet` runs in place of their own.

    A quiet run stands for all of the same settings (`compile` among them), but for its length, its seeds and the number
    of its images: seconds go by steps. A run for which there is none has no seconds (NaN).
    """
    return {
        name: dataclasses.replace(group, runs=tuple(_with_seconds_of(run, quiet) for run in group.runs))
        for name, group in groups.items()
    }


def _with_seconds_of(run: RecordedRun, quiet: Sequence[RecordedRun]) -> RecordedRun:
    steps = [
        one.seconds_per_epoch / steps_per_epoch(one.config)
        for one in quiet
        if one.seconds_per_epoch is not None
        and set(differing_keys(one.config, run.config)) <= SEED_KEYS | LENGTH_KEYS
        and all(getattr(one.config, key) == getattr(run.config, key) for key in SPEED_KEYS)
    ]
    return with_seconds(run, pd.Series(steps, dtype=float).median() * steps_per_epoch(run.config))


def with_seconds(run: RecordedRun, each: float) -> RecordedRun:
    """`run`, whose epochs take `each` seconds."""
    metrics = run.metrics.assign(seconds=run.metrics["epoch"] * each, epoch_seconds=each)
    metrics.loc[metrics["epoch"] == 0, "epoch_seconds"] = 0.0
    return dataclasses.replace(run, metrics=metrics)


def steps_per_epoch(config: Config) -> int:
    return math.ceil(training_images(config.data) / config.batch_size)


def steady(runs: Sequence[RecordedRun]) -> Sequence[RecordedRun]:
    """Those that did not diverge, or all if all did."""
    return [run for run in runs if run.status != "diverged"] or runs


@dataclass(frozen=True)
class Points:
    """A curve: the mean over seeds, and the lowest and highest of them (NaN for one seed)."""

    xs: np.ndarray
    ys: np.ndarray
    low: np.ndarray
    high: np.ndarray


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
    if not np.isfinite(xs).all():  # seconds that are not known
        return Points(xs[:0], xs[:0], xs[:0], xs[:0])
    visible = int(np.searchsorted(xs, x_end, side="right")) + 1
    low, high = (ys.min(axis=0), ys.max(axis=0)) if len(tables) > 1 else np.full((2, len(epochs)), np.nan)
    return Points(*(one[:visible] for one in (xs, ys.mean(axis=0), low, high)))


def _finite(metrics: pd.DataFrame, y: str) -> pd.DataFrame:
    return metrics[np.isfinite(metrics[y]) & np.isfinite(metrics["train_loss"])]
