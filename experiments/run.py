"""Run one config: `python -m experiments.run CONFIG.yaml [key=value ...] [--output DIR]`.

`torchrun --nproc_per_node N -m experiments.run ...` trains it in N processes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from experiments.command.cli import RESULTS, Parser, UsageError, run_command, user_path
from experiments.command.errors import counted
from experiments.config.sweep_file import load_config_file
from experiments.data.datasets import load
from experiments.folder.events import check_tensorboard
from experiments.folder.read import refuse_finished
from experiments.launch.execute import execute
from experiments.launch.plan import run_device, run_folder
from experiments.optimizers import check_optimizer
from experiments.training.device import memory_errors
from experiments.training.parallel import Processes, check_parallel, processes


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 for a finished or diverged run, 2 for an error, 130 or 143 when interrupted."""
    return run_command(lambda: _main(argv), together=True)


def _main(argv: Sequence[str] | None) -> int:
    with processes() as together:
        return _run(_parser().parse_intermixed_args(argv), together)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m experiments.run", description="Run one config.")
    parser.add_argument("config", type=user_path, metavar="CONFIG.yaml")
    # With a default, argparse does not call them required.
    overrides = "e.g. optimizer.lr=0.1 epochs=3"
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=overrides)
    parser.add_argument(
        "--output",
        type=user_path,
        metavar="DIR",
        help="the run's own folder (default: results/<folder of the config>/<name>)",
    )
    parser.add_argument("--overwrite", action="store_true", help="start afresh, replacing what the folder holds")
    return parser


def _run(arguments: argparse.Namespace, together: Processes) -> int:
    if "=" in str(arguments.config) and not arguments.config.exists():
        raise UsageError(f"expected a config file before {arguments.config} (see --help)")
    file = load_config_file(arguments.config, arguments.overrides)
    if file.is_sweep:
        runs = counted(len(file.configs), "run")
        raise UsageError(f"{arguments.config} stands for {runs}: use python -m experiments.sweep")
    (config,) = file.configs
    check_parallel(config, together)
    folder = arguments.output or run_folder(RESULTS, file, config)
    if not arguments.overwrite:
        refuse_finished(folder, config)
    check_tensorboard(config)
    check_optimizer(config.optimizer)
    device = run_device(config, together.local_rank)
    with memory_errors(device):
        data = load(config.data, device)
    print(execute(config, data, device, folder, afresh=arguments.overwrite, together=together))
    return 0


if __name__ == "__main__":
    sys.exit(main())
