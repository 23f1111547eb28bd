"""How the pages look: fonts, colours, markers, sizes."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib as mpl

PAGE = (12.0, 6.0)  # inches
MARKERS_PER_CURVE = 7
LINE_WIDTH = 1.5  # points
BAND_ALPHA = 0.2
INK, MUTED = "#1a1a1a", "#5f5f5f"

RC = {
    "pdf.fonttype": 42,  # embedded TrueType: the text stays text
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
}


@dataclass(frozen=True)
class Line:
    """Colour, marker and dashes tell a curve, so that greyscale and colour-blind eyes can too."""

    color: str
    marker: str
    linestyle: str = "-"


# Okabe and Ito's palette, which stays apart for colour-blind eyes and has graded lightness.
LINES = {
    "gradient": Line("#000000", "", (0, (5, 1.6, 1.2, 1.6))),
    "cg1": Line("#009E73", "v"),
    "cg3": Line("#E69F00", "o"),
    "cg5": Line("#56B4E9", "s"),
    "cg10": Line("#0072B2", "^"),
    "exact": Line("#B5467F", "D"),
}
# For values that have no line of their own.
OTHER_LINES = (
    Line("#009E73", "v"),
    Line("#E69F00", "o"),
    Line("#56B4E9", "s"),
    Line("#0072B2", "^"),
    Line("#B5467F", "D"),
    Line("#8C6D31", "P"),
)
# The published solver's curve has its mode's colour and marker, but dashed and hollow.
PUBLISHED_LINESTYLE = (0, (3.5, 1.8))


def line_of(value: str, index: int) -> Line:
    """The line of an optimization mode, the same in all figures; for any other value, the one at ``index``."""
    own = LINES.get(value.removeprefix("prox_"))
    return own or OTHER_LINES[index % len(OTHER_LINES)]


def apply() -> None:
    mpl.use("pdf")
    mpl.rcParams.update(RC)
