"""What torchrun tells the processes that it starts; without it, and for one process alone, there is nothing to know."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Which of several processes this one is.

    Attributes:
        rank: its number among all of them, from 0 on.
        local_rank: its number on this machine.
        size: how many there are.
    """

    rank: int
    local_rank: int
    size: int


def place() -> Place | None:
    """This process's place among several that torchrun has started; None where it trains alone."""
    # The other variables are set by programs that know nothing of torchrun, too.
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    rank, local_rank, size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    return Place(rank, local_rank, size) if size > 1 else None
