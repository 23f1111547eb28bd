"""One run after the other, in this process: each data set is loaded once."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence

import torch

from experiments.command.errors import ExperimentError
from experiments.config import DataConfig
from experiments.data.datasets import Data, load
from experiments.launch.execute import execute
from experiments.launch.outcome import Outcome, skipped
from experiments.launch.plan import PlannedRun
from experiments.training.device import memory_errors

Loaded = dict[tuple[DataConfig, torch.device], Data]


def launch(runs: Sequence[PlannedRun]) -> Iterator[Outcome]:
    """
    Raises:
        DataError: before the first run, if data are missing or damaged.
        Interrupted: by SIGINT or SIGTERM; the current run's state is saved.
    """
    data = _load_all(runs)
    for run in runs:
        yield _outcome(run, data[run.config.data, run.device])


def _load_all(runs: Sequence[PlannedRun]) -> Loaded:
    loaded: Loaded = {}
    for run in runs:
        assert run.device is not None
        key = (run.config.data, run.device)
        if key not in loaded:
            with memory_errors(run.device):
                loaded[key] = load(*key)
    return loaded


def _outcome(run: PlannedRun, data: Data) -> Outcome:
    try:
        # Another process may have done it in the meantime.
        if (outcome := skipped(run)) is not None:
            return outcome
        return Outcome(run, False, execute(run.config, data, run.device, run.folder, afresh=run.afresh))
    except ExperimentError as error:
        return Outcome(run, True, str(error))
    except Exception:  # a fault of one run is not the others'; told as by a process of its own
        return Outcome(run, True, traceback.format_exc().strip())
