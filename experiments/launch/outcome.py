"""How one run of many ended."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.command.errors import RecordError
from experiments.folder.checkpoint import remove_checkpoint
from experiments.folder.read import read_config, read_summary
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
        earlier, summary = read_config(run.folder), read_summary(run.folder)
        if not earlier.keep_checkpoint:
            remove_checkpoint(run.folder)  # which a kill after the last step may have left
    except (RecordError, OSError) as error:
        return Outcome(run, True, str(error))
    text = f"{run.config.name}: skipped, already in {run.folder}"
    if summary and "ended_by" in summary and run.config.time_limit != earlier.time_limit:
        text += f", ended by its own time limit after epoch {summary['epochs']} (--overwrite runs it again)"
    return Outcome(run, False, text)
