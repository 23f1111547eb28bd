"""A run's folder as it is written; how it is read back is in `read`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, astuple, fields
from pathlib import Path
from typing import Any

from experiments.command.errors import RecordError, reason
from experiments.config import Config, dump_config
from experiments.folder.atomic import write_atomically
from experiments.folder.checkpoint import remove_checkpoint, save_checkpoint
from experiments.folder.lock import locked
from experiments.training.diagnostics import LayerRecord
from experiments.training.train import EpochRecord

CONFIG, METRICS, DIAGNOSTICS, SUMMARY = "config.yaml", "metrics.csv", "diagnostics.csv", "summary.json"
COLUMNS = [field.name for field in fields(EpochRecord)]
LAYER_COLUMNS = [field.name for field in fields(LayerRecord)]
FIRST_LAYER_COLUMNS = [field.name for field in fields(LayerRecord) if field.default is MISSING]  # of older files


class RunWriter:
    """A run's folder, held by this process alone, as it takes records, checkpoints and the summary.

    Raises:
        RecordError: here or later, when the folder cannot be written, or is in use by another process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._keeps_checkpoint = False
        self._rows: list[list[Any]] = []
        self._layer_rows: list[list[Any]] = []

    def __enter__(self) -> RunWriter:
        with writing(self.folder), ExitStack() as stack:
            self.folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(self.folder))
            self._held = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.__exit__(*error)

    def start(
        self, config: Config, records: Sequence[EpochRecord] = (), layer_records: Sequence[LayerRecord] = ()
    ) -> None:
        """Begin with `records`, which a checkpoint brought, in place of whatever the folder held.

        Without any, that is a fresh start, and a checkpoint is removed, too.
        """
        self._keeps_checkpoint = config.keep_checkpoint
        self._rows = [COLUMNS, *map(_row, records)]
        self._layer_rows = [LAYER_COLUMNS, *map(_row, layer_records)]
        with writing(self.folder):
            # First: where it cannot be written, all else is kept. And a summary is never beside another run's config.
            self._write(CONFIG, dump_config(config), before=self._remove_summary)
            if not layer_records:
                (self.folder / DIAGNOSTICS).unlink(missing_ok=True)
            if not records:
                remove_checkpoint(self.folder)
            self._write_rows()

    def append(self, record: EpochRecord, layer_records: Sequence[LayerRecord] = ()) -> None:
        self._rows.append(_row(record))
        self._layer_rows += map(_row, layer_records)
        with writing(self.folder):
            self._write_rows()

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint; see `save_checkpoint`."""
        with writing(self.folder):
            save_checkpoint(self.folder, state)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, with which the run is over, and remove the checkpoint unless it is to be kept."""
        with writing(self.folder):
            self._write(SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")
            if not self._keeps_checkpoint:
                remove_checkpoint(self.folder)

    def _write_rows(self) -> None:
        # The whole file each time: a row is never half there, and a thousand epochs are 100 kB.
        self._write(METRICS, _csv(self._rows))
        if len(self._layer_rows) > 1:
            self._write(DIAGNOSTICS, _csv(self._layer_rows))

    def _remove_summary(self) -> None:
        (self.folder / SUMMARY).unlink(missing_ok=True)

    def _write(self, name: str, text: str, before: Callable[[], None] | None = None) -> None:
        write_atomically(self.folder / name, lambda file: file.write(text.encode()), before)


def _row(record: EpochRecord | LayerRecord) -> list[Any]:
    return [f"{value:.8g}" if isinstance(value, float) else value for value in astuple(record)]


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses into a `RecordError`."""
    try:
        yield
    except OSError as error:
        raise RecordError(f"{folder}: cannot write the run here: {reason(error)}; "
                          "choose another --output") from error  # fmt: skip
