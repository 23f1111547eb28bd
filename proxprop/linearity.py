"""Is a module's output linear in its parameters? Tried on random parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def linearity(forward: Callable[[Sequence[Tensor]], object], like: Sequence[Tensor]) -> bool | None:
    """Whether ``forward(u + v) == forward(u) + forward(v)`` for random parameters ``u``, ``v`` shaped as ``like``.

    A necessary condition, which nonlinear functions do not meet by chance. The global random state is left alone. An
    output that is no tensor is not linear. None where there is no evidence: outputs are empty, zero or not finite.
    """
    generator = torch.Generator().manual_seed(0)

    def random() -> list[Tensor]:
        return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in like]

    u, v = random(), random()
    with torch.no_grad():
        first, second, both = forward(u), forward(v), forward([a + b for a, b in zip(u, v, strict=True)])
    if not (isinstance(first, Tensor) and isinstance(second, Tensor) and isinstance(both, Tensor)):
        return False
    size = float((first.abs() + second.abs()).amax()) if both.numel() else 0.0
    if not 0 < size < math.inf:
        return None
    return float((both - first - second).abs().amax()) <= 1e-3 * size
