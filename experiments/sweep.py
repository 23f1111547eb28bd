"""Run many configs: `python -m experiments.sweep FOLDER_OR_FILE ... [key=value ...]`.

Everything is checked before anything runs. Finished runs are skipped, interrupted ones go on where they stopped; a run
that fails is reported and the others go on.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Iterator, Sequence

from experiments.command.cli import RESULTS, Parser, UsageError, run_command, user_path
from experiments.config import DEVICE
from experiments.config.yaml_mapping import apply_overrides
from experiments.data.datasets import load
from experiments.launch import cluster, processes, serial
from experiments.launch.outcome import Outcome, skipped
from experiments.launch.plan import PlannedRun, plan
from experiments.show import print_table
from experiments.training.device import resolve_device


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when all ran, 1 when some failed, 2 for an error before anything ran, 130 or 143 when interrupted."""
    return run_command(lambda: _sweep(_parser().parse_intermixed_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m experiments.sweep", description="Run many configs.")
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="FOLDER_OR_FILE|key=value",
        help="config files, sweep files, folders of them (not their subfolders), and overrides for all",
    )
    parser.add_argument(
        "--output",
        type=user_path,
        default=RESULTS,
        metavar="DIR",
        help="runs go to DIR/<folder of the config, or name of the sweep file>/<name> (default: results)",
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="run each config with the seeds 0 to N-1")
    parser.add_argument("--overwrite", action="store_true", help="start all runs afresh, finished ones, too")
    parser.add_argument(
        "--check", action="store_true", help="only check configs, device, launcher and folders; run nothing"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one for each of --devices)")
    parser.add_argument("--devices", metavar="D,D", help="devices to share out, e.g. cpu or cuda:0,cuda:1")
    parser.add_argument(
        "--launcher",
        choices=["local", "submitit"],
        default="local",
        help="local: this machine (default); submitit: jobs of a SLURM cluster (pip install submitit)",
    )
    parser.add_argument(
        "--submitit",
        action="append",
        default=[],
        metavar="key=value",
        help="a parameter of submitit, e.g. slurm_partition=gpu, timeout_min=120, cluster=local; may be repeated",
    )
    return parser


def _sweep(arguments: argparse.Namespace) -> int:
    _check_launcher(arguments)
    paths = [user_path(text) for text in arguments.arguments if not _is_override(text)]
    overrides = [text for text in arguments.arguments if _is_override(text)]
    elsewhere = arguments.devices is not None or arguments.launcher == "submitit"
    runs = plan(
        paths, overrides, arguments.output, seeds=arguments.seeds, afresh=arguments.overwrite, elsewhere=elsewhere
    )
    if arguments.check:
        return 0
    already = {run.folder: skipped(run) for run in runs}
    waiting = [run for run in runs if already[run.folder] is None]
    failed = set()
    for outcome in itertools.chain(filter(None, already.values()), _launch(waiting, arguments)):
        if outcome.failed:
            failed.add(outcome.run.folder)
            print(f"error: {outcome.run.config.name}: {outcome.text}", file=sys.stderr, flush=True)
        else:
            print(outcome.text, flush=True)
    print()
    print_table([run.folder for run in runs], arguments.output, failed)
    return 1 if failed else 0


def _is_override(text: str) -> bool:
    return "=" in text and not user_path(text).exists()


def _check_launcher(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict each other, and devices that are not there."""
    if arguments.jobs is not None and arguments.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {arguments.jobs}")
    if arguments.launcher == "submitit" and arguments.devices:
        raise UsageError("--devices is for this machine; with --launcher submitit, say --submitit gpus_per_node=1")
    if arguments.launcher == "local" and arguments.submitit:
        raise UsageError("--submitit needs --launcher submitit")
    if arguments.launcher == "submitit":
        cluster.check_parameters(apply_overrides({}, arguments.submitit))
    for device in _devices(arguments):
        if not re.fullmatch(DEVICE, device):
            raise UsageError(f"devices: must be cpu, cuda or cuda:N, joined by commas, got {arguments.devices!r}")
        resolve_device(device)


def _devices(arguments: argparse.Namespace) -> list[str]:
    return arguments.devices.split(",") if arguments.devices is not None else []


def _launch(runs: Sequence[PlannedRun], arguments: argparse.Namespace) -> Iterator[Outcome]:
    if not runs:
        return iter(())
    devices = _devices(arguments)
    if arguments.launcher == "local" and not devices and arguments.jobs in (None, 1):
        return serial.launch(runs)
    for config in {run.config.data for run in runs}:
        load(config, resolve_device("cpu"))  # what is missing is known at the start
    if arguments.launcher == "submitit":
        parameters = apply_overrides({}, arguments.submitit)
        return cluster.launch(runs, arguments.output / "submitit", arguments.jobs, parameters)
    return processes.launch(runs, arguments.jobs or len(devices), devices)


if __name__ == "__main__":
    sys.exit(main())
