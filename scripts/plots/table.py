"""The table of final numbers: as rows, as Markdown and as a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from matplotlib.figure import Figure as Page
from matplotlib.lines import Line2D

from scripts.plots import style
from scripts.plots.draw import new_page
from scripts.plots.figures import Figure
from scripts.plots.notes import Footer
from scripts.plots.runs import Replicates, Stat

HEADINGS = (
    "Run",
    "Train loss\nat epoch N",
    "Final\ntrain loss",
    "Best val.\naccuracy",
    "Test\naccuracy",
    "s / epoch\n(median)",
    "Ratio to\nBackProp",
    "Epochs",
    "Status",
)
COLUMN_ENDS = (0.405, 0.51, 0.605, 0.7, 0.765, 0.825, 0.87, 0.955)  # wide enough for mean ± deviation


@dataclass(frozen=True)
class Row:
    """One run's line, its cells as they are read."""

    label: str
    loss_at_common_epoch: str
    final_loss: str
    best_val_accuracy: str
    test_accuracy: str
    seconds_per_epoch: str
    ratio: str
    epochs: str
    status: str


@dataclass(frozen=True)
class Group:
    """The rows of one figure; ``common_epoch`` is the N of the headings."""

    title: str
    common_epoch: int
    rows: tuple[Row, ...]


def cell(value: float | Stat, form: str) -> str:
    """'0.276', or over several seeds '0.276 ± 0.004': mean and standard deviation, equally precise."""
    stat = value if isinstance(value, Stat) else Stat(value)
    if math.isnan(stat.mean):
        return "–"
    text = format(stat.mean, form)
    if math.isnan(stat.std):
        return text
    if "e" in text or 0 < abs(stat.mean) < 1e-3:
        exponent = math.floor(math.log10(abs(stat.mean)))
        return f"({stat.mean / 10**exponent:.2f} ± {stat.std / 10**exponent:.2f})e{exponent}"
    number, percent = text.rstrip("%"), "%" * text.endswith("%")
    decimals = len(number.partition(".")[2])
    spread = format(stat.std, f".{decimals}{percent or 'f'}")
    return f"{number} ± {spread}"


def cell_in_text(value: float | Stat, form: str) -> str:
    """The same as a sentence has it: '54.96 %'."""
    return cell(value, form).replace("%", " %")


def make_row(label: str, group: Replicates | None, common_epoch: int, baseline: Replicates | None) -> Row:
    if group is None:
        return Row(label, *["–"] * 7, status="missing")
    slowness = group.seconds_per_epoch / baseline.seconds_per_epoch if baseline else math.nan
    return Row(
        label,
        cell(group.train_loss(common_epoch), "#.3g"),
        cell(group.stat(lambda run: run.value("train_loss")), "#.3g"),
        cell(group.stat(lambda run: run.best_val_accuracy), ".2%"),
        cell(group.stat(lambda run: run.test_accuracy), ".2%"),
        cell(group.seconds_per_epoch, ".2f"),
        cell(slowness, ".2f"),
        str(group.epochs),
        group.status,
    )


def make_group(figure: Figure, runs: dict[str, Replicates], published: dict[str, Replicates]) -> Group:
    """The figure's runs, then those of the published solver that are there."""
    proxprop = [curve.run for curve in figure.curves if curve.is_proxprop]
    lengths = [runs[name].epochs for name in proxprop if name in runs]
    common_epoch = max(lengths, default=0)
    baseline = next((runs.get(c.run) for c in figure.curves if not c.is_proxprop), None)
    rows = [make_row(c.label, runs.get(c.run), common_epoch, baseline) for c in figure.curves]
    rows += [
        make_row(f"{c.label}, published solver", published[c.run], common_epoch, baseline)
        for c in figure.curves
        if c.run in published
    ]
    title = figure.title.partition(": ")[2]
    return Group(title, common_epoch, tuple(rows))


def make_table(figures: Sequence[Figure], runs: dict[str, Replicates], published: dict[str, Replicates]) -> list[Group]:
    return [make_group(figure, runs, published) for figure in figures]


def to_markdown(groups: list[Group]) -> str:
    lines = []
    for group in groups:
        headings = [heading.replace("\n", " ") for heading in HEADINGS]
        headings[1] = f"Train loss at epoch {group.common_epoch}"
        lines += [f"**{group.title}**", ""]
        lines.append("| " + " | ".join(headings) + " |")
        lines.append("|---|" + "---:|" * (len(headings) - 2) + "---|")
        lines += ["| " + " | ".join(astuple(row)) + " |" for row in group.rows]
        lines.append("")
    return "\n".join(lines)


def write_row(page: Page, y: float, cells: Sequence[str], ends: Sequence[float], **options: Any) -> None:
    """The first cell flush left, the others flush right at ``ends``."""
    options = {"fontsize": 9, "va": "baseline", "linespacing": 1.2} | options
    page.text(style.LEFT + 0.01, y, cells[0], **options)
    for end, content in zip(ends, cells[1:], strict=True):
        page.text(end, y, content, ha="right", **options)


def rule(page: Page, y: float, width: float) -> None:
    page.add_artist(Line2D([style.LEFT, 1 - style.LEFT + 0.01], [y, y], color=style.INK, linewidth=width))


def draw_table(groups: list[Group], footer: Footer) -> Page:
    """The table as a page, in the manner of a book: three rules, numbers flush right."""
    page = new_page("Final numbers")
    footer.draw(page)
    count = sum(len(group.rows) + 1.5 for group in groups)
    height = min(0.042, (0.805 - footer.top - 0.03) / count)
    size = min(9.0, 0.72 * height * style.PAGE[1] * 72)

    rule(page, 0.89, 1.2)
    write_row(page, 0.828, HEADINGS, COLUMN_ENDS)
    rule(page, 0.805, 0.6)
    y = 0.805 - height
    for group in groups:
        title = f"{group.title} (N = {group.common_epoch})"
        page.text(style.LEFT + 0.01, y, title, fontsize=size, fontweight="bold", va="baseline")
        y -= height
        for row in group.rows:
            write_row(page, y, astuple(row), COLUMN_ENDS, fontsize=size)
            y -= height
        y -= 0.5 * height
    rule(page, y + 0.9 * height, 1.2)
    return page
