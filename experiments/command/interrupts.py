"""SIGINT (Ctrl-C), SIGTERM, SIGHUP (a terminal that closed): an exception, or an answer where it is safe to stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from experiments.command.errors import Interrupted

_HANGUP = {signal.SIGHUP} if hasattr(signal, "SIGHUP") else set()  # not on Windows
_SIGNALS = {signal.SIGINT, signal.SIGTERM} | _HANGUP
_ONE_SIGNAL_SECONDS = 1.0


@contextmanager
def raised() -> Iterator[None]:
    """Within, a signal raises `Interrupted` wherever the program is."""

    def handle(number: int, _: FrameType | None) -> None:
        raise Interrupted(number)

    with _handling(handle):
        yield


@contextmanager
def deferred() -> Iterator[Callable[[], int | None]]:
    """Within, a signal only becomes the answer of the function that this yields (else None).

    One that nobody asked for raises `Interrupted` at the end. A second signal does not wait: it acts as it would
    outside. What comes within a second of the first is no second one: a shell and `timeout` may both pass on the same.
    """
    pending: list[int] = []
    since = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if not pending:
            pending.append(number)
            since = time.monotonic()
            return
        if time.monotonic() - since < _ONE_SIGNAL_SECONDS:
            return
        previous = outside[signal.Signals(number)]
        if callable(previous):
            previous(number, frame)
        raise Interrupted(number)

    with _handling(handle) as outside:
        yield lambda: pending[0] if pending else None
    if pending:
        raise Interrupted(pending[0], "what was under way is finished, and nothing else was begun")


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], Any]) -> Iterator[dict[signal.Signals, Any]]:
    """Install `handler` in place of the handlers that this yields; Python allows that in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    ignored = {number for number in _HANGUP if signal.getsignal(number) is signal.SIG_IGN}  # by nohup
    outside = {number: signal.signal(number, handler) for number in _SIGNALS - ignored}
    try:
        yield outside
    finally:
        for number, previous in outside.items():
            signal.signal(number, previous)
