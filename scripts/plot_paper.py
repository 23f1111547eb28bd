"""Draws the paper's figures from the runs in a results folder, as one vector PDF.

python scripts/plot_paper.py results/paper --published results/paper_published --output paper.pdf
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from matplotlib.figure import Figure as Page

from experiments.command.cli import Parser, run_command, user_path
from experiments.folder.read import RecordedRun
from scripts.plots import style
from scripts.plots.draw import Drawn, draw_figure
from scripts.plots.figures import FIGURES, Figure
from scripts.plots.notes import add_footer, band_note, joined, status_note
from scripts.plots.output import to_pdf, write
from scripts.plots.runs import Replicates, load_runs
from scripts.plots.table import draw_table, make_table, to_markdown

Runs = dict[str, Replicates]


def recorded(groups: Iterable[Replicates]) -> list[RecordedRun]:
    return [run for group in groups for run in group.runs]


def own_page(figure: Figure, runs: Runs) -> Page:
    drawn = [Drawn(curve, runs[curve.run]) for curve in figure.curves if curve.run in runs]
    page = draw_figure(figure, figure.title, drawn)
    bands = band_note(len(item.group.runs) for item in drawn)
    note = joined(bands, status_note([curve.run for curve in figure.curves], runs))
    add_footer(page, recorded(item.group for item in drawn), [note])
    return page


def published_page(figure: Figure, runs: Runs, published: Runs) -> Page:
    """The figure with the published solver's curves, dashed, beside ours.

    The published solver is a conjugate gradient, so of ours the others are left out.
    """
    compared = [curve for curve in figure.curves if curve.style.startswith("cg")]
    drawn = [
        Drawn(curve, source[curve.run], published=source is published)
        for curve in compared
        for source in (runs, published)
        if curve.run in source
    ]
    page = draw_figure(figure, f"{figure.title}, with the published solver", drawn)
    names = [curve.run for curve in compared]
    bands = band_note(len(item.group.runs) for item in drawn)
    notes = [joined(bands, status_note(names, runs)), status_note(names, published, " (published solver)")]
    add_footer(page, recorded(item.group for item in drawn), notes)
    return page


def table_page(runs: Runs, published: Runs) -> Page:
    page = draw_table(make_table(runs, published))
    add_footer(page, recorded([*runs.values(), *published.values()]), [])
    return page


def make_pages(runs: Runs, published: Runs) -> list[Page]:
    pages = [own_page(figure, runs) for figure in FIGURES]
    if published:
        pages += [published_page(figure, runs, published) for figure in FIGURES]
    return [*pages, table_page(runs, published)]


def plot(options: argparse.Namespace) -> int:
    runs = load_runs(options.results)
    published = load_runs(options.published) if options.published else {}
    style.apply()
    write(options.output, to_pdf(make_pages(runs, published)))
    print_notes(runs)
    if options.table:
        write(options.table, to_markdown(make_table(runs, published)).encode())
    return 0


def print_notes(runs: Runs) -> None:
    """What the figures lack, and what they have no place for."""
    known = [curve.run for figure in FIGURES for curve in figure.curves]
    if note := status_note(known, runs):
        print(f"note: {note}")
    if others := [name for name in runs if name not in known]:
        print(f"note: no figure shows (see scripts/plots/figures.py): {', '.join(others)}")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="plot_paper.py", description=__doc__.splitlines()[0])
    parser.add_argument("results", metavar="RESULTS_DIR", type=user_path, help="one folder a run")
    parser.add_argument("--published", metavar="DIR", type=user_path, help="the same runs with the published solver")
    parser.add_argument("--output", metavar="FILE.pdf", type=user_path, required=True)
    parser.add_argument(
        "--table", metavar="FILE.md", type=user_path, help="write the last page's table as Markdown too"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one line on stderr."""
    return run_command(lambda: plot(make_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
