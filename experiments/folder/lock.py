"""One process at a time in a run's folder.

The lock is the operating system's, so it ends with its process, however that ends: what a crash leaves behind is no
lock. A note beside it says who holds it, for the others' messages.

Where a file system has no locks (some network mounts), the existence of the file stands for one; of a process that was
killed on another machine it is left there.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from experiments.command.errors import RecordError
from experiments.folder.atomic import write_atomically

LOCK, OWNER = ".lock", ".owner.json"

# Longer than `holder` holds the lock to see whether it is free.
_PATIENCE_SECONDS = 1.0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which must exist.

    Raises:
        RecordError: another process has it; the text names that process.
        OSError: the folder cannot be written.
    """
    lock = FileLock(folder / LOCK, timeout=_PATIENCE_SECONDS)
    try:
        _acquire(lock)
    except Timeout:
        left = f", or remove {LOCK} there if it has ended" if isinstance(lock, SoftFileLock) else ""
        raise RecordError(f"{folder}: in use by {_read_owner(folder)}; "
                          f"wait until it ends, or choose another --output{left}") from None  # fmt: skip
    try:
        owner = {
            "process": os.getpid(),
            "host": platform.node(),
            "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        write_atomically(folder / OWNER, lambda file: file.write(json.dumps(owner).encode()))
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / OWNER).unlink()
        lock.release()


def holder(folder: Path) -> str | None:
    """Who holds the lock of `folder`, None where nobody does."""
    if not (folder / LOCK).exists():
        return None
    try:
        lock = FileLock(folder / LOCK, blocking=False)
        _acquire(lock)
        lock.release()
        return None
    except Timeout:
        return _read_owner(folder)
    except OSError:  # somebody else's folder, which we may only read
        return _read_owner(folder) if (folder / OWNER).exists() else None


def _acquire(lock: BaseFileLock) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it becomes a `SoftFileLock`, where there are no locks
        lock.acquire()


def _read_owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        return f"process {owner['process']} on {owner['host']} (since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # it has only just started
