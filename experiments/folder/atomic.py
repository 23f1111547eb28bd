"""Writing a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = ".tmp"


def write_atomically(path: Path, write: Callable[[BinaryIO], Any], before: Callable[[], Any] | None = None) -> None:
    """Let `write` fill a file beside `path`, put it on the disk, then rename it.

    ``before`` is called between the two, when nothing can fail any more for want of space.

    Whenever the process or the machine dies, `path` holds all of the old content or all of the new one. There must be
    one writer at a time.

    Raises:
        OSError: no space, no such folder, no permission; `path` is as it was before.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if before is not None:
            before()
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
