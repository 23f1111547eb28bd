"""Is a module linear in its parameters, and its gradient that of a linear module? Tried on random parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from proxprop.design import NoProximalStep

TOLERANCE = 1e-3


def check_linear(forward: Callable[[Sequence[Tensor]], object], like: Sequence[Tensor]) -> bool:
    """Check ``forward(u + v) == forward(u) + forward(v)`` for random parameters ``u``, ``v`` shaped as ``like``.

    A necessary condition, which nonlinear functions do not meet by chance. So is the one on the gradient: with B the
    product with Aᵀ as autograd computes it, ``⟨A B y, z⟩ == ⟨B y, B z⟩`` for random ``y``, ``z`` (a module may leave
    some parameters out of its gradient, but not scale it). The global random state is left alone.

    Returns:
        Whether there was evidence: outputs that are not empty, zero or not finite.

    Raises:
        NoProximalStep: where a condition is not met, with what is wrong as its text.
    """
    # Whatever torch.set_default_device and torch.set_default_dtype say.
    generator = torch.Generator("cpu").manual_seed(0)

    def random(shapes: Sequence[Tensor]) -> list[Tensor]:
        return [torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu").to(t) for t in shapes]

    u, v = random(like), random(like)
    arguments = (u, v, [a + b for a, b in zip(u, v, strict=True)])
    versions = [t._version for values in arguments for t in values]
    with torch.no_grad():
        first, second, both = map(forward, arguments)
    if versions != [t._version for values in arguments for t in values]:
        raise NoProximalStep("the forward pass changes its parameters")
    if not (isinstance(first, Tensor) and isinstance(second, Tensor) and isinstance(both, Tensor)):
        raise NoProximalStep("the output must be one tensor, linear in all parameters together")
    size = float((first.abs() + second.abs()).amax()) if both.numel() else 0.0
    if not 0 < size < math.inf:
        return False
    if not float((both - first - second).abs().amax()) <= TOLERANCE * size:
        raise NoProximalStep("the output must be one tensor, linear in all parameters together")
    _check_gradient(forward, u, *random([first, first]))
    return True


def _check_gradient(
    forward: Callable[[Sequence[Tensor]], object], parameters: Sequence[Tensor], y: Tensor, z: Tensor
) -> None:
    with torch.enable_grad():
        leaves = [p.detach().requires_grad_() for p in parameters]
        output = forward(leaves)
        assert isinstance(output, Tensor)
        if not output.requires_grad:
            return
        by, bz = (torch.autograd.grad(output, leaves, g, retain_graph=True, materialize_grads=True) for g in (y, z))
    if any(g.layout is not torch.strided for g in (*by, *bz)):
        raise NoProximalStep("the gradient is sparse")
    with torch.no_grad():
        image = forward(by)
        assert isinstance(image, Tensor)
        size = math.sqrt(_dot(by, by) * _dot(bz, bz))
        if not abs(_dot([image], [z]) - _dot(by, bz)) <= TOLERANCE * size:
            raise NoProximalStep("the gradient is not that of the output")


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return sum(float((a * b).sum(dtype=torch.float64)) for a, b in zip(left, right, strict=True))
