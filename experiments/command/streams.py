"""stdout and stderr as a command may find them: closed, full, read no more, of another alphabet. Its work goes on."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO


class Lenient:
    """A text stream that raises nothing: once something cannot be written, all that follows is dropped.

    `lost` says why; it stays None where the reader of a pipe has ended, as that of `| head` does: it had enough.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        try:
            self._attempt(self._stream.write, text)
        except UnicodeEncodeError:  # a folder's name, say, under PYTHONIOENCODING=ascii
            encoding = self._stream.encoding
            self._attempt(self._stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[..., Any], *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            if error.errno != errno.EPIPE:
                self.lost = error
            # What the stream holds back would be tried again at exit; it goes where all else now goes.
            with suppress(OSError), Path(os.devnull).open("wb") as nothing:
                os.dup2(nothing.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lenient() -> Iterator[Lenient]:
    """Within, stdout and stderr are `Lenient`; this yields stdout."""
    # No file of ours may get the number of a stream that is closed, where others then write to it.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    outside = sys.stdout, sys.stderr
    with ExitStack() as stack:
        nothing = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        output, errors = (Lenient(stream or nothing) for stream in outside)  # None where it is closed
        sys.stdout, sys.stderr = output, errors
        try:
            yield output
        finally:
            output.flush()
            errors.flush()
            sys.stdout, sys.stderr = outside


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Within, what libraries write straight to file descriptor 2 is dropped."""
    try:
        saved = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
