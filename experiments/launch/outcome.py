"""How one run of many ended."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.command.errors import RecordError
from experiments.folder.checkpoint import remove_checkpoint
from experiments.folder.read import read_config
from experiments.launch.plan import PlannedRun


@dataclass(frozen=True)
class Outcome:
    """`text` is the line about the run; of one that failed, the error."""

    run: PlannedRun
    failed: bool
    text: str


def skipped(run: PlannedRun) -> Outcome | None:
    """The outcome of a run that is done already, by whichever process, None of one that is not."""
    try:
        if not run.is_done():
            return None
        if not read_config(run.folder).keep_checkpoint:
            remove_checkpoint(run.folder)  # which a kill after the last step may have left
    except (RecordError, OSError) as error:
        return Outcome(run, True, str(error))
    return Outcome(run, False, f"{run.config.name}: skipped, already in {run.folder}")
