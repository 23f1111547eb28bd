"""The live view of runs in other processes: a bar for all, and one for each that is under way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from experiments.command.errors import RecordError
from experiments.folder.read import read_metrics
from experiments.launch.plan import PlannedRun


class Board:
    """Bars over epochs, read from what the runs record; silent when stderr is no terminal."""

    def __init__(self, runs: Sequence[PlannedRun]) -> None:
        self._epochs: dict[Path, int] = {}
        total = sum(run.config.epochs for run in runs)
        self._all = tqdm(total=total, desc=f"{len(runs)} runs", unit="epoch", disable=None, leave=False)
        self._bars: list[tqdm] = []

    def show(self, running: Sequence[PlannedRun]) -> None:
        if self._all.disable:
            return
        while len(self._bars) < len(running):
            bar_format = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} epochs{postfix}"
            self._bars.append(tqdm(position=len(self._bars) + 1, bar_format=bar_format, leave=False))
        for bar, run in zip(self._bars, running, strict=False):
            self._show(bar, run)
        for bar in self._bars[len(running) :]:
            bar.clear()
        self._all.n = sum(self._epochs.values())
        self._all.refresh()

    def ended(self, run: PlannedRun) -> None:
        """Count all of the run's epochs, and make room for a line about it."""
        self._epochs[run.folder] = run.config.epochs
        for bar in (self._all, *self._bars):
            bar.clear()

    def _show(self, bar: tqdm, run: PlannedRun) -> None:
        bar.set_description_str(run.config.name, refresh=False)
        bar.total, bar.n = run.config.epochs, 0
        try:
            metrics = read_metrics(run.folder)
            last = metrics.iloc[-1]
        except (RecordError, IndexError):  # nothing recorded yet
            bar.set_postfix_str("")
            return
        bar.n = self._epochs[run.folder] = int(last["epoch"])
        bar.total = run.config.expected_epochs(bar.n, float(metrics["epoch_seconds"].sum()))
        bar.set_postfix_str(f"train loss {last['train_loss']:.4f}")

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        for bar in (*reversed(self._bars), self._all):
            bar.close()
