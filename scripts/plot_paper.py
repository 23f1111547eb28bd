"""Draws the paper's figures from the runs in results folders, as one vector PDF.

python scripts/plot_paper.py results/paper results/paper_text --published results/paper_published --output paper.pdf
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from experiments.command.cli import Parser, UsageError, file_path, run_command, user_path
from experiments.command.errors import RecordError
from experiments.folder.read import RecordedRun, read_runs
from scripts.plots import style, table1
from scripts.plots.draw import Drawn, draw_figure, time_note
from scripts.plots.figures import FIGURES, Figure
from scripts.plots.notes import Footer, band_note, joined, seconds_note, status_note
from scripts.plots.output import Page, to_pdf, write
from scripts.plots.runs import Replicates, load_runs, with_seconds_of
from scripts.plots.table import draw_table, make_table, to_markdown

Runs = dict[str, Replicates]


def recorded(groups: Iterable[Replicates]) -> list[RecordedRun]:
    return [run for group in groups for run in group.runs]


def _about_seconds(figure: Figure, drawn: Sequence[Drawn], quiet: Sequence[RecordedRun]) -> str:
    return joined(time_note(figure, drawn), seconds_note(quiet, [item.group for item in drawn]))


def own_page(figure: Figure, runs: Runs, quiet: Sequence[RecordedRun]) -> Page:
    drawn = [Drawn(curve, runs[curve.run]) for curve in figure.curves if curve.run in runs]
    bands = band_note(len(item.group.runs) for item in drawn)
    names = [curve.run for curve in figure.curves]
    notes = [
        joined(bands, status_note(names, runs)),
        _about_seconds(figure, drawn, quiet),
    ]
    return draw_figure(figure, figure.title, drawn, Footer.of(recorded(item.group for item in drawn), notes))


def published_page(figure: Figure, runs: Runs, published: Runs, quiet: Sequence[RecordedRun]) -> Page:
    """The figure with the published solver's curves, dashed, beside BackProp and ours.

    The published solver is a conjugate gradient, so of ours exact is left out.
    """
    compared = [curve for curve in figure.curves if curve.style.startswith("cg") or not curve.is_proxprop]
    drawn = [
        Drawn(curve, source[curve.run], published=source is published)
        for curve in compared
        for source in (runs, published)
        if curve.run in source
    ]
    names = [curve.run for curve in compared]
    solved = [curve.run for curve in compared if curve.is_proxprop]
    bands = band_note(len(item.group.runs) for item in drawn)
    notes = [
        joined(bands, status_note(names, runs), status_note(solved, published, " (published solver)")),
        _about_seconds(figure, drawn, quiet),
    ]
    title = f"{figure.title}, with the published solver"
    return draw_figure(figure, title, drawn, Footer.of(recorded(item.group for item in drawn), notes))


def shown_figures(runs: Runs) -> list[Figure]:
    """The figures of which there is a run."""
    return [figure for figure in FIGURES if any(curve.run in runs for curve in figure.curves)]


def make_pages(runs: Runs, published: Runs, table_1: Sequence[RecordedRun], quiet: Sequence[RecordedRun]) -> list[Page]:
    figures = shown_figures(runs)
    pages = [own_page(figure, runs, quiet) for figure in figures]
    pages += [published_page(figure, runs, published, quiet) for figure in shown_figures(published)]
    groups = [*runs.values(), *published.values()]
    footer = Footer.of(recorded(groups), [seconds_note(quiet, groups)])
    pages.append(draw_table(make_table(figures, runs, published), footer))
    if table_1:
        rows, found = table1.read_table(table_1)
        pages += [table1.draw_table1(rows, found), table1.draw_numbers(rows, found)]
    return pages


def plot(options: argparse.Namespace) -> int:
    if options.output.suffix != ".pdf":
        raise UsageError(f"--output must end in .pdf, got {options.output}")
    runs = load_runs(*options.results)
    published = load_runs(*options.published)
    for roots, found in ((options.results, runs), (options.published, published)):
        if roots and not shown_figures(found):
            raise RecordError(f"{' '.join(map(str, roots))}: no run of the paper's figures, which are known by their "
                              "folders' names (scripts/plots/figures.py); for sweeps, see plot_sweep.py")  # fmt: skip
    table_1 = read_runs(*options.table1)
    quiet = read_runs(*options.seconds_from)
    if quiet:
        runs, published = with_seconds_of(runs, quiet), with_seconds_of(published, quiet)
    style.apply()
    write(options.output, to_pdf(make_pages(runs, published, table_1, quiet)))
    print_notes(runs)
    if options.table:
        text = to_markdown(make_table(shown_figures(runs), runs, published))
        if table_1:
            rows, found = table1.read_table(table_1)
            text += f"\n**{table1.title(found)}**\n\n{table1.to_markdown(rows)}"
        write(options.table, text.encode())
    return 0


def print_notes(runs: Runs) -> None:
    """What the figures lack, and what they have no place for."""
    known = [curve.run for figure in shown_figures(runs) for curve in figure.curves]
    if note := status_note(known, runs):
        print(f"note: {note}")
    if others := [name for name in runs if name not in known]:
        print(f"note: no figure shows (see scripts/plots/figures.py): {', '.join(others)}")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="plot_paper.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "results", metavar="RESULTS_DIR", type=user_path, nargs="+", help="one folder a run in it or below"
    )
    parser.add_argument(
        "--published",
        metavar="DIR",
        type=user_path,
        nargs="+",
        default=[],
        help="the same runs with the published solver",
    )
    parser.add_argument(
        "--table1", metavar="DIR", nargs="+", type=user_path, default=[], help="the runs of configs/sweeps/table1.yaml"
    )
    parser.add_argument(
        "--seconds-from",
        metavar="DIR",
        type=user_path,
        nargs="+",
        default=[],
        help="take the seconds an epoch from these runs, made on a quiet machine, in place of each run's own",
    )
    parser.add_argument("--output", metavar="FILE.pdf", type=file_path, required=True)
    parser.add_argument("--table", metavar="FILE.md", type=file_path, help="write the tables as Markdown too")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one line on stderr."""
    return run_command(lambda: plot(make_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
