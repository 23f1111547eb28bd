"""Peak memory of a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from experiments.command.streams import quiet_stderr


def peak_allocation(run: Callable[[], None], device: torch.device) -> float:
    """Bytes that ``run()`` allocates and holds at its fullest moment, beside what was there before.

    On a GPU the allocator knows; on a CPU the profiler's record of allocations is summed up.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return float(torch.cuda.max_memory_allocated(device) - before)
    with quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    allocations = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(allocations, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return float(peak)
