"""How the pages look: fonts, colours, markers, sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib import colormaps
from matplotlib.colors import to_hex

PAGE = (12.0, 6.0)  # inches
LEFT = 0.045  # margin, as a fraction of the page's width
TITLE_TOP, LEGEND_TOP, LEGEND_ROW = 0.955, 0.905, 0.038  # as fractions of the page's height
MARKERS_PER_CURVE = 7
LINE_WIDTH = 1.5  # points
BAND_ALPHA = 0.2
INK, MUTED = "#1a1a1a", "#5f5f5f"

RC = {
    "pdf.fonttype": 42,  # embedded TrueType: the text stays text
    "svg.hashsalt": "proxprop",  # names in an SVG are random otherwise
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Line:
    """Colour, marker and dashes tell a curve, so that greyscale and colour-blind eyes can too."""

    color: str
    marker: str
    linestyle: Any = "-"
    hollow: bool = False

    @property
    def face(self) -> str:
        """The colour of the marker's inside."""
        return "white" if self.hollow else self.color


# Okabe and Ito's palette, which stays apart for colour-blind eyes and has graded lightness.
LINES = {
    "gradient": Line("#000000", "", (0, (5, 1.6, 1.2, 1.6))),
    "cg1": Line("#009E73", "v"),
    "cg3": Line("#E69F00", "o"),
    "cg5": Line("#56B4E9", "s"),
    "cg10": Line("#0072B2", "^"),
    "exact": Line("#B5467F", "D"),
}
# Other optimizers: dashed, with hollow markers where colours are near; ProxProp inside one has its colour, and the line
# and marker of the mode.
OPTIMIZERS = {
    "sgd": Line("#000000", "", (0, (5, 1.6, 1.2, 1.6))),
    "adam": Line("#0072B2", "", (0, (5, 1.6, 1.2, 1.6))),
    "muon": Line("#009E73", "", (0, (5, 1.6, 1.2, 1.6))),
    "adamw": Line("#56B4E9", "v", (0, (1.5, 1.5)), hollow=True),
    "soap": Line("#E69F00", "P", (0, (1.5, 1.5)), hollow=True),
    "shampoo": Line("#B5467F", "X", (0, (1.5, 1.5)), hollow=True),
    "kfac": Line("#8C6D31", "s", (0, (1.5, 1.5)), hollow=True),
    "isaac": Line("#7A5CC2", "^", (0, (1.5, 1.5)), hollow=True),
}
INSIDE = ("cg1", "cg3", "cg5", "cg10", "exact")
LINES |= OPTIMIZERS | {
    f"{mode}_{name}": dataclasses.replace(line, marker=LINES[mode].marker, linestyle="-", hollow=False)
    for mode in INSIDE
    for name, line in OPTIMIZERS.items()
}
# For values that have no line of their own: markers and dashes change at different paces, so that no two are alike.
MARKERS = ("v", "o", "s", "^", "D", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
UNORDERED = ("#009E73", "#E69F00", "#56B4E9", "#0072B2", "#B5467F", "#8C6D31")
# The published solver's curve has its mode's colour and marker, but dashed and hollow.
PUBLISHED_LINESTYLE = (0, (3.5, 1.8))


def lines_of(values: Sequence[str], ordered: bool) -> list[Line]:
    """A line for each of ``values``, no two alike.

    Optimization modes have the same lines as in all figures; all else has a palette from dark to light where values
    are ``ordered``, and one of different colours otherwise.
    """
    own = [_line_of_mode(value) for value in values]
    if all(own):
        return [line for line in own if line]
    count = len(values)
    colors = [to_hex(colormaps["viridis"](0.92 * i / max(1, count - 1))) for i in range(count)]
    return [
        Line(
            colors[i] if ordered else UNORDERED[i % len(UNORDERED)],
            MARKERS[i % len(MARKERS)],
            DASHES[i // len(MARKERS) % len(DASHES)],
        )
        for i in range(count)
    ]


def _line_of_mode(value: str) -> Line | None:
    kind, _, mode = value.rpartition("_")
    line = LINES.get(mode)
    if line is None or kind not in ("", "prox", "published"):
        return None
    return dataclasses.replace(line, linestyle=PUBLISHED_LINESTYLE, hollow=True) if kind == "published" else line


def apply() -> None:
    """The look of all figures, whatever the user's settings; all text is text (no formula between dollar signs)."""
    mpl.rcdefaults()
    mpl.use("pdf")
    mpl.rcParams.update(RC)
