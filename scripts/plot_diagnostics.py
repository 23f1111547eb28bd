"""Draws what the layers of recorded runs did over the epochs: cosines of D to the gradient, and D's length.

python scripts/plot_diagnostics.py results/cpu-diagnostics/descent_mlp --output diagnostics.pdf

For runs made with diagnostics_every.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from experiments.command.cli import Parser, run_command, user_path
from experiments.command.errors import RecordError
from experiments.folder.read import find_runs, read_diagnostics, read_run
from experiments.folder.write import DIAGNOSTICS
from scripts.plots import style
from scripts.plots.diagnostics import Observed, draw_diagnostics
from scripts.plots.output import add_output, check_format, figure_bytes, write
from scripts.plots.sweep import sort_key


def plot(options: argparse.Namespace) -> int:
    check_format(options.output)
    found = {folder for root in options.runs for folder in find_runs(root)}
    folders = sorted(found, key=lambda folder: sort_key(str(folder)))
    with_rows = [folder for folder in folders if (folder / DIAGNOSTICS).is_file()]
    if not with_rows:
        raise RecordError(f"{options.runs[0]}: no run has a {DIAGNOSTICS}; runs record it with diagnostics_every=1")
    style.apply()
    page = draw_diagnostics([Observed(read_run(folder), read_diagnostics(folder)) for folder in with_rows])
    write(options.output, figure_bytes(page, options.output.suffix))
    if without := [folder.name for folder in folders if folder not in with_rows]:
        print(f"note: without {DIAGNOSTICS}: {', '.join(without)}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="plot_diagnostics.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", metavar="RUN_DIR", type=user_path, nargs="+", help="a run's folder, or one with runs below"
    )
    add_output(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one line on stderr."""
    return run_command(lambda: plot(make_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
