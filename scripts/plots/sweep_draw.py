"""Draws the answer to a question about a sweep."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Page
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from experiments.command.errors import RecordError
from scripts.plots import style
from scripts.plots.draw import draw_band, in_percent, new_page, scale_loss
from scripts.plots.notes import Footer, band_note, joined
from scripts.plots.sweep import NUMBERS, Answer, label, sort_key

WIDE = 30
"""An axis is logarithmic when its largest value is more than this many times its smallest."""


def draw_sweep(answer: Answer, xscale: str | None = None, yscale: str | None = None, title: str | None = None) -> Page:
    """One page: a curve for each hue, bands over seeds, and crosses at the top for runs that diverged.

    Where x is no number there is nothing between its values: points with bars, side by side, in place of curves.
    """
    question = answer.question
    name = NUMBERS[question.y]
    heading = title or f"{name.partition(' (')[0]} over {question.x}"
    page = new_page(heading)
    numeric = _is_numeric(answer)
    # Two lines each at the most; the command prints the whole note.
    notes = (answer.note, joined(band_note((len(cell.runs) for cell in answer.cells), "bands" if numeric else "bars"),
                                 _diverged_note(answer)))  # fmt: skip
    footer = Footer.of(answer.runs, [textwrap.shorten(note, 320, placeholder=" …") for note in notes])
    footer.draw(page)
    columns = min(7, 3 + 120 // max(12, *(len(label(hue)) for hue in answer.hues)))
    rows = -(-(len(answer.hues) + 2) // columns)
    top = style.LEGEND_TOP - rows * style.LEGEND_ROW - 0.03
    axes = page.add_axes((0.065, footer.top + 0.1, 0.905, max(0.2, top - footer.top - 0.1)))
    lines = style.lines_of([label(hue) for hue in answer.hues], _is_ordered(answer.hues))
    positions = _scale_x(axes, answer, xscale)
    top = _scale_y(axes, answer, yscale)
    axes.set_xlabel(question.x)
    axes.set_ylabel(name)
    step = 0 if numeric else min(0.1, 0.7 / len(answer.hues))
    handles = [
        _draw_curve(axes, answer, hue, line, positions, top, step) for hue, line in zip(answer.hues, lines, strict=True)
    ]
    if (start := _before_training(answer)) is not None:
        handles.append(axes.axhline(start, color=style.MUTED, linewidth=1, linestyle=":", label="before training"))
    if any(cell.diverged for cell in answer.cells):
        cross = Line2D([], [], color=style.MUTED, marker="x", linestyle="", markeredgewidth=2, label="diverged")
        handles.append(cross)
    page.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.038, style.LEGEND_TOP),
        ncols=min(len(handles), columns),
        borderaxespad=0,
        handlelength=3,
    )
    return page


def _is_ordered(hues: Sequence[Any]) -> bool:
    """Whether the values differ in a number alone: 0.5 and 5, prox_cg3 and prox_cg10."""
    return len(hues) > 1 and len({re.sub(r"[0-9.e+-]+", "", label(hue)) for hue in hues}) == 1


def _draw_curve(
    axes: Axes, answer: Answer, hue: Any, line: style.Line, positions: dict[str, float], top: float, step: float
) -> Line2D:
    """The curve of ``hue``, or points ``step`` beside the next one's; what is above the ``top`` is marked there."""
    cells = answer.curve(hue)
    place = answer.hues.index(hue) - (len(answer.hues) - 1) / 2
    xs = np.array([positions[label(cell.x)] + place * step for cell in cells])
    mean = np.array([cell.stat.mean for cell in cells])  # NaN where all diverged: the curve is broken there
    low, high = np.array([[cell.stat.low, cell.stat.high] for cell in cells]).T
    if not step:
        draw_band(axes, xs, low, high, line.color)
    elif np.isfinite(low).any():
        reach = mean - low, high - mean
        axes.errorbar(xs, mean, reach, fmt="none", ecolor=line.color, elinewidth=style.LINE_WIDTH, capsize=3)
    (drawn,) = axes.plot(
        xs,
        mean,
        color=line.color,
        marker=line.marker or "p",
        markersize=6,
        markerfacecolor=line.face,
        linestyle="" if step else line.linestyle,
        linewidth=style.LINE_WIDTH,
        label="all runs" if answer.question.hue is None else label(hue),
    )
    for x, cell in zip(xs, cells, strict=True):
        if cell.diverged:
            others = [other.hue for other in answer.cells if label(other.x) == label(cell.x) and other.diverged]
            aside = 0 if step else 9 * (others.index(hue) - (len(others) - 1) / 2)
            axes.annotate(
                "×",
                (x, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(aside, -2),  # side by side
                textcoords="offset points",
                color=line.color,
                fontsize=15,
                fontweight="bold",
                ha="center",
                va="center",
                annotation_clip=False,
            )
        elif cell.stat.mean > top:
            axes.plot(x, top, "^", color=line.color, markerfacecolor="white", markersize=8, clip_on=False, zorder=5)
    return drawn


def _is_numeric(answer: Answer) -> bool:
    """Whether all values of x are numbers."""
    return all(isinstance(cell.x, (int, float)) and not isinstance(cell.x, bool) for cell in answer.cells)


def _scale_x(axes: Axes, answer: Answer, scale: str | None) -> dict[str, float]:
    """Where each value of x stands: numbers at their value, all else side by side."""
    values = [cell.x for cell in sorted(answer.cells, key=lambda cell: sort_key(cell.x))]
    if not _is_numeric(answer):
        names = list(dict.fromkeys(map(label, values)))
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.5, len(names) - 0.5)
        return {name: float(index) for index, name in enumerate(names)}
    if scale == "log" and min(values) <= 0:
        raise RecordError(f"--xscale: log needs positive numbers, but {answer.question.x} is {min(values):g} in a run")
    ticks = sorted(set(values))
    if scale == "log" or (scale is None and ticks[0] > 0 and ticks[-1] > WIDE * ticks[0]):
        axes.set_xscale("log")
        axes.set_xlim(ticks[0] / 1.8, ticks[-1] * 1.8)
    else:
        margin = 0.05 * (ticks[-1] - ticks[0]) or 0.5
        axes.set_xlim(ticks[0] - margin, ticks[-1] + margin)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return {label(value): float(value) for value in ticks}


def _scale_y(axes: Axes, answer: Answer, scale: str | None) -> float:
    """Scale the y axis and return its top: at most twice the loss before training, so that no curve flattens others."""
    name = answer.question.y
    stats = [cell.stat for cell in answer.cells if math.isfinite(cell.stat.mean)]
    if not stats:
        return math.inf
    low = min(np.nanmin([stat.mean, stat.low]) for stat in stats)
    high = max(np.nanmax([stat.mean, stat.high]) for stat in stats)
    is_accuracy = name.endswith("accuracy")
    if (start := _before_training(answer)) is not None:
        high = max(high, start) if low > start else min(max(high, start), 2 * start)
    if scale == "log" and low <= 0:
        raise RecordError(f"--yscale: log needs positive numbers, but {name} is {low:g} in a run")
    if scale == "log" or (scale is None and not is_accuracy and low > 0 and high > 5 * low):
        top = 1.2 * high
        scale_loss(axes, low / 1.2, top)
    else:
        margin = 0.06 * (high - low) or 0.1
        top = high + margin
        axes.set_ylim(low - margin, top)
    if is_accuracy:
        in_percent(axes)
    return float(top)


def _before_training(answer: Answer) -> float | None:
    """The mean loss that the runs start with, for the losses that are recorded by epoch."""
    name = answer.question.y
    if name not in ("train_loss", "val_loss", "minibatch_loss"):
        return None
    return float(np.mean([run.value(name, 0) for run in answer.runs]))


def _diverged_note(answer: Answer) -> str:
    parts = []
    for hue in answer.hues:
        cells = [cell for cell in answer.curve(hue) if cell.diverged]
        if cells:
            values = ", ".join(
                label(cell.x) + (f" ({cell.diverged} of {len(cell.runs)})" if len(cell.runs) > 1 else "")
                for cell in cells
            )
            parts.append((f"{label(hue)} " if answer.question.hue else "") + f"at {values}")
    return f"diverged: {'; '.join(parts)}" if parts else ""
