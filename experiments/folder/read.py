"""A run as its folder holds it, whether it is over or not: its files one by one, and all of them together."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ValidationError

from experiments.command.errors import ConfigError, RecordError, counted, reason
from experiments.config import Config, lengthens, load_resolved
from experiments.config.wording import one_line, short
from experiments.folder.checkpoint import CHECKPOINT
from experiments.folder.lock import holder
from experiments.folder.write import COLUMNS, CONFIG, DIAGNOSTICS, FIRST_LAYER_COLUMNS, LAYER_COLUMNS, METRICS, SUMMARY

_ENCODING = "utf-8-sig"  # with the mark that some editors put in front, or without


class _Data(BaseModel, strict=True):
    name: str
    train_samples: int
    official: bool | None


class _Environment(BaseModel, strict=True):
    git_commit: str | None
    torch: str
    device: str
    device_name: str
    threads: int


class _Summary(_Environment, strict=True):
    """What is read of a summary, since one may be edited; it holds more."""

    status: Literal["finished", "diverged"]
    epochs: int
    test_loss: float | None
    test_accuracy: float
    seed: int
    data: _Data
    date: str
    earlier_environments: list[_Environment] = []


def read_metrics(folder: Path) -> pd.DataFrame:
    """The rows recorded so far, one an epoch from 0 on; a row cut off (by a copy that broke off) is left out.

    Raises:
        RecordError: there is no `metrics.csv`, or it is not one.
    """
    path = Path(folder) / METRICS
    try:
        text = path.read_text(encoding=_ENCODING)
        metrics = pd.read_csv(io.StringIO(text[: text.rfind("\n") + 1])).astype(float)
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot be read as metrics: {reason(error)}") from error
    if list(metrics.columns) != COLUMNS:
        raise RecordError(f"{path}: must have the columns {','.join(COLUMNS)}")
    for row, epoch in enumerate(metrics["epoch"]):
        if epoch != row:
            raise RecordError(f"{path}: must have a row for each epoch from 0 on, but has {epoch:g} in place of {row}")
    return metrics.astype({"epoch": int})


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished or diverged run, None of an unfinished or missing one."""
    path = Path(folder) / SUMMARY
    try:
        summary = json.loads(path.read_text(encoding=_ENCODING))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path}: cannot be read as a summary: {reason(error)}") from error
    if not isinstance(summary, dict):
        raise RecordError(f"{path}: must be a JSON object, got {short(summary)}")
    try:
        _Summary.model_validate(summary)
    except ValidationError as error:
        raise RecordError(f"{path}: {one_line(error)}") from None
    return summary


def refuse_finished(folder: Path, config: Config) -> None:
    """
    Raises:
        RecordError: the folder holds a run that is over, and not one that `config` makes longer; or what is left of
            one.
    """
    summary = read_summary(folder)
    if summary is None:
        return
    try:
        earlier, _ = read_config(folder), read_metrics(folder)
    except RecordError as error:
        raise RecordError(f"{error}; delete {folder} to have this {summary['status']} run made again") from error
    if not lengthens(config, earlier):
        raise RecordError(f"{folder}: already holds a {summary['status']} run; "
                          "give --overwrite or another --output")  # fmt: skip
    # One that diverged is short, and begins again.
    if summary["status"] == "finished" and not (folder / CHECKPOINT).exists():
        raise RecordError(f"{folder}: holds a finished run of {counted(summary['epochs'], 'epoch')}, which cannot be "
                          "made longer, as its last state was not kept (keep_checkpoint: true keeps it); give "
                          "--overwrite or another --output")  # fmt: skip


def read_config(folder: Path) -> Config:
    """The resolved config a run was made with."""
    path = Path(folder) / CONFIG
    try:
        return load_resolved(path)
    except ConfigError as error:
        raise RecordError(f"{folder}: cannot read the run's config: {error}") from error


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
        """How many epochs are recorded."""
        return int(self.metrics["epoch"].iloc[-1]) if len(self.metrics) else 0

    @property
    def expected_epochs(self) -> int:
        """How many there are to be; with a time limit, judged by those recorded."""
        if self.status == "finished":
            return self.epochs
        return self.config.expected_epochs(self.epochs, self.seconds)

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
        return max(0, self.expected_epochs - self.epochs) * self.seconds_per_epoch

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
    metrics = read_metrics(folder).assign(seconds=lambda rows: rows["epoch_seconds"].cumsum())
    status = unfinished if summary is None else str(summary["status"])
    run = RecordedRun(folder, status, read_config(folder), metrics, summary)
    if summary is not None and (not len(metrics) or run.epochs != summary["epochs"]):
        raise RecordError(f"{folder / METRICS}: must end with epoch {summary['epochs']}, as {SUMMARY} has it")
    return run


def find_runs(root: Path) -> list[Path]:
    """The folders of all runs in `root`, itself or below, sorted; damaged ones, too.

    Raises:
        RecordError: there is no such folder, or no run in it.
    """
    try:
        if not root.is_dir():
            raise RecordError(f"{root} is no folder")
    except OSError as error:  # a name that is too long, say
        raise RecordError(f"{root}: {error.strerror}") from error
    # A config, or a table called metrics.csv, may be anybody's; the two together, or one of the others, are a run's.
    folders = {path.parent for path in root.rglob(CONFIG) if (path.parent / METRICS).exists()}
    folders |= {path.parent for name in (SUMMARY, CHECKPOINT) for path in root.rglob(name)}
    if not folders:
        raise RecordError(f"{root} holds no run (no folder in it has a config.yaml and a metrics.csv)")
    return sorted(folders)


def read_runs(*roots: Path) -> list[RecordedRun]:
    """All runs in `roots`, each once.

    Raises:
        RecordError: of `find_runs` or `read_run`.
    """
    return [read_run(folder) for folder in sorted({folder for root in roots for folder in find_runs(root)})]


def read_diagnostics(folder: Path) -> pd.DataFrame:
    """The rows of `diagnostics.csv`, one for each layer in each epoch observed; see `LayerRecord`.

    Raises:
        RecordError: there is no such file, or it is not one.
    """
    path = Path(folder) / DIAGNOSTICS
    try:
        rows = pd.read_csv(path, dtype={"layer": str}, encoding="utf-8-sig")
        if list(rows.columns) in (LAYER_COLUMNS, FIRST_LAYER_COLUMNS):
            rows = rows.reindex(columns=LAYER_COLUMNS)
            whole = {"epoch": int, "steps": int, "not_descent": int, "failed": int}
            if rows.empty:
                raise RecordError(f"{path}: has no rows")
            return rows.astype({column: float for column in LAYER_COLUMNS if column != "layer"}).astype(whole)
    except FileNotFoundError:
        raise RecordError(f"{path}: not there; a run records it with diagnostics_every=1") from None
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot be read as diagnostics: {reason(error)}") from error
    raise RecordError(f"{path}: must have the columns {','.join(LAYER_COLUMNS)}")
