"""Prints how many seconds of training a baseline's curve must have to be as long as ProxProp's in its figure.

python scripts/longest_curve.py RESULTS_DIR BASELINE

RESULTS_DIR has a folder for each run; BASELINE is a run's name, such as mlp_sgd_gradient.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from experiments.command.cli import Parser, UsageError, run_command, user_path
from scripts.plots.figures import FIGURES
from scripts.plots.runs import load_runs

NO_RUN = 1e-9
"""Where no run of the figure is there, the least that a time limit can be."""


def longest_curve(results: Path, baseline: str) -> float:
    """The longest of the baseline's figure, of the runs with the config's own seed alone.

    So it is the same whether more seeds are there or not.
    """
    baselines = {curve.run: figure for figure in FIGURES for curve in figure.curves if not curve.is_proxprop}
    if baseline not in baselines:
        raise UsageError(f"BASELINE must be one of {', '.join(baselines)}, got {baseline!r}")
    names = {curve.run for curve in baselines[baseline].curves if curve.is_proxprop}
    runs = [run for group in load_runs(results).values() for run in group.runs if run.folder.name in names]
    return max((run.seconds for run in runs if run.summary), default=NO_RUN) or NO_RUN


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one line on stderr."""
    return run_command(lambda: _print(make_parser().parse_args(arguments)))


def _print(options: argparse.Namespace) -> int:
    print(f"{longest_curve(options.results, options.baseline):.6g}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="longest_curve.py", description=__doc__.splitlines()[0])
    parser.add_argument("results", metavar="RESULTS_DIR", type=user_path)
    parser.add_argument("baseline", metavar="BASELINE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
