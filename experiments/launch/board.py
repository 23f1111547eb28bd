"""How far runs in other processes are: a bar for all and one for each that is under way, or a line now and then."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from experiments.command.errors import RecordError
from experiments.folder.read import read_metrics
from experiments.launch.outcome import Outcome
from experiments.launch.plan import PlannedRun
from experiments.launch.progress import LINE_SECONDS


class Board:
    """Bars over epochs, read from what the runs record; where stderr is no terminal, lines on stdout: one for each run
    that starts, and each minute one about all.

    Args:
        started: the word for a run that has been handed over.
    """

    def __init__(self, runs: Sequence[PlannedRun], started: str = "started") -> None:
        self._runs, self._started = len(runs), started
        self._epochs: dict[Path, int] = {}
        self._ended = self._failed = 0
        self._printed = time.monotonic()
        total = sum(run.config.epochs for run in runs)
        self._all = tqdm(total=total, desc=f"{len(runs)} runs", unit="epoch", disable=None, leave=False)
        self._bars: list[tqdm] = []

    def started(self, run: PlannedRun) -> None:
        if self._all.disable:
            print(f"{run.config.name}: {self._started}", flush=True)

    def show(self, running: Sequence[PlannedRun]) -> None:
        if self._all.disable:
            self._show_line(running)
            return
        while len(self._bars) < len(running):
            bar_format = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} epochs{postfix}"
            self._bars.append(tqdm(position=len(self._bars) + 1, bar_format=bar_format, leave=False))
        for bar, run in zip(self._bars, running, strict=False):
            self._show_bar(bar, run)
        for bar in self._bars[len(running) :]:
            bar.clear()
        self._all.n = sum(self._epochs.values())
        self._all.refresh()

    def ended(self, outcome: Outcome) -> None:
        """Count the epochs that the run made, and none that are still to come; make room for a line about it."""
        run = outcome.run
        self._read(run)
        self._all.total -= run.config.epochs - self._epochs.get(run.folder, 0)
        self._ended += 1
        self._failed += outcome.failed
        for bar in (self._all, *self._bars):
            bar.clear()

    def _show_line(self, running: Sequence[PlannedRun]) -> None:
        if not running or time.monotonic() - self._printed < LINE_SECONDS:
            return
        for run in running:
            self._read(run)
        done, total = sum(self._epochs.values()), self._all.total
        ended = f"{self._ended} of {self._runs} runs ended" + (f" ({self._failed} failed)" if self._failed else "")
        print(f"{ended}, {len(running)} under way: {done}/{total} epochs", flush=True)
        self._printed = time.monotonic()

    def _show_bar(self, bar: tqdm, run: PlannedRun) -> None:
        bar.set_description_str(run.config.name, refresh=False)
        bar.total, bar.n = run.config.epochs, 0
        metrics = self._read(run)
        if metrics is None:
            bar.set_postfix_str("")
            return
        bar.n = self._epochs[run.folder]
        bar.total = run.config.expected_epochs(bar.n, float(metrics["epoch_seconds"].sum()))
        bar.set_postfix_str(f"train loss {metrics['train_loss'].iloc[-1]:.4f}")

    def _read(self, run: PlannedRun) -> pd.DataFrame | None:
        """The run's metrics, its epochs counted; None where nothing is recorded yet."""
        try:
            metrics = read_metrics(run.folder)
            self._epochs[run.folder] = int(metrics["epoch"].iloc[-1])
        except (RecordError, IndexError):
            return None
        return metrics

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        for bar in (*reversed(self._bars), self._all):
            bar.close()
