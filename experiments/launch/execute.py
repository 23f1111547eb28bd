"""One validated config -> one run in its folder, from its start or from its checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from experiments.command import interrupts
from experiments.command.errors import ConfigError, Interrupted, RecordError, counted, reason
from experiments.config import Config, differing_keys, dump_config, lengthens, parse_config
from experiments.data.datasets import Data
from experiments.folder.checkpoint import load_checkpoint, refuse_checkpoint
from experiments.folder.environment import describe_environment
from experiments.folder.events import event_writer
from experiments.folder.read import read_config, refuse_finished
from experiments.folder.write import CONFIG, RunWriter
from experiments.launch.progress import Progress
from experiments.training.compilation import compile_errors
from experiments.training.device import determinism, full_precision, keep_freed_memory, memory_errors, seeded
from experiments.training.diagnostics import LayerRecord
from experiments.training.networks import build
from experiments.training.parallel import ALONE, Processes
from experiments.training.train import EpochRecord, Training, evaluate


def execute(
    config: Config,
    data: Data,
    device: torch.device,
    folder: Path,
    *,
    afresh: bool = False,
    together: Processes = ALONE,
) -> str:
    """Train as `config` says and record it in `folder`, going on from a checkpoint that is there.

    Args:
        data: what `load` gave for `config.data` on `device`.
        afresh: start from the beginning, whatever the folder holds.
        together: the processes that all do this. The first alone reads and writes `folder`.

    Returns:
        One line that says how the run ended.

    Raises:
        DeviceError: out of memory, no deterministic algorithm, nothing to compile with, or processes that differ.
        RecordError: the folder cannot be written or is in use (known before training starts).
        CheckpointError: the checkpoint there is damaged, or of another config or other data.
        Interrupted: by SIGINT or SIGTERM, after the step they came in; the state is saved.
    """
    if device.type == "cpu":
        keep_freed_memory()
    with ExitStack() as stack:
        stack.enter_context(memory_errors(device))
        stack.enter_context(compile_errors(config.compile))
        stack.enter_context(determinism(config.deterministic))
        stack.enter_context(full_precision())
        stack.enter_context(seeded(config.seed, device))
        together.begin(device, config=dump_config(config), data=data.identity)
        writer = stack.enter_context(RunWriter(folder)) if together.is_first else None
        signalled = stack.enter_context(interrupts.deferred())

        run = _Run(config, data, device, together)
        if not afresh:
            run.restore(folder)
        if writer:
            writer.start(config, run.records, run.layer_records)
            write_events = stack.enter_context(event_writer(folder, config, run.records))
        progress = stack.enter_context(Progress(config, len(data.train), run.examples_seen, shown=together.is_first))

        def save() -> None:
            state = run.state_dict()  # to which all contribute
            if writer:
                writer.checkpoint(state)

        def stop_if_asked() -> None:
            if number := together.largest(signalled() or 0):
                save()
                together.meet()  # the end of one may be the end of all
                raise Interrupted(number, f"{config.name}: stopped after {run.position}, its state saved in {folder}; "
                                          f"the same command{' without --overwrite' * afresh} goes on from there"
                )  # fmt: skip

        def on_batch(examples: int) -> None:
            progress.advance(examples)
            stop_if_asked()

        for record in run.train(on_batch):
            if writer:
                writer.append(record, run.training.layer_records)
                write_events(record)
            progress.show(record, run.trained_seconds)
            if not record.diverged:
                stop_if_asked()
            if record.epoch and record.epoch % config.checkpoint_every == 0 and not run.is_complete:
                save()
        summary = run.summary()
        if config.keep_checkpoint and summary["status"] == "finished":
            save()
        if writer:
            writer.finish(summary)
    last, epochs = run.records[-1], counted(summary["epochs"], "epoch")
    epochs += " (time limit)" * ("ended_by" in summary)
    return (
        f"{config.name}: {summary['status']}, {epochs}, train loss {last.train_loss:.4g}, "
        f"test accuracy {summary['test_accuracy']:.2%}, wrote {folder}"
    )


class _Run:
    """A run as far as it has come, in this process and in those before it."""

    def __init__(self, config: Config, data: Data, device: torch.device, together: Processes) -> None:
        self.config, self.data, self._together = config, data, together
        self.training = Training(build(config).to(device), data, config, together)
        self.records: list[EpochRecord] = []
        self.layer_records: list[LayerRecord] = []
        # Now: the source tree may change while the run goes on.
        self._environment = describe_environment(device, together.size)
        self._earlier: list[dict[str, Any]] = []  # other environments, and the epoch to which each came
        self._earlier_seconds, self._start = 0.0, time.perf_counter()

    @property
    def position(self) -> str:
        epoch, batch = self.training.epoch, self.training.batch
        return f"epoch {epoch}" + (f" and {batch} minibatch{'es' * (batch != 1)}" if batch else "")

    @property
    def examples_seen(self) -> int:
        return self.training.epoch * len(self.data.train) + self.training.batch * self.config.batch_size

    @property
    def trained_seconds(self) -> float:
        return sum(record.epoch_seconds for record in self.records)

    @property
    def is_complete(self) -> bool:
        diverged = bool(self.records) and self.records[-1].diverged
        return diverged or self.config.is_complete(self.training.epoch, self.trained_seconds)

    def train(self, on_batch: Callable[[int], object]) -> Iterator[EpochRecord]:
        """The records that are still to come."""
        if self.is_complete:
            return
        for record in self.training.records(on_batch):
            self.records.append(record)
            self.layer_records += self.training.layer_records
            yield record
            if self.is_complete:
                return

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "config": dump_config(self.config),
            "data": self.data.identity,
            "training": self.training.state_dict(),
            "records": [asdict(record) for record in self.records],
            **({"layer_records": [asdict(row) for row in self.layer_records]} if self.layer_records else {}),
            "environment": self._environment,
            "earlier_environments": self._earlier,
            "seconds": self._seconds(),
        }

    def restore(self, folder: Path) -> None:
        """Go on from the checkpoint in `folder`, if there is one.

        Raises:
            CheckpointError: it is damaged, or of another config or other data.
            RecordError: there is none, but a finished run or an unfinished one of another config.
        """
        state = self._together.of_first(self._checkpoint(folder) if self._together.is_first else None)
        if state is None:
            return
        try:
            if keys := self._differing(parse_config(state["config"])):
                raise refuse_checkpoint(folder, f"of another config (different: {', '.join(keys)})")
            if state["data"] != self.data.identity:
                raise refuse_checkpoint(folder, "made with other data than data.root now holds")
            self.training.load_state_dict(state["training"])
            self.records = [EpochRecord(**row) for row in state["records"]]
            self.layer_records = [LayerRecord(**row) for row in state.get("layer_records", [])]
            self._earlier = state["earlier_environments"]
            if state["environment"] != self._environment:
                self._earlier = [*self._earlier, {"until_epoch": self.training.epoch, **state["environment"]}]
            self._earlier_seconds = state["seconds"]
        except (KeyError, TypeError, ValueError, RuntimeError, ConfigError) as error:
            raise refuse_checkpoint(folder, f"of another version of this project ({reason(error, 100)})") from error

    def _differing(self, earlier: Config) -> list[str]:
        """The keys that make the run of `earlier` another one than the beginning of this one."""
        return [] if lengthens(self.config, earlier) else differing_keys(earlier, self.config)

    def _checkpoint(self, folder: Path) -> dict[str, Any] | None:
        refuse_finished(folder, self.config)  # another process may have finished it before this one had the folder
        state = load_checkpoint(folder)
        if state is None and (folder / CONFIG).is_file() and (keys := self._differing(read_config(folder))):
            raise RecordError(f"{folder}: holds an unfinished run of another config (different: "
                              f"{', '.join(keys)}); give --overwrite or another --output")  # fmt: skip
        return state

    def summary(self) -> dict[str, Any]:
        """What `summary.json` holds.

        `ended_by` only where that is the time limit, `earlier_environments` only where the run changed machine or code.
        """
        test_loss, test_accuracy = evaluate(self.training.model, self.data.test, self._together)
        config, last = self.config, self.records[-1]
        return {
            "name": config.name,
            "status": "diverged" if last.diverged else "finished",
            "epochs": last.epoch,
            **({"ended_by": "time_limit"} if not last.diverged and last.epoch < config.epochs else {}),
            "test_loss": test_loss if math.isfinite(test_loss) else None,  # JSON has no NaN
            "test_accuracy": test_accuracy,
            "seed": config.seed,
            "order_seed": config.seed if config.order_seed is None else config.order_seed,
            "data": self.data.identity,
            **self._environment,
            **({"earlier_environments": self._earlier} if self._earlier else {}),
            "seconds": round(self._seconds(), 3),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }

    def _seconds(self) -> float:
        """Spent on this run so far, evaluation included."""
        return self._earlier_seconds + time.perf_counter() - self._start
