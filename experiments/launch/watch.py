"""Runs in other processes: start them, watch them through what they record, and stop them together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from experiments.command import interrupts
from experiments.command.errors import Interrupted
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
    waiting, jobs = deque(runs), list[Job]()
    with interrupts.deferred() as signalled, Board(runs, started) as board:
        try:
            while waiting or jobs:
                if (number := signalled()) is not None:
                    ended = len(runs) - len(waiting) - len(jobs)
                    raise Interrupted(number, f"{ended} of {len(runs)} runs have ended, {len(jobs)} were stopped with "
                                              "their state saved; the same command goes on from there")  # fmt: skip
                while waiting and len(jobs) < at_once:
                    run = waiting.popleft()
                    # Another process may have done it in the meantime.
                    if (outcome := skipped(run)) is not None:
                        board.ended(run)
                        yield outcome
                    else:
                        board.started(run)
                        jobs.append(start(run))
                for job in list(jobs):
                    if (outcome := job.outcome()) is not None:
                        jobs.remove(job)
                        board.ended(job.run)
                        yield outcome
                board.show([job.run for job in jobs])
                time.sleep(_POLL_SECONDS)
        finally:
            for job in jobs:
                job.stop()
            while any(job.outcome() is None for job in jobs):
                time.sleep(_POLL_SECONDS)
