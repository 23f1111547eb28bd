"""A run's checkpoint: one file, written whole or not at all, and trusted only when every byte is as it was written."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from experiments.command.errors import CheckpointError, reason
from experiments.folder.atomic import TEMPORARY, write_atomically

CHECKPOINT = "checkpoint.pt"
_FORMAT = 1


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint in `folder` by one of `state` (tensors, numbers, strings, lists and dictionaries).

    Raises:
        OSError: it cannot be written; the former one is still there.
    """

    def write(file: BinaryIO) -> None:
        try:
            torch.save({"format": _FORMAT, **state}, file)
        except RuntimeError as error:
            # torch's writer hides what the file said (no space, say) behind an error of its own.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    write_atomically(folder / CHECKPOINT, write)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The state last saved in `folder`, its tensors on the CPU; None where there is no checkpoint.

    Raises:
        CheckpointError: the file cannot be read, is cut short, has a damaged byte, or is of another format.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        # torch.load does not look at the checksums that torch.save wrote.
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can raise nearly anything
        raise refuse_checkpoint(folder, f"cut short or damaged ({reason(error, 100)})") from None
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise refuse_checkpoint(folder, "not a checkpoint of this version of the project")
    return state


def refuse_checkpoint(folder: Path, problem: str) -> CheckpointError:
    """The error for a checkpoint that does not fit; `problem` follows its path."""
    return CheckpointError(f"{folder / CHECKPOINT}: {problem}; remove it or give --overwrite to start afresh")


def remove_checkpoint(folder: Path) -> None:
    """With what a kill may have left of the next one."""
    for name in (CHECKPOINT, CHECKPOINT + TEMPORARY):
        (folder / name).unlink(missing_ok=True)
