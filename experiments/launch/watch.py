"""Runs in other processes: start them, watch them through what they record, and stop them together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from experiments.command import interrupts
from experiments.command.errors import Interrupted
from experiments.folder.checkpoint import CHECKPOINT
from experiments.launch.board import Board
from experiments.launch.outcome import Outcome, skipped
from experiments.launch.plan import PlannedRun

_POLL_SECONDS = 0.2


class Job(Protocol):
    """A run under way in another process."""

    run: PlannedRun

    def outcome(self) -> Outcome | None:
        """How it ended, None while it goes on."""

    def stop(self) -> None:
        """Ask it to save its state and end."""


def watch(
    runs: Sequence[PlannedRun], start: Callable[[PlannedRun], Job], at_once: int, started: str = "started"
) -> Iterator[Outcome]:
    """Start `runs` in their order, `at_once` at a time, and yield outcomes as they come.

    Args:
        started: the word for it, for people.

    Raises:
        Interrupted: by SIGINT or SIGTERM, once all jobs have ended.
    """
    waiting, jobs, number = deque(runs), list[Job](), None
    with interrupts.deferred() as signalled, Board(runs, started) as board:
        try:
            while (waiting or jobs) and (number := signalled()) is None:
                while waiting and len(jobs) < at_once:
                    run = waiting.popleft()
                    # Another process may have done it in the meantime.
                    if (outcome := skipped(run)) is not None:
                        board.ended(outcome)
                        yield outcome
                    else:
                        board.started(run)
                        jobs.append(start(run))
                for job in list(jobs):
                    if (outcome := job.outcome()) is not None:
                        jobs.remove(job)
                        board.ended(outcome)
                        yield outcome
                board.show([job.run for job in jobs])
                time.sleep(_POLL_SECONDS)
        finally:
            for job in jobs:
                job.stop()
            while any(job.outcome() is None for job in jobs):
                time.sleep(_POLL_SECONDS)
        if number is not None:
            stopped = [job.run for job in jobs if (outcome := job.outcome()) is None or outcome.failed]
            raise Interrupted(number, _how_far(len(runs), len(runs) - len(waiting) - len(stopped), stopped))


def _how_far(runs: int, ended: int, stopped: Sequence[PlannedRun]) -> str:
    """'1 of 4 runs has ended, 2 were stopped with their state saved, …'; some are stopped before they have a state."""
    saved = sum((run.folder / CHECKPOINT).exists() for run in stopped)
    text = f"{ended} of {runs} runs {'has' if ended == 1 else 'have'} ended"
    if saved:
        text += f", {saved} {'was stopped with its' if saved == 1 else 'were stopped with their'} state saved"
    if begun := len(stopped) - saved:
        text += f", {begun} {'was' if begun == 1 else 'were'} stopped before there was a state to save"
    return f"{text}; the same command goes on from there"
