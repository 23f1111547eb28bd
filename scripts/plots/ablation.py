"""The published solver taken apart: what each of its deviations does to the loss and to the directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Page
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.command.errors import RecordError, counted
from experiments.folder.read import RecordedRun, read_diagnostics
from proxprop.modes import DEVIATIONS
from scripts.plots import style
from scripts.plots.draw import new_page
from scripts.plots.notes import Footer

NAMES = {
    "conjugacy": "lost conjugacy",
    "damping": "absolute damping",
    "stop": "early stop",
    "step_length": "one step length",
    "cancellation": "cancellation",
}
NETWORKS = {"mlp": "MLP, Nesterov SGD", "convnet": "ConvNet, Adam"}
LAYERS = ("first layer", "second layer", "third layer")
MARKERS = ("o", "s", "^")
LEFT, RIGHT = 0.215, 0.97  # of all panels, as fractions of the page's width


@dataclass(frozen=True)
class Part:
    """A solver with some of the deviations: its loss at the end, and its directions beside the stated ones.

    ``cosines`` and ``ratios`` are means over the epochs observed, by layer; NaN for the stated solver itself.
    """

    label: str
    run: RecordedRun
    cosines: dict[str, float]
    ratios: dict[str, float]

    @property
    def loss(self) -> float:
        value = self.run.value("train_loss")
        return float("nan") if value is None else value


def read_parts(runs: Sequence[RecordedRun]) -> dict[str, list[Part]]:
    """The solvers of each network, from the stated one to the whole published one.

    Raises:
        RecordError: a run has no diagnostics, or there are two of one solver and network, or none that is over.
    """
    found: dict[str, dict[int, Part]] = {}
    for run in runs:
        place = _place(run.config.proxprop.optimization_mode)
        if run.summary is None or place is None:
            continue
        parts = found.setdefault(run.config.model.name, {})
        if place[0] in parts:
            raise RecordError(f"{parts[place[0]].run.folder} and {run.folder} are of one solver: leave one of them out")
        means = read_diagnostics(run.folder).groupby("layer", sort=False)[["stated_cosine", "stated_ratio"]].mean()
        cosines, ratios = means["stated_cosine"].to_dict(), means["stated_ratio"].to_dict()
        parts[place[0]] = Part(place[1], run, cosines, ratios)
    if not found:
        raise RecordError("none of the runs is over, with a solver that is a part of the published one")
    order = [name for name in NETWORKS if name in found]
    return {name: [part for _, part in sorted(found[name].items())] for name in order}


def _place(mode: str) -> tuple[int, str] | None:
    """Where a mode comes in the order of the page, and what it is called there; None for what has no place."""
    solver, _, part = mode.partition("-")
    kind, _, name = part.partition("-")
    if solver.startswith("prox_cg"):
        return 0, "stated"
    if not solver.startswith("published_cg"):
        return None
    if not part:
        return 20, "published: all"
    if name == "recurrence":
        return 1, "plain recurrence: none"
    position = DEVIATIONS.index(name)
    return (2 + position, f"only {NAMES[name]}") if kind == "only" else (10 + position, f"all but {NAMES[name]}")


def to_markdown(parts: Sequence[Part]) -> str:
    """A row for each solver: its loss, and for each layer the cosine and the ratio of norms."""
    lines = ["| solver | training loss | cosine to the stated direction, by layer | norm over its norm |",
             "|---|---:|---|---|"]  # fmt: skip
    for part in parts:
        beside = [", ".join(f"{value:#.2g}" for value in one.values()) for one in (part.cosines, part.ratios)]
        cells = ["–" if "nan" in text else text for text in beside]
        lines.append(f"| {part.label} | {part.loss:#.4g} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def draw_ablation(networks: dict[str, list[Part]]) -> Page:
    """One page: a row of panels for each network, with a line for each solver."""
    everything = [part for parts in networks.values() for part in parts]
    page = new_page("The published solver taken apart: each deviation alone, and all but each")
    footer = Footer.of([part.run for part in everything], ["directions: means over all steps of the epochs observed"])
    footer.draw(page)
    grid = page.add_gridspec(
        len(networks),
        3,
        left=LEFT,
        right=RIGHT,
        bottom=footer.top + 0.1,
        top=style.LEGEND_TOP - 0.05,
        wspace=0.06,
        hspace=0.3,
        height_ratios=[len(parts) for parts in networks.values()],
    )
    for row, (name, parts) in enumerate(networks.items()):
        axes = [page.add_subplot(grid[row, column]) for column in range(3)]
        _dots(axes[0], [{"": part.loss} for part in parts])
        _dots(axes[1], [part.cosines for part in parts])
        _dots(axes[2], [part.ratios for part in parts])
        width = axes[0].get_position().width
        axes[0].set_title(NETWORKS[name], x=(style.LEFT - LEFT) / width)
        axes[0].set_yticks(range(len(parts)), [part.label for part in parts])
        axes[1].axvline(1, color=style.MUTED, linewidth=0.8)
        axes[2].axvline(1, color=style.MUTED, linewidth=0.8)
        axes[2].set_xscale("log")
        axes[2].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[2].xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes[2].xaxis.set_minor_formatter(NullFormatter())
        for one in axes:
            one.set_ylim(len(parts) - 0.5, -0.5)
            one.margins(x=0.08)
        for one in axes[1:]:
            one.tick_params(labelleft=False)
        layers = list(parts[-1].cosines)
        axes[2].legend(
            *_layer_handles(axes[2], layers), loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.2
        )
        if row == len(networks) - 1:
            axes[0].set_xlabel(f"Training loss after {counted(max(part.run.epochs for part in everything), 'epoch')}")
            axes[1].set_xlabel("Cosine to the stated direction")
            axes[2].set_xlabel("‖D‖ over its norm")
    return page


def _layer_handles(axes: Axes, layers: Sequence[str]) -> tuple[list[object], list[str]]:
    count = min(len(layers), len(MARKERS))
    return list(axes.lines[:count]), list(LAYERS[:count])


def _dots(axes: Axes, rows: Sequence[dict[str, float]]) -> None:
    """A row of dots for each solver, one for each layer."""
    layers = list(rows[-1])[: len(MARKERS)]
    for index, layer in enumerate(layers):
        values = np.array([row.get(layer, np.nan) for row in rows])
        color = style.INK if len(layers) == 1 else style.UNORDERED[index]
        axes.plot(values, range(len(rows)), marker=MARKERS[index], linestyle="", markersize=5.5, color=color)
