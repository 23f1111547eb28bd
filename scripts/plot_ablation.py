"""Draws what each deviation of the published solver does: the loss, and the directions beside the stated ones.

python scripts/plot_ablation.py results/cpu-5-epochs/ablation_mlp results/cpu-5-epochs/ablation_convnet \\
    --output ablation.pdf

For runs of configs/sweeps/ablation_mlp.yaml and ablation_convnet.yaml.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from experiments.command.cli import Parser, run_command, user_path
from experiments.folder.read import read_runs
from scripts.plots import style
from scripts.plots.ablation import draw_ablation, read_parts
from scripts.plots.output import add_output, check_format, figure_bytes, write


def plot(options: argparse.Namespace) -> int:
    check_format(options.output)
    style.apply()
    page = draw_ablation(read_parts(read_runs(*options.runs)))
    write(options.output, figure_bytes(page, options.output.suffix))
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="plot_ablation.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", metavar="RUNS_DIR", type=user_path, nargs="+", help="a folder with the runs in it")
    add_output(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after one line on stderr."""
    return run_command(lambda: plot(make_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
