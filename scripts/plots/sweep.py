"""The numbers behind a figure of a sweep: one for each value on the x axis and each curve."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.command.errors import RecordError
from experiments.config import EXECUTION_KEYS, flat
from experiments.folder.read import RecordedRun
from scripts.plots.notes import joined
from scripts.plots.runs import SEED_KEYS, Stat, left_out_note, refuse_twins

NUMBERS = {
    "train_loss": "Full-batch training loss (cross-entropy)",
    "train_accuracy": "Training accuracy",
    "minibatch_loss": "Mean minibatch loss (cross-entropy)",
    "val_loss": "Validation loss (cross-entropy)",
    "val_accuracy": "Validation accuracy",
    "best_val_accuracy": "Best validation accuracy",
    "test_loss": "Test loss (cross-entropy)",
    "test_accuracy": "Test accuracy",
    "seconds_per_epoch": "Seconds an epoch (median)",
}
"""What can be drawn of a run: the columns of its metrics after the last epoch, and numbers of the whole run."""

# Keys in which runs may differ that one point of the figure stands for.
_NO_MATTER = {*SEED_KEYS, *EXECUTION_KEYS}


@dataclass(frozen=True)
class Question:
    """Which number `y`, over which key `x`, with a curve for each value of the key `hue`, of which runs."""

    x: str
    hue: str | None
    y: str
    where: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One point: the runs with these values of x and hue."""

    x: Any
    hue: Any
    runs: tuple[RecordedRun, ...]
    stat: Stat

    @property
    def diverged(self) -> int:
        return sum(run.status == "diverged" for run in self.runs)


@dataclass(frozen=True)
class Answer:
    """All points, by curve and along x; what was left out is in `note`."""

    question: Question
    cells: tuple[Cell, ...]
    note: str

    @property
    def hues(self) -> list[Any]:
        return list(dict.fromkeys(cell.hue for cell in self.cells))

    @property
    def runs(self) -> list[RecordedRun]:
        return [run for cell in self.cells for run in cell.runs]

    def curve(self, hue: Any) -> list[Cell]:
        return [cell for cell in self.cells if cell.hue == hue]


def answer(question: Question, runs: Sequence[RecordedRun], *, unfinished: bool = False) -> Answer:
    """
    Args:
        unfinished: take those that are not over, too, as they are.

    Raises:
        RecordError: an unknown key or number, no run that fits, or runs of one point that differ in more than seeds, or
            are of one seed.
    """
    if question.y not in NUMBERS:
        raise RecordError(f"--y: must be one of {', '.join(NUMBERS)}, got {question.y!r}")
    keys = flat_keys(runs)
    for option, key in [("--x", question.x), ("--hue", question.hue), *(("--where", key) for key in question.where)]:
        if key is not None and key not in keys:
            raise RecordError(f"{option}: no run has the key {key!r}; keys that vary here: {_varying(runs)}")
    chosen = [run for run in runs if all(label(flat(run.config).get(k)) == v for k, v in question.where.items())]
    if not chosen:
        raise RecordError(f"--where: no run has {', '.join(f'{k}={v}' for k, v in question.where.items())}")
    over = [run for run in chosen if unfinished or run.summary is not None]
    if not over:
        raise RecordError("none of the runs is over yet; see python -m experiments.show")
    groups: dict[tuple[Any, Any], list[RecordedRun]] = {}
    for run in over:
        settings = flat(run.config)
        groups.setdefault((settings.get(question.x), settings.get(question.hue or "")), []).append(run)
    cells = [_cell(question, x, hue, members) for (x, hue), members in groups.items()]
    order = list(dict.fromkeys(cell.hue for cell in sorted(cells, key=lambda cell: sort_key(cell.hue))))
    cells.sort(key=lambda cell: (order.index(cell.hue), sort_key(cell.x)))
    note = "" if unfinished else joined(left_out_note(chosen), _lengths_note(question, cells))
    return Answer(question, tuple(cells), note)


def _lengths_note(question: Question, cells: Sequence[Cell]) -> str:
    """Which points are means over runs of different lengths; nothing where none is."""
    parts = []
    for cell in cells:
        lengths = sorted({run.epochs for run in cell.runs if run.status != "diverged"})
        if len(lengths) > 1:
            parts.append(f"{_at(question, cell.x, cell.hue)} ({' and '.join(map(str, lengths))} epochs)")
    return f"means over runs of different lengths: {', '.join(parts)}" if parts else ""


def _at(question: Question, x: Any, hue: Any) -> str:
    """A point's place: 'optimizer.lr=1, model.name=mlp'."""
    return f"{question.x}={label(x)}" + (f", {question.hue}={label(hue)}" if question.hue else "")


def flat_keys(runs: Sequence[RecordedRun]) -> set[str]:
    return {key for run in runs for key in flat(run.config)}


def _cell(question: Question, x: Any, hue: Any, runs: Sequence[RecordedRun]) -> Cell:
    settings = [flat(run.config) for run in runs]
    differing = sorted(key for key in flat_keys(runs) if len({label(one.get(key)) for one in settings}) > 1)
    if extra := [key for key in differing if key not in _NO_MATTER]:
        raise RecordError(
            f"runs with {_at(question, x, hue)} also differ in {', '.join(extra)}; choose with --hue or --where"
        )
    refuse_twins(runs)
    steady = [run for run in runs if run.status != "diverged"]
    return Cell(x, hue, tuple(runs), Stat.of(_number(run, question.y) for run in steady))


def _number(run: RecordedRun, name: str) -> float | None:
    if name == "test_loss":
        return None if run.summary is None else run.summary["test_loss"]
    if name in ("test_accuracy", "best_val_accuracy", "seconds_per_epoch"):
        number: float | None = getattr(run, name)
        return number
    return run.value(name)


def _varying(runs: Sequence[RecordedRun]) -> str:
    settings = [flat(run.config) for run in runs]
    varying = [key for key in settings[0] if len({label(one.get(key)) for one in settings}) > 1 and key != "name"]
    return ", ".join(varying) or "none"


def label(value: Any) -> str:
    """A value as --where and labels have it: 50.0 as 50, a list as 8000x1000."""
    if isinstance(value, (list, tuple)):
        return "x".join(map(label, value))
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def sort_key(value: Any) -> tuple[bool, float, list[tuple[bool, int, str]]]:
    """Numbers by size, then text with the numbers in it by size: cg3 before cg10."""
    if isinstance(value, (int, float)):
        return (False, float(value), [])
    parts = re.findall(r"\d+|\D+", label(value))
    return (True, 0.0, [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts])
