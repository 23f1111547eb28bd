"""The paper's Table 1, the loss over the step size, as a figure and as a table: what was measured, and the paper's."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Page
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from experiments.command.errors import RecordError, counted
from experiments.config import differing_keys
from experiments.folder.read import RecordedRun
from scripts.plots import style
from scripts.plots.draw import draw_band, new_page, scale_loss
from scripts.plots.notes import Footer, joined
from scripts.plots.paper_numbers import STEP_SIZES, TABLE_1
from scripts.plots.runs import SEED_KEYS, Stat
from scripts.plots.sweep import Answer, Cell, Question, answer
from scripts.plots.sweep_table import text as cell_text
from scripts.plots.table import rule, write_row

X, HUE, Y = "optimizer.lr", "proxprop.optimization_mode", "train_loss"
VARIES = {X, HUE, *SEED_KEYS, "epochs"}
"""In which keys the runs of one table may differ."""
LABELS = {"gradient": "BackProp", "cg1": "ProxProp (cg1)", "cg3": "ProxProp (cg3)", "cg5": "ProxProp (cg5)"}
SOLVERS = {"published": "published solver", "prox": "as stated"}
TOP_NOTE = "at the top: × diverged, ▲ above the axis; ⊗ NaN in the paper, △ above the axis in the paper"
TOP = 3.2
"""Of the loss axis; before training the loss is 2.3."""


@dataclass(frozen=True)
class Row:
    """A row of the paper's table by one of the solvers; BackProp has one row alone."""

    method: str
    solver: str | None
    cells: tuple[Cell | None, ...]

    @property
    def label(self) -> str:
        return LABELS[self.method] if self.solver is None else f"{LABELS[self.method]}, {SOLVERS[self.solver]}"

    @property
    def cut(self) -> str:
        """'15 epochs', where the runs that did not diverge are not as long as the paper's; nothing where they are."""
        runs = [run for cell in self.cells if cell for run in cell.runs if run.status != "diverged"]
        lengths = sorted({run.epochs for run in runs})
        if lengths in ([], [50]):
            return ""
        return " or ".join([*map(str, lengths[:-1]), counted(lengths[-1], "epoch")])

    @property
    def label_with_cut(self) -> str:
        return f"{self.label} ({self.cut})" if self.cut else self.label


def read_table(runs: Sequence[RecordedRun]) -> tuple[list[Row], Answer]:
    """The rows of which there is at least one run, in the paper's order.

    Raises:
        RecordError: runs differ in more than the table has a place for, or none has begun.
    """
    for run in runs[1:]:
        if keys := sorted({*differing_keys(runs[0].config, run.config)} - VARIES):
            raise RecordError(f"{runs[0].folder} and {run.folder} differ in {', '.join(keys)}: the runs of a Table 1 "
                              f"differ in {X}, {HUE}, seeds and epochs alone")  # fmt: skip
    by_row = itertools.groupby(sorted(runs, key=_mode), key=_mode)
    begun = [run for _, row in by_row for run in _as_far_as_all(_longest(row))]
    found = answer(Question(X, HUE, Y), begun or runs, unfinished=bool(begun))
    cells = {(cell.hue, cell.x): cell for cell in found.cells}
    rows = []
    for method in TABLE_1:
        for solver in (None,) if method == "gradient" else SOLVERS:
            mode = method if solver is None else f"{solver}_{method}"
            row = Row(method, solver, tuple(cells.get((mode, tau)) for tau in STEP_SIZES))
            if any(row.cells):
                rows.append(row)
    return rows, found


def title(found: Answer) -> str:
    tau = found.runs[0].config.proxprop.tau_prox
    return f"Table 1: the MLP's full-batch loss over the step size τ (the learning rate), τ_θ = {tau:g}"


def _mode(run: RecordedRun) -> str:
    return run.config.proxprop.optimization_mode


def _longest(runs: Iterable[RecordedRun]) -> list[RecordedRun]:
    """Of runs of the same settings, made in several places, one: that which is over, or has come farthest."""

    def settings(run: RecordedRun) -> tuple[float, int, int | None]:
        return run.config.optimizer.lr, run.config.seed, run.config.order_seed

    same = itertools.groupby(sorted(runs, key=lambda run: str(settings(run))), key=settings)
    return [max(one, key=lambda run: (run.summary is not None, run.epochs)) for _, one in same]


def _as_far_as_all(row: Sequence[RecordedRun]) -> list[RecordedRun]:
    """Where some runs of a row are not over: those that have begun, up to the epoch that they all have come to."""
    begun = [run for run in row if run.epochs]
    if all(run.summary for run in begun):
        return begun
    last = min((run.epochs for run in begun if run.status != "diverged"), default=0)
    return [_until(run, last) for run in begun]


def _until(run: RecordedRun, epoch: int) -> RecordedRun:
    """As it was after that epoch."""
    if run.epochs <= epoch:
        return run
    return dataclasses.replace(run, status="interrupted", metrics=run.metrics.iloc[: epoch + 1])


def length_note(rows: Sequence[Row]) -> str:
    """Which rows are not 50 epochs long."""
    parts = [f"{row.label}: {row.cut}" for row in rows if row.cut]
    return f"in place of 50 epochs: {'; '.join(parts)}" if parts else ""


def _notes(rows: Sequence[Row], found: Answer) -> list[str]:
    missing = [f"{row.label} at {tau:g}" for row in rows for tau, cell in zip(STEP_SIZES, row.cells, strict=True)
               if cell is None]  # fmt: skip
    return [joined(length_note(rows), f"missing: {', '.join(missing)}" if missing else "", found.note)]


def draw_table1(rows: Sequence[Row], found: Answer) -> Page:
    """Lines are measured, open markers are the paper's; what diverged, or is above the axis, is marked at its top."""
    page = new_page(title(found))
    footer = Footer.of(found.runs, [*_notes(rows, found), TOP_NOTE])
    footer.draw(page)
    bottom = footer.top + 0.1
    axes = page.add_axes((0.065, bottom, 0.905, style.LEGEND_TOP - 3 * style.LEGEND_ROW - 0.06 - bottom))
    axes.set_xscale("log")
    axes.set_xlim(STEP_SIZES[-1] / 1.6, STEP_SIZES[0] * 1.6)
    axes.xaxis.set_major_locator(FixedLocator(STEP_SIZES))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("Step size τ (optimizer.lr)")
    axes.set_ylabel("Full-batch training loss (cross-entropy)")
    stats = [cell.stat for row in rows for cell in row.cells if cell]
    losses = [*(stat.mean for stat in stats), *(stat.low for stat in stats), *itertools.chain(*TABLE_1.values())]
    scale_loss(axes, min(loss for loss in losses if loss > 0) / 1.6, TOP)
    handles = [_draw_row(axes, row) for row in rows]
    tops: dict[float, list[tuple[str, str]]] = {tau: [] for tau in STEP_SIZES}
    for row in rows:
        for tau, cell in zip(STEP_SIZES, row.cells, strict=True):
            if cell and (sign := _sign(cell.stat.mean, "×", "▲")):
                tops[tau].append((sign, style.LINES[row.method].color))
    for method, losses in TABLE_1.items():
        line = style.LINES[method]
        shown = [loss if loss <= TOP else math.nan for loss in losses]
        handles += axes.plot(STEP_SIZES, shown, linestyle="", marker=_marker(line), markersize=10,
                             markerfacecolor="none", markeredgecolor=line.color, markeredgewidth=1.1, zorder=4,
                             label=f"{LABELS[method]}, the paper")  # fmt: skip
        for tau, loss in zip(STEP_SIZES, losses, strict=True):
            if sign := _sign(loss, "⊗", "△"):
                tops[tau].append((sign, line.color))
    for tau, signs in tops.items():
        _mark_top(axes, tau, signs)
    page.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.038, style.LEGEND_TOP), ncols=4,
                borderaxespad=0, handlelength=3, fontsize=8)  # fmt: skip
    return page


def _marker(line: style.Line) -> str:
    return line.marker or "p"


def _draw_row(axes: Axes, row: Row) -> Line2D:
    line = style.LINES[row.method]
    published = row.solver == "published"
    shown = [cell.stat if cell and cell.stat.mean <= TOP else Stat(math.nan) for cell in row.cells]
    means, low, high = np.array([[stat.mean, stat.low, stat.high] for stat in shown]).T
    draw_band(axes, np.array(STEP_SIZES), low, high, line.color)
    (drawn,) = axes.plot(
        STEP_SIZES,
        means,
        color=line.color,
        marker=_marker(line),
        markersize=4.5,
        linewidth=style.LINE_WIDTH,
        linestyle=style.PUBLISHED_LINESTYLE if published else "-",
        alpha=0.55 if row.cut else 1,
        label=row.label_with_cut,
    )
    return drawn


def _sign(loss: float, nan: str, above: str) -> str:
    return nan if math.isnan(loss) else above if loss > TOP else ""


def _mark_top(axes: Axes, tau: float, signs: Sequence[tuple[str, str]]) -> None:
    """Side by side at the top of the axis."""
    for index, (sign, color) in enumerate(signs):
        axes.annotate(
            sign,
            (tau, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(9 * (index - (len(signs) - 1) / 2), 5),
            textcoords="offset points",
            color=color,
            fontsize=10,
            ha="center",
            va="center",
            annotation_clip=False,
        )


def as_text(rows: Sequence[Row]) -> list[list[str]]:
    """The table's lines, the heading first: for each method what was measured, and below it the paper's."""
    lines = [["τ", *(f"{tau:g}" for tau in STEP_SIZES)]]
    for method, losses in TABLE_1.items():
        for row in rows:
            if row.method == method:
                lines.append([row.label_with_cut, *(cell_text(cell, Y) for cell in row.cells)])
        lines.append([f"{LABELS[method]}, the paper", *("NaN" if math.isnan(loss) else f"{loss:g}" for loss in losses)])
    return lines


def to_markdown(rows: Sequence[Row]) -> str:
    heading, *lines = [f"| {' | '.join(line)} |" for line in as_text(rows)]
    return "\n".join([heading, "|---|" + "---:|" * len(STEP_SIZES), *lines]) + "\n"


def draw_numbers(rows: Sequence[Row], found: Answer) -> Page:
    """The table as a page; the paper's rows in grey."""
    page = new_page(title(found))
    footer = Footer.of(found.runs, _notes(rows, found))
    footer.draw(page)
    heading, *lines = as_text(rows)
    ends = [0.36 + 0.595 * index / (len(STEP_SIZES) - 1) for index in range(len(STEP_SIZES))]
    height = min(0.05, (0.83 - footer.top - 0.03) / (len(lines) + 2))
    rule(page, 0.87, 1.2)
    write_row(page, 0.838, heading, ends, fontweight="bold")
    rule(page, 0.822, 0.6)
    y = 0.822 - height
    for line in lines:
        is_papers = line[0].endswith("the paper")
        write_row(page, y, line, ends, color=style.MUTED if is_papers else style.INK)
        y -= height * (1.35 if is_papers else 1)
    rule(page, y + height, 1.2)
    return page
