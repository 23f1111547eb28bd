"""Runs side by side on this machine, each a process of its own on one of the devices."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from experiments.config import dump_config
from experiments.folder.environment import import_path
from experiments.launch.outcome import Outcome
from experiments.launch.plan import PlannedRun
from experiments.launch.watch import watch


def launch(runs: Sequence[PlannedRun], jobs: int, devices: Sequence[str] = ()) -> Iterator[Outcome]:
    """Up to `jobs` runs at a time.

    Args:
        devices: where they go in turn, in place of the configs' own device; several jobs may share one. The threads of
            the CPU are shared out among the jobs, unless OMP_NUM_THREADS is set.

    Raises:
        Interrupted: by SIGINT or SIGTERM, once all runs have saved their states.
    """
    environment = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs)), **os.environ}
    environment |= {"PYTHONPATH": import_path(), "PYTHONIOENCODING": "utf-8"}  # as the outputs are read back
    with tempfile.TemporaryDirectory() as scratch:
        free = [devices[index % len(devices)] for index in range(jobs)] if devices else [None] * jobs

        def start(run: PlannedRun) -> _Process:
            return _Process(run, free, environment, Path(scratch))

        yield from watch(runs, start, jobs)


class _Process:
    """One run; takes one of the `free` devices and gives it back at its end."""

    def __init__(self, run: PlannedRun, free: list[str | None], environment: dict[str, str], scratch: Path) -> None:
        self.run = run
        self._free, self._device = free, free.pop(0)
        config = Path(tempfile.mkdtemp(dir=scratch)) / "config.yaml"
        config.write_text(dump_config(run.config))
        command = [sys.executable, "-m", "experiments.run", str(config), "--output", str(run.folder)]
        command += ["--overwrite"] if run.afresh else []
        command += [f"device={self._device}"] if self._device else []
        self._output, self._errors = config.with_name("output"), config.with_name("errors")
        with self._output.open("w") as output, self._errors.open("w") as errors:
            # In a session of its own: Ctrl-C in a terminal reaches the sweep alone, which then stops its runs.
            self._process = subprocess.Popen(
                command, stdout=output, stderr=errors, env=environment, start_new_session=True
            )
        self._outcome: Outcome | None = None

    def outcome(self) -> Outcome | None:
        if self._outcome is None and (code := self._process.poll()) is not None:
            self._free.append(self._device)
            said = (self._errors if code else self._output).read_text(encoding="utf-8", errors="replace").strip()
            # Of the output the last line; those before are of a run under way.
            text = said.removeprefix("error: ") if code else said.rpartition("\n")[2]
            self._outcome = Outcome(self.run, code != 0, text or f"ended by {_cause(code)}")
        return self._outcome

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)


def _cause(code: int) -> str:
    """An exit code in words: '-9' is SIGKILL, which a machine out of memory sends."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
