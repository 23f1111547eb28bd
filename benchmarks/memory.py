"""Peak memory of a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(run: Callable[[], None], device: torch.device) -> float:
    """Bytes of tensors at the fullest moment of ``run()``, with what was there before (parameters, gradients).

    On a GPU the allocator knows; on a CPU the profiler's record of allocations is summed up.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return float(torch.cuda.max_memory_allocated(device))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    allocations = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(allocations, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return float(peak)
