"""Draws one number of each run of a sweep over one of the keys that it varied.

python scripts/plot_sweep.py results/tau_prox --x proxprop.tau_prox --hue proxprop.optimization_mode \\
    --y train_loss --output tau_prox.pdf

Beside the figure it writes the same numbers as a table, tau_prox.csv and tau_prox.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from experiments.command.cli import Parser, UsageError, run_command, user_path
from experiments.folder.read import read_runs
from scripts.plots import style
from scripts.plots.output import add_output, check_format, figure_bytes, write
from scripts.plots.sweep import NUMBERS, Question, answer
from scripts.plots.sweep_draw import draw_sweep
from scripts.plots.sweep_table import to_csv, to_markdown


def plot(options: argparse.Namespace) -> int:
    check_format(options.output)
    where = dict(_condition(text) for text in options.where)
    question = Question(options.x, options.hue, options.y, where)
    runs = read_runs(options.results)
    found = answer(question, runs)
    style.apply()
    page = draw_sweep(found, options.xscale, options.yscale, options.title)
    write(options.output, figure_bytes(page, options.output.suffix))
    write(options.output.with_suffix(".csv"), to_csv(found).encode())
    write(options.output.with_suffix(".md"), to_markdown(found).encode())
    if found.note:
        print(f"note: {found.note}")
    return 0


def _condition(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--where has the form key=value, got {text!r}")
    return key, value


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="plot_sweep.py", description=__doc__.splitlines()[0])
    parser.add_argument("results", metavar="RESULTS", type=user_path, help="a folder with the runs in it or below")
    parser.add_argument("--x", metavar="KEY", required=True, help="a key of the config, e.g. proxprop.tau_prox")
    parser.add_argument("--hue", metavar="KEY", help="a key with one curve for each of its values")
    numbers = f"of: {', '.join(NUMBERS)} (default: train_loss)"
    parser.add_argument("--y", metavar="NUMBER", default="train_loss", help=numbers)
    add_output(parser)
    where = "of the runs, take these alone; may be repeated"
    parser.add_argument("--where", metavar="KEY=VALUE", action="append", default=[], help=where)
    for axis, which in {"x": "a wide range", "y": "a wide range of what is no accuracy"}.items():
        parser.add_argument(f"--{axis}scale", choices=["log", "linear"], help=f"default: log for {which}")
    parser.add_argument("--title", help="default: what is drawn")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one line on stderr."""
    return run_command(lambda: plot(make_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
