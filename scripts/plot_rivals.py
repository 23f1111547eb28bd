"""Draws ProxProp beside other optimizers on one network: the loss over epochs and over time, the accuracy, one page.

python scripts/plot_rivals.py results/COMPARED --costs costs.json --output rivals.pdf

For runs with one learning rate for each optimizer, as the sweep file COMPARED.yaml may have them: docs/experiments.md.
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
from scripts.plots.rivals import Costs, by_network, draw_rivals, without_costs
from scripts.plots.runs import left_out_note, load_runs


def plot(options: argparse.Namespace) -> int:
    check_format(options.output)
    groups = [group for root in options.runs for group in load_runs(root).values()]
    left_out = left_out_note(read_runs(*options.runs))
    costs = Costs.read(options.costs) if options.costs else Costs()
    networks = by_network(groups, costs)
    if len(networks) > 1:
        raise UsageError(f"a figure is for one network, and these runs are of {' and '.join(networks)}: give one "
                         "network's folder at a time")  # fmt: skip
    (methods,) = networks.values()
    without = without_costs(methods, options.costs) if options.costs else ""
    style.apply()
    write(options.output, figure_bytes(draw_rivals(methods, costs, left_out), options.output.suffix))
    for note in filter(None, (left_out, without)):
        print(f"note: {note}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="plot_rivals.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", metavar="RUNS_DIR", type=user_path, nargs="+", help="a folder with the runs in it")
    parser.add_argument(
        "--costs",
        metavar="FILE.json",
        type=user_path,
        help="take seconds from this file of benchmarks/optimizer_cost.py in place of each run's own",
    )
    add_output(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one line on stderr."""
    return run_command(lambda: plot(make_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
