"""Run many configs: `python -m experiments.sweep FOLDER_OR_FILE ... [key=value ...]`.

Everything is checked before anything runs. Finished runs are skipped; a run that fails is
reported and the others go on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.cli import RESULTS, Parser, run_command, run_folder
from experiments.config import Config, DataConfig, differing_keys, load_config
from experiments.data import Data, load
from experiments.device import memory_errors, resolve_device
from experiments.errors import ConfigError, ExperimentError, RecordError
from experiments.execute import execute
from experiments.record import read_config, read_metrics, read_summary


@dataclass(frozen=True)
class PlannedRun:
    """A config that has passed all checks, and where its run goes."""

    config: Config
    device: torch.device
    folder: Path
    skip: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when all ran, 1 when some failed, 2 for an error before anything ran."""
    return run_command(lambda: _sweep(_parser().parse_intermixed_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m experiments.sweep", description="Run many configs.")
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="FOLDER_OR_FILE|key=value",
        help="config files, folders of them (not their subfolders), and overrides for all",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="runs go to DIR/<folder of the config>/<name> (default: results)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace finished runs")
    parser.add_argument("--check", action="store_true", help="only check configs, device and folders; run nothing")
    return parser


def _sweep(arguments: argparse.Namespace) -> int:
    paths = [Path(text) for text in arguments.arguments if not _is_override(text)]
    overrides = [text for text in arguments.arguments if _is_override(text)]
    runs = plan(config_files(paths), overrides, arguments.output, arguments.overwrite)
    if arguments.check:
        return 0
    data = _load_all(runs)
    failures = {run.folder: _execute_or_skip(run, data) for run in runs}
    _print_table(runs, failures)
    return 1 if any(failures.values()) else 0


def _is_override(text: str) -> bool:
    return "=" in text and not Path(text).exists()


def config_files(paths: Sequence[Path]) -> list[Path]:
    """The files among `paths` and the `*.yaml` in the folders among them, each once."""
    files: dict[Path, Path] = {}
    for path in paths:
        found = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not found:
            raise ConfigError(f"{path}: no *.yaml in this folder")
        files.update({one.resolve(): one for one in found})
    if not files:
        raise ConfigError("no config given: name at least one file or folder before key=value")
    return list(files.values())


def plan(files: Sequence[Path], overrides: Sequence[str], output: Path, overwrite: bool) -> list[PlannedRun]:
    """Validate all configs, devices and what the runs' folders already hold."""
    runs: list[PlannedRun] = []
    owners: dict[Path, Path] = {}
    for path in files:
        try:
            config = load_config(path, overrides)
        except ConfigError as error:
            raise ConfigError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
        folder = run_folder(output, path, config)
        if folder in owners:
            raise ConfigError(f"name: {owners[folder]} and {path} would both write {folder}")
        owners[folder] = path
        skip = not overwrite and _is_done(folder, config)
        runs.append(PlannedRun(config, resolve_device(config.device), folder, skip))
    return runs


def _is_done(folder: Path, config: Config) -> bool:
    """Whether `folder` holds a finished run of just this config; one of another is an error."""
    if read_summary(folder) is None:
        return False
    keys = differing_keys(read_config(folder), config)
    if keys:
        raise RecordError(f"{folder}: holds a run of another config (different: "
                          f"{', '.join(keys)}); give --overwrite or another --output")  # fmt: skip
    return True


def _load_all(runs: Sequence[PlannedRun]) -> dict[tuple[DataConfig, torch.device], Data]:
    """Each data set once, before the first run: what is missing is known at the start."""
    loaded: dict[tuple[DataConfig, torch.device], Data] = {}
    for run in runs:
        key = (run.config.data, run.device)
        if not run.skip and key not in loaded:
            with memory_errors(run.device):
                loaded[key] = load(*key)
    return loaded


def _execute_or_skip(run: PlannedRun, data: dict[tuple[DataConfig, torch.device], Data]) -> ExperimentError | None:
    """The known error the run failed with, if any."""
    if run.skip:
        print(f"{run.config.name}: skipped, already in {run.folder}", flush=True)
        return None
    try:
        line = execute(run.config, data[run.config.data, run.device], run.device, run.folder)
    except ExperimentError as error:
        print(f"error: {run.config.name}: {error}", file=sys.stderr, flush=True)
        return error
    print(line, flush=True)
    return None


def _print_table(runs: Sequence[PlannedRun], failures: dict[Path, ExperimentError | None]) -> None:
    width = max(len(str(run.folder)) for run in runs)
    print(f"\n{'run':{width}}  {'status':9} {'epochs':>6}  {'train loss':>10}  test accuracy")
    for run in runs:
        summary = None if failures[run.folder] else read_summary(run.folder)
        if summary is None:
            print(f"{run.folder!s:{width}}  failed")
            continue
        train_loss = read_metrics(run.folder)["train_loss"].iloc[-1]
        print(
            f"{run.folder!s:{width}}  {summary['status']:9} {summary['epochs']:6}  "
            f"{train_loss:10.4g}  {summary['test_accuracy']:13.2%}" + ("  (skipped)" if run.skip else "")
        )


if __name__ == "__main__":
    sys.exit(main())
