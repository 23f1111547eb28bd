"""Run one config: `python -m experiments.run CONFIG.yaml [key=value ...] [--output DIR]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from experiments.command.cli import RESULTS, Parser, UsageError, run_command, user_path
from experiments.config.sweep_file import load_config_file
from experiments.data.datasets import load
from experiments.folder.events import check_tensorboard
from experiments.folder.read import refuse_finished
from experiments.launch.execute import execute
from experiments.launch.plan import run_device, run_folder
from experiments.training.device import memory_errors


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 for a finished or diverged run, 2 for an error, 130 or 143 when interrupted."""
    return run_command(lambda: _run(_parser().parse_intermixed_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m experiments.run", description="Run one config.")
    parser.add_argument("config", type=user_path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optimizer.lr=0.1 epochs=3")
    parser.add_argument(
        "--output",
        type=user_path,
        metavar="DIR",
        help="the run's own folder (default: results/<folder of the config>/<name>)",
    )
    parser.add_argument("--overwrite", action="store_true", help="start afresh, replacing what the folder holds")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    if "=" in str(arguments.config) and not arguments.config.exists():
        raise UsageError(f"expected a config file before {arguments.config} (see --help)")
    file = load_config_file(arguments.config, arguments.overrides)
    if file.is_sweep:
        raise UsageError(f"{arguments.config} stands for {len(file.configs)} runs: use python -m experiments.sweep")
    (config,) = file.configs
    folder = arguments.output or run_folder(RESULTS, file, config)
    if not arguments.overwrite:
        refuse_finished(folder, config)
    check_tensorboard(config)
    device = run_device(config)
    with memory_errors(device):
        data = load(config.data, device)
    print(execute(config, data, device, folder, afresh=arguments.overwrite))
    return 0


if __name__ == "__main__":
    sys.exit(main())
