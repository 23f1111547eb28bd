"""Runs as jobs of a cluster, through submitit (https://github.com/facebookincubator/submitit)."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.command.errors import ConfigError, ExperimentError, Interrupted, reason
from experiments.data.datasets import load
from experiments.folder.environment import import_path
from experiments.launch.execute import execute
from experiments.launch.outcome import Outcome
from experiments.launch.plan import PlannedRun, run_device
from experiments.launch.watch import watch
from experiments.training.device import memory_errors


def check_parameters(parameters: dict[str, Any]) -> None:
    """
    Raises:
        ConfigError: jobs cannot be started with them, see `launch`.
    """
    with tempfile.TemporaryDirectory() as folder:  # submitit makes the folder of its logs
        _executor(Path(folder), parameters)


def _executor(logs: Path, parameters: dict[str, Any]) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("--launcher submitit needs a package that is not installed: pip install submitit") from error
    options = dict(parameters)
    cluster = options.pop("cluster", "slurm")
    if cluster == "slurm" and shutil.which("srun") is None:
        raise ConfigError("--launcher submitit: no SLURM here (no srun on PATH); with --submitit cluster=local the "
                          "jobs run on this machine")  # fmt: skip
    try:
        executor = submitit.AutoExecutor(folder=logs / "%j", cluster=cluster)
        executor.update_parameters(**options)
    except (NameError, ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"--submitit: {reason(error)}") from error
    return executor


def launch(runs: Sequence[PlannedRun], logs: Path, jobs: int | None, parameters: dict[str, Any]) -> Iterator[Outcome]:
    """Each run as a job, up to `jobs` at a time (None: all at once).

    A job that gets submitit's warning signal, before a time limit or when preempted, is queued again and goes on from
    its checkpoint.

    Args:
        logs: a folder on a file system that the jobs share.
        parameters: submitit's, e.g. timeout_min, gpus_per_node, slurm_partition; `cluster` is 'slurm', the default, or
            'local'.

    Raises:
        ConfigError: submitit is not installed, does not know a parameter, or finds no cluster.
        Interrupted: by SIGINT or SIGTERM, once the jobs are cancelled.
    """
    executor = _executor(logs, parameters)
    # The jobs' interpreters inherit it; they may start in another folder.
    os.environ["PYTHONPATH"] = import_path()

    def start(run: PlannedRun) -> _Job:
        try:
            return _Job(run, executor.submit(_Task(run, Path.cwd())))
        except Exception as error:  # whatever the cluster answers: the other runs may still be taken
            return _Job(run, None, f"cannot be submitted: {reason(error)}")

    yield from watch(runs, start, jobs or len(runs), "submitted")


@dataclass(frozen=True)
class _Task:
    """What a job does."""

    run: PlannedRun
    directory: Path

    def __call__(self) -> tuple[bool, str]:
        """Whether it failed, and the line about it."""
        os.chdir(self.directory)
        config = self.run.config
        try:
            device = run_device(config)  # the job's machine may have other devices
            with memory_errors(device):
                data = load(config.data, device)
            return False, execute(config, data, device, self.run.folder, afresh=self.run.afresh)
        except (ExperimentError, Interrupted) as error:
            return True, str(error)

    def checkpoint(self) -> Any:
        """What submitit queues again: the same, from the run's checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(replace(self, run=replace(self.run, afresh=False)))


class _Job:
    def __init__(self, run: PlannedRun, job: Any, refusal: str | None = None) -> None:
        self.run, self._job, self._refusal = run, job, refusal

    def outcome(self) -> Outcome | None:
        if self._refusal is not None:
            return Outcome(self.run, True, self._refusal)
        if not self._job.done():
            return None
        try:
            failed, text = self._job.result()
        except Exception as error:  # whatever the job raised, or that it died without a result
            failed, text = True, f"job {self._job.job_id}: {_cause(error)}{self._log()}"
        return Outcome(self.run, failed, text)

    def _log(self) -> str:
        """Where to read more, if there is more."""
        logs = (Path(path) for path in (self._job.paths.stderr, self._job.paths.stdout))
        written = [path for path in logs if path.is_file() and path.stat().st_size]
        return f" (its log: {written[0]})" if written else ""

    def stop(self) -> None:
        if self._job is not None:
            self._job.cancel(check=False)


def _cause(error: Exception) -> str:
    """Why there is no result; of a job's traceback, which submitit has between dashed lines, the last line."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    if isinstance(error, FailedJobError):
        _, *trace, _ = re.split(r"\n-{5,}\n", str(error))
        return trace[-1].strip().rpartition("\n")[2][:300]
    return "ended without a result (killed?)" if isinstance(error, UncompletedJobError) else reason(error)
