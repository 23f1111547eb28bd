"""Draws the diagnostics of runs: a column for each layer, a curve for each run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Page
from matplotlib.ticker import MaxNLocator, NullFormatter

from experiments.command.errors import RecordError
from experiments.folder.read import RecordedRun
from scripts.plots import style
from scripts.plots.draw import new_page
from scripts.plots.notes import Footer, joined

MOST_LAYERS = 6
WIDE = 30
"""Ratios are drawn on a logarithmic axis when the largest is more than this many times the smallest."""


@dataclass(frozen=True)
class Observed:
    """A run, and the rows of its diagnostics."""

    run: RecordedRun
    rows: pd.DataFrame

    @property
    def layers(self) -> list[str]:
        return list(dict.fromkeys(self.rows["layer"]))


def draw_diagnostics(observed: Sequence[Observed]) -> Page:
    """One page: above the smallest cosine of each epoch, below the mean length of D over that of the explicit step.

    Raises:
        RecordError: the runs have not the same layers, or more than there is room for.
    """
    layers = observed[0].layers
    for other in observed[1:]:
        if other.layers != layers:
            raise RecordError(
                f"{observed[0].run.folder} and {other.run.folder}: have different layers ({', '.join(layers)} and "
                f"{', '.join(other.layers)}); draw them in two figures"
            )
    if len(layers) > MOST_LAYERS:
        raise RecordError(f"{observed[0].run.folder}: has {len(layers)} layers, and a page room for {MOST_LAYERS}")
    page = new_page("Directions over epochs: descent and length")
    footer = Footer.of([one.run for one in observed], [_notes(observed)])
    footer.draw(page)
    labels = _labels(observed)
    columns = max(1, int(800 / (61 + 5.8 * max(map(len, labels)))))  # points: of the page, a handle, a letter
    legend_rows = -(-len(labels) // columns)
    grid = page.add_gridspec(
        2,
        len(layers),
        left=0.09,
        right=0.97,
        bottom=footer.top + 0.1,
        top=style.LEGEND_TOP - legend_rows * style.LEGEND_ROW - 0.055,
        wspace=0.1 + 0.06 * len(layers),
        hspace=0.14,
    )
    lines = style.lines_of(labels, ordered=False)
    for column, layer in enumerate(layers):
        upper, lower = page.add_subplot(grid[0, column]), page.add_subplot(grid[1, column])
        for one, line, label in zip(observed, lines, labels, strict=True):
            rows = one.rows[one.rows["layer"] == layer]
            _draw(upper, rows["epoch"], rows["min_cosine"], line, label)
            _draw(lower, rows["epoch"], rows["mean_step_ratio"], line, label)
        upper.set_title(f"Layer {layer}")
        upper.tick_params(labelbottom=False)
        upper.axhline(0, color=style.INK, linewidth=0.8)
        upper.set_ylim(*_cosine_limits(observed))
        _scale_ratio(lower, [one.rows.loc[one.rows["layer"] == layer, "mean_step_ratio"] for one in observed])
        lower.set_xlabel("Epoch")
        for axes in (upper, lower):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.margins(x=0.06)
        if column == 0:
            upper.set_ylabel("Smallest cosine of\nD to the gradient AᵀG")
            lower.set_ylabel("Mean ‖D‖ / (τ‖AᵀG‖)\n(1: an explicit step)")
    page.align_ylabels(page.axes[:2])
    handles, _ = page.axes[0].get_legend_handles_labels()
    page.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.038, style.LEGEND_TOP),
        ncols=columns,
        handlelength=3.6,
        borderaxespad=0,
    )
    return page


def _draw(axes: Axes, epochs: pd.Series, values: pd.Series, line: style.Line, label: str) -> None:
    axes.plot(
        epochs,
        values,
        color=line.color,
        linestyle=line.linestyle,
        linewidth=style.LINE_WIDTH,
        marker=line.marker or ".",
        markersize=5,
        markerfacecolor=line.face,
        markevery=max(1, len(values) // style.MARKERS_PER_CURVE),
        label=label,
    )


def _cosine_limits(observed: Sequence[Observed]) -> tuple[float, float]:
    """The same for all layers, with zero in sight."""
    cosines = pd.concat([one.rows["min_cosine"] for one in observed]).dropna()
    low, high = min([0.0, *cosines]), max([0.1, *cosines])
    margin = 0.1 * (high - low)
    return low - margin, high + margin


def _scale_ratio(axes: Axes, ratios: Sequence[pd.Series]) -> None:
    values = pd.concat(ratios)
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) and values.max() > WIDE * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.margins(y=0.08)
    else:
        axes.set_ylim(bottom=0)


def _labels(observed: Sequence[Observed]) -> list[str]:
    """The runs' modes, where these tell them apart, or the names of their folders."""
    modes = [one.run.config.proxprop.optimization_mode for one in observed]
    names = [one.run.folder.name for one in observed]
    if len(set(modes)) == len(modes):
        return modes
    return names if len(set(names)) == len(names) else [str(one.run.folder) for one in observed]


def _notes(observed: Sequence[Observed]) -> str:
    """How much was seen, and what was not as it should be."""
    steps = sum(int(one.rows["steps"].sum()) for one in observed)
    bad = [
        f"{label} {int(count)}"
        for label, one in zip(_labels(observed), observed, strict=True)
        if (count := one.rows["not_descent"].sum())
    ]
    failed = sum(int(one.rows["failed"].sum()) for one in observed)
    unfinished = [f"{one.run.folder.name} ({one.run.status})" for one in observed if one.run.status != "finished"]
    return joined(
        f"{steps:,} directions observed; those that do not descend: {', '.join(bad) or 'none'}",
        f"factorisations failed: {failed}" if failed else "",
        f"not finished: {', '.join(unfinished)}" if unfinished else "",
    )
