"""Draws one figure of `figures` from runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Page
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from scripts.plots import style
from scripts.plots.figures import Curve, Figure, Panel, Reference
from scripts.plots.notes import Footer
from scripts.plots.runs import Replicates, points

LEGEND_COLUMNS = 5  # fit a page's width
TIME_UNITS = ((2 * 3600, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))


@dataclass(frozen=True)
class Drawn:
    """A curve with the runs that it draws."""

    curve: Curve
    group: Replicates
    published: bool = False

    @property
    def label(self) -> str:
        return self.curve.label + (", published solver" if self.published else "")


def x_ends(figure: Figure, drawn: Sequence[Drawn]) -> dict[str, float]:
    """Where the epoch and the time axes end; baselines run on beyond.

    Epochs end with the longest ProxProp run, time with the figure's own choice; where these runs
    are missing, with the longest run there is.
    """
    groups = [item.group for item in drawn]
    proxprop = [group for group in groups if group.is_proxprop] or groups
    timed = [group for group in groups if group.name in figure.time_ends_with and _is_timed(group)]
    timed = timed or [group for group in proxprop if _is_timed(group)]
    return {
        "epoch": max(group.epochs for group in proxprop),
        "seconds": max((group.seconds for group in timed), default=1.0),
    }


def time_note(figure: Figure, drawn: Sequence[Drawn]) -> str:
    """Which curves run on beyond the end of the time axis, and whose end that is; nothing where none does."""
    end = x_ends(figure, drawn)["seconds"] if drawn else math.inf
    longer = [item.label for item in drawn if item.group.seconds > 1.02 * end]
    last = [item.label for item in drawn if item.group.seconds == end]
    return f"time axes end with {', '.join(last)}; longer, and cut off there: {', '.join(longer)}" if longer else ""


def _is_timed(group: Replicates) -> bool:
    return math.isfinite(group.seconds)


def x_unit(panel: Panel, x_end: float) -> tuple[int, str]:
    """What a unit of the x axis holds (an epoch, or so many seconds), and the axis' label."""
    if panel.x == "epoch":
        return 1, "Epoch"
    size, name = next((size, name) for least, size, name in TIME_UNITS if x_end >= least)
    return size, f"Training time ({name})"


def draw_curves(axes: Axes, panel: Panel, drawn: Sequence[Drawn], x_end: float) -> None:
    """Draws one curve an item, its x in the axis' unit."""
    for index, item in enumerate(drawn):
        shown = points(item.group.runs, panel.x, panel.y, x_end)
        xs = shown.xs / x_unit(panel, x_end)[0]
        line = style.LINES[item.curve.style]
        step = max(1, len(xs) // style.MARKERS_PER_CURVE)
        draw_band(axes, xs, shown.low, shown.high, line.color)
        axes.plot(
            xs,
            shown.ys,
            color=line.color,
            linestyle=style.PUBLISHED_LINESTYLE if item.published else line.linestyle,
            linewidth=style.LINE_WIDTH,
            marker=line.marker,
            markersize=5,
            markerfacecolor="white" if item.published else line.face,
            # Each curve marks other epochs than its neighbour, so that markers do not cover.
            markevery=(index * step // 3 % step, step),
            label=item.label,
        )


def draw_band(axes: Axes, xs: np.ndarray, low: np.ndarray, high: np.ndarray, color: str) -> None:
    """From the lowest to the highest, where there are several seeds."""
    if np.isfinite(low).any():
        axes.fill_between(xs, low, high, color=color, alpha=style.BAND_ALPHA, linewidth=0)


def mark_divergence(axes: Axes, panel: Panel, drawn: Sequence[Drawn], x_end: float) -> None:
    """A cross at a diverged run's last finite value, on the frame where that is out of sight."""
    top = axes.get_ylim()[1]
    diverged = [(item, run) for item in drawn for run in item.group.runs if run.status == "diverged"]
    for item, run in diverged:
        shown = points([run], panel.x, panel.y, x_end)
        if len(shown.xs) and shown.xs[-1] <= x_end:
            axes.plot(
                shown.xs[-1] / x_unit(panel, x_end)[0],
                min(shown.ys[-1], top),
                "x",
                color=style.LINES[item.curve.style].color,
                markersize=9,
                markeredgewidth=2.2,
                clip_on=False,
                zorder=5,
            )


def draw_references(axes: Axes, references: Sequence[Reference]) -> None:
    """Thin lines at what the paper states, explained in the lower right corner, which accuracies leave free."""
    lines = [
        axes.axhline(
            reference.value,
            color=style.LINES[reference.style].color,
            linewidth=0.8,
            linestyle=":",
            zorder=1,
            label=f"{reference.label} {100 * reference.value:g} %",
        )
        for reference in references
    ]
    if lines:
        lines.sort(key=lambda line: -line.get_ydata()[0])
        look = {"frameon": True, "edgecolor": "none", "fontsize": 6.5, "handlelength": 1.6, "labelcolor": "linecolor"}
        axes.legend(handles=lines, loc="lower right", **look)


def draw_panel(
    axes: Axes, panel: Panel, drawn: Sequence[Drawn], x_end: float, references: Sequence[Reference] = ()
) -> None:
    draw_curves(axes, panel, drawn, x_end)
    draw_references(axes, references)
    axes.set_title(panel.title)
    size, label = x_unit(panel, x_end)
    axes.set_xlabel(label)
    if panel.x == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.set_xlim(0, 1.02 * x_end / size or 1)  # room for the last marker
    if panel.y == "train_loss":
        axes.set_ylabel("Full-batch training loss (cross-entropy)")
        scale_loss(axes, *loss_limits(panel, drawn, x_end))
    else:
        axes.set_ylabel("Validation accuracy")
        in_percent(axes)
        axes.set_ylim(bottom=lowest_accuracy(panel, drawn, x_end, references))
    mark_divergence(axes, panel, drawn, x_end)


def lowest_accuracy(
    panel: Panel, drawn: Sequence[Drawn], x_end: float, references: Sequence[Reference] = ()
) -> float | None:
    """Where the axis starts: a little below all it shows, but for the start of training, where all are at chance."""
    shown = [points(item.group.runs, panel.x, panel.y, x_end) for item in drawn]
    values = np.concatenate([each[1:] for one in shown for each in (one.ys, one.low)])
    values = np.append(values[np.isfinite(values)], [reference.value for reference in references])
    return float(values.min() - 0.06 * np.ptp(values)) if values.size and np.ptp(values) else None


def loss_limits(panel: Panel, drawn: Sequence[Drawn], x_end: float) -> tuple[float, float]:
    """The range of the losses drawn, its top at most twice the highest before training.

    So a diverging curve leaves at the top rather than flatten the others.
    """
    shown = [points(item.group.runs, panel.x, panel.y, x_end) for item in drawn]
    values = np.concatenate([each for one in shown for each in (one.ys, one.low, one.high)])
    values = values[values > 0]
    if not values.size:
        return 0.1, 10.0
    highest = 2 * max(item.group.train_loss(0).mean for item in drawn)
    return 0.85 * values.min(), 1.2 * min(values.max(), highest)


def scale_loss(axes: Axes, low: float, high: float) -> None:
    """Logarithmic, with plain numbers where few decades are shown."""
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if high < 300 * low:
        subs = (1, 2, 5) if high > 10 * low else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))


def in_percent(axes: Axes) -> None:
    """Fractions up the axis as per cent, with decimals only where ticks need them."""
    axes.yaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))


def new_page(title: str) -> Page:
    page = Page(figsize=style.PAGE)
    page.text(style.LEFT, style.TITLE_TOP, title, fontsize=15, fontweight="bold", va="top")
    return page


def draw_figure(figure: Figure, title: str, drawn: Sequence[Drawn], footer: Footer) -> Page:
    """One page: the title, a legend for all panels, the panels side by side, the footer."""
    page = new_page(title)
    footer.draw(page)
    # Where no run has seconds, there is nothing over time.
    panels = [panel for panel in figure.panels if panel.x == "epoch" or any(_is_timed(item.group) for item in drawn)]
    columns = len(panels)
    rows = max(2 if any(item.published for item in drawn) else 1, math.ceil(len(drawn) / LEGEND_COLUMNS))
    grid = page.add_gridspec(
        1,
        columns,
        left=0.065,
        right=0.97,
        bottom=footer.top + 0.1,
        top=style.LEGEND_TOP - rows * style.LEGEND_ROW - 0.055,
        wspace=0.1 + 0.07 * columns,
    )
    if not drawn:
        page.text(0.5, 0.5, "no run of this figure is there", ha="center", color=style.MUTED)
        return page
    ends = x_ends(figure, drawn)
    # The paper's numbers are of CIFAR-10.
    stated = figure.references if drawn[0].group.runs[0].config.data.name == "cifar10" else ()
    for column, panel in enumerate(panels):
        axes = page.add_subplot(grid[0, column])
        references = [reference for reference in stated if reference.y == panel.y]
        draw_panel(axes, panel, drawn, ends[panel.x], references)
    handles, labels = page.axes[0].get_legend_handles_labels()
    page.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(0.038, style.LEGEND_TOP),
        ncols=(len(labels) + rows - 1) // rows,
        handlelength=3.6,
        columnspacing=1.8,
        borderaxespad=0,
    )
    return page
