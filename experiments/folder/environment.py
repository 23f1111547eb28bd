"""The facts about code and machine that a run's summary carries."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from experiments.training.device import device_name

_ROOT = Path(__file__).resolve().parents[2]
_CODE = ("proxprop", "experiments")


def describe_environment(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Versions, device, commit and the number of processes, under their names in `summary.json`."""
    return {
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # not a plain string
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def import_path() -> str:
    """PYTHONPATH for interpreters that are to find this code, wherever they start."""
    return os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


@functools.cache  # as it was for the first run: later changes to the tree are not in this process
def git_commit() -> str | None:
    """The commit of this source tree, `-dirty` when its code was changed; None outside git."""
    if not (_ROOT / ".git").exists():
        return None
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", *_CODE)
    if commit is None:
        return None
    return f"{commit}-dirty" if changes else commit


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, errors="replace", timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
