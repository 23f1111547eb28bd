"""Which runs a command line asks for, checked before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.command.errors import ConfigError, RecordError
from experiments.config import Config, differing_keys, lengthens
from experiments.config.sweep_file import ConfigFile, load_config_file
from experiments.folder.events import check_tensorboard
from experiments.folder.read import read_config, read_metrics, read_summary, refuse_finished
from experiments.folder.write import CONFIG
from experiments.optimizers import check_optimizer
from experiments.training.compilation import check_compile
from experiments.training.device import resolve_device


@dataclass(frozen=True)
class PlannedRun:
    """A config that has passed all checks, and where its run goes.

    `device` is None where another process chooses it; `afresh`: whatever the folder holds, it is replaced.
    """

    config: Config
    device: torch.device | None
    folder: Path
    afresh: bool = False

    def is_done(self) -> bool:
        """Whether the folder holds a finished run of just this config; not what is left of one (`refuse_finished`).

        Raises:
            RecordError: it holds one of another config, finished or not, which this one does not make longer, or one
                made on another kind of device than the config asks for.
        """
        if self.afresh or not (self.folder / CONFIG).is_file():
            return False
        summary = read_summary(self.folder)
        earlier = read_config(self.folder)
        longer = lengthens(self.config, earlier)
        if not longer and (keys := differing_keys(earlier, self.config)):
            raise RecordError(f"{self.folder}: holds a run of another config (different: "
                              f"{', '.join(keys)}); give --overwrite or another --output")  # fmt: skip
        if longer:
            refuse_finished(self.folder, self.config)
        if longer or summary is None:
            return False
        if self.device and self.config.device != "auto" and summary["device"] != self.device.type:
            raise RecordError(f"{self.folder}: holds a run made on {summary['device']}, not on {self.device.type}; "
                              "give --overwrite or another --output")  # fmt: skip
        try:
            read_metrics(self.folder)
        except RecordError:
            return False
        return True


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


def run_folder(output: Path, file: ConfigFile, config: Config) -> Path:
    """`output/<folder of the config file, or name of the sweep file>/<name of the run>`."""
    path = file.path.resolve()
    return output / (path.stem if file.is_sweep else path.parent.name) / config.name


def run_device(config: Config, local_rank: int | None = None) -> torch.device:
    """Where a run of `config` goes in this process; see `resolve_device`.

    Raises:
        DeviceError: the device is not there, or lacks what the config asks of it.
    """
    device = resolve_device(config.device, local_rank)
    check_compile(config.compile, device)
    return device


def plan(
    paths: Sequence[Path],
    overrides: Sequence[str],
    output: Path,
    *,
    seeds: int | None = None,
    afresh: bool = False,
    elsewhere: bool = False,
) -> list[PlannedRun]:
    """The runs of config files, sweep files and folders of both.

    Args:
        elsewhere: the configs' devices are not those of this process, and are not looked for here.

    Raises:
        ConfigError, DeviceError, RecordError: a config, its device, or what its folder already holds.
    """
    runs: dict[Path, PlannedRun] = {}
    owners: dict[Path, Path] = {}
    for path in config_files(paths):
        try:
            file = load_config_file(path, overrides, seeds)
        except ConfigError as error:
            raise ConfigError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
        for config in file.configs:
            folder = run_folder(output, file, config)
            if folder in runs:
                raise ConfigError(f"name: {owners[folder]} and {path} would both write {folder}")
            check_tensorboard(config)
            check_optimizer(config.optimizer)
            runs[folder] = PlannedRun(config, None if elsewhere else run_device(config), folder, afresh)
            runs[folder].is_done()
            owners[folder] = path
    return list(runs.values())
