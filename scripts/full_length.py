"""Runs the paper's experiments at full length on a machine without a GPU, or says what is left of them.

python scripts/full_length.py [--left] [--jobs N] [--output DIR] [key=value ...]

About two days of computing on two CPU cores, what matters most first. Stopped at any time (Ctrl-C, SIGTERM), the same
command goes on where it was; what is finished is not run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

import pandas as pd

from experiments.command.cli import RESULTS, Parser, UsageError, run_command, user_path
from experiments.data.datasets import load
from experiments.folder.read import read_run
from experiments.folder.write import METRICS
from experiments.launch import processes
from experiments.launch.plan import PlannedRun, plan
from experiments.training.device import resolve_device

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def exactly(epochs: int) -> tuple[str, ...]:
    """Settings with which a run ends after so many epochs, and is a cut of the same run at full length."""
    return ("time_limit=1e-9", f"min_epochs={epochs}")


@dataclass(frozen=True)
class Unit:
    """Config files (below configs/, without .yaml) and settings for them; of a sweep, the ``modes`` alone."""

    title: str
    configs: Sequence[str]
    settings: Sequence[str] = ()
    modes: Sequence[str] = ()
    seeds: int | None = None
    folder: str = "cpu-50-epochs"

    def runs(self, overrides: Sequence[str], output: Path) -> list[PlannedRun]:
        paths = [CONFIGS / f"{name}.yaml" for name in self.configs]
        runs = plan(paths, [*self.settings, *overrides], output / self.folder, seeds=self.seeds, elsewhere=True)
        return [run for run in runs if not self.modes or run.config.proxprop.optimization_mode in self.modes]


FIGURE_3 = (
    "paper/convnet_adam_cg3",
    "paper/convnet_adam_cg10",
    "paper_published/convnet_adam_cg3",
    "paper_published/convnet_adam_cg10",
)
FIGURE_3_TEXT = (
    "paper_text/convnet_text_adam_cg3",
    "paper_text/convnet_text_adam_cg10",
    "paper_text_published/convnet_text_adam_cg3",
    "paper_text_published/convnet_text_adam_cg10",
)
# About as long as ProxProp's longest curve, of 2.3 times the seconds of 50 epochs of BackProp (the MLP's cg10) and 1.8
# times (the ConvNet): results/cpu-50-epochs/table.md.
BASELINE = exactly(110)
UNITS = (
    Unit("Figure 2", [f"paper/mlp_sgd_{mode}" for mode in ("exact", "cg10", "cg5", "cg3")]),
    Unit("Figure 2, BackProp", ["paper/mlp_sgd_gradient"], BASELINE),
    Unit("Figure 2, published solver", [f"paper_published/mlp_sgd_{mode}" for mode in ("cg10", "cg5", "cg3")]),
    Unit("Figure 3", FIGURE_3),
    Unit("Figure 3, BackProp", ["paper/convnet_adam_gradient"], BASELINE),
    Unit("Figure 3, the text's ConvNet", FIGURE_3_TEXT),
    Unit("Figure 3, the text's ConvNet, BackProp", ["paper_text/convnet_text_adam_gradient"], BASELINE),
    # Rows gradient and published_cg3 are there from a GPU: results/h100-50-epochs/table1.
    Unit("Table 1, prox_cg3", ["sweeps/table1"], modes=["prox_cg3"]),
    Unit(
        "Table 1, other rows, 15 epochs",
        ["sweeps/table1"],
        exactly(15),
        modes=["published_cg1", "prox_cg1", "published_cg5", "prox_cg5"],
    ),
    Unit(
        "tau_prox, 10 epochs of 10,000 images",
        ["sweeps/tau_prox"],
        ("epochs=10", "data.train_samples=10000"),
        folder="cpu-10-epochs",
    ),
    Unit("The published solver taken apart", ["sweeps/ablation_convnet", "sweeps/ablation_mlp"], folder="cpu-5-epochs"),
    Unit("Figure 3, seeds 0 to 2", [*FIGURE_3, *FIGURE_3_TEXT], seeds=3),
    Unit(
        "Figure 3, BackProp, seeds 0 to 2",
        ["paper/convnet_adam_gradient", "paper_text/convnet_text_adam_gradient"],
        BASELINE,
        seeds=3,
    ),
    Unit("Figure 2, seeds 0 to 2", ["paper/mlp_sgd_exact", "paper/mlp_sgd_cg3"], seeds=3),
    Unit("Figure 2, BackProp, seeds 0 to 2", ["paper/mlp_sgd_gradient"], BASELINE, seeds=3),
)


def full_length(options: argparse.Namespace) -> int:
    if options.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {options.jobs}")
    units = {unit.title: unit.runs(options.settings, options.output) for unit in UNITS}
    if options.left:
        print(table(units))
        return 0
    waiting = list({run.folder: run for runs in units.values() for run in runs if not run.is_done()}.values())
    for data in {run.config.data for run in waiting}:
        load(data, resolve_device("cpu"))  # what is missing is known at the start
    failed = False
    for outcome in processes.launch(waiting, options.jobs):
        failed |= outcome.failed
        print(("error: " if outcome.failed else "") + outcome.text, flush=True)
    return int(failed)


def table(units: dict[str, list[PlannedRun]]) -> str:
    """A row for each unit: how many of its runs are over, and how many epochs are left at the most."""
    rows = []
    for title, runs in units.items():
        waiting = [run for run in runs if not run.is_done()]
        finished = f"{len(runs) - len(waiting)} of {len(runs)}"
        rows.append((title.ljust(max(map(len, units))), finished, sum(map(_epochs_left, waiting))))
    return pd.DataFrame(rows, columns=["unit", "finished", "epochs left"]).to_string(index=False, justify="left")


def _epochs_left(run: PlannedRun) -> int:
    config = run.config
    most = config.epochs if config.time_limit is None else min(config.epochs, config.min_epochs)
    return most - (read_run(run.folder).epochs if (run.folder / METRICS).is_file() else 0)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="full_length.py", description=__doc__.splitlines()[0])
    parser.add_argument("settings", metavar="key=value", nargs="*", help="for all runs, e.g. data.root=/data")
    parser.add_argument("--left", action="store_true", help="say what is left, and run nothing")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time, sharing the CPU's threads")
    parser.add_argument("--output", type=user_path, metavar="DIR", default=RESULTS, help="default: results")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when all ran, 1 when some failed, 2 after one line on stderr, 130 or 143 when interrupted."""
    return run_command(lambda: full_length(make_parser().parse_intermixed_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
