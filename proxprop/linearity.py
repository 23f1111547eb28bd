"""Is a module's output linear in its parameters? Tried on random parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def is_linear(forward: Callable[[Sequence[Tensor]], object], like: Sequence[Tensor]) -> bool:
    """Whether ``forward(u + v) == forward(u) + forward(v)`` for random parameters ``u``, ``v`` shaped as ``like``.

    A necessary condition that a nonlinear function meets with probability zero. The global random state is left
    alone. An output that is no tensor is not linear.
    """
    generator = torch.Generator().manual_seed(0)

    def random() -> list[Tensor]:
        return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in like]

    u, v = random(), random()
    with torch.no_grad():
        first, second, both = forward(u), forward(v), forward([a + b for a, b in zip(u, v, strict=True)])
    if not (isinstance(first, Tensor) and isinstance(second, Tensor) and isinstance(both, Tensor)):
        return False
    if both.numel() == 0:
        return True
    size = (first.abs() + second.abs()).amax()
    # "Not larger" in place of "smaller": an input with NaN says nothing about the module.
    return not bool((both - first - second).abs().amax() > 1e-3 * size)
