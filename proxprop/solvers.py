"""Conjugate gradients on (AᵀA + βI) D = AᵀG, as the paper states them and as its published code runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from proxprop.design import Parameters
from proxprop.systems import ALL, System, Vector, blocks, dot


@dataclasses.dataclass(frozen=True)
class CGRules:
    """What may differ between conjugate gradient solvers; the defaults are the textbook.

    Args:
        orthogonal: Make each residual orthogonal to all before it, as it would be without rounding. Without this the
            spectrum of real images (a largest eigenvalue a hundred times the next) costs all digits of the direction
            in float32 after five iterations, and in float64 after ten.
        conjugate: Make the second search direction conjugate to the first.
        damping: An absolute number added to both denominators.
        stop_below: Stop when the largest column's residual norm falls below this times the root mean square of the
            initial ones.
        one_step_length: Let all columns share one step length.
    """

    orthogonal: bool = True
    conjugate: bool = True
    damping: float = 0.0
    stop_below: float = 0.0
    one_step_length: bool = False


def conjugate_gradients(system: System, iterations: int, rules: CGRules) -> Parameters:
    """Run ``iterations`` conjugate gradient steps from D = 0 on all columns at once.

    Textbook rules are invariant to the scale of every column; a column that has converged to rounding, or is zero,
    stays as it is. Nothing in the loop waits for the device.

    Args:
        system: The system, in any form.
        iterations: Number of steps, at least 1.
        rules: The textbook's, or deviations from it.

    Returns:
        D, shaped like the layer's parameters.
    """
    solution = torch.empty_like(system.residual, memory_format=torch.contiguous_format)
    parts: Iterable[slice] = [ALL]
    if system.separable and not rules.one_step_length:
        # Former residuals with their duals, and what an iteration has at hand.
        parts = blocks(solution, 2 * (iterations - 1) + 6)
    columns = (_Columns(system, solution, outputs, rules) for outputs in parts)
    # Each to its end, as long as it is in the cache; what stops all of them has to be asked after each step.
    for together in [list(columns)] if rules.stop_below else ([one] for one in columns):
        stopped = None
        for step in range(1, iterations + 1):
            for one in together:
                one.step(stopped, is_last=step == iterations)
            if rules.stop_below:
                largest, initial = (torch.cat(norms, 1) for norms in zip(*(c.norms() for c in together), strict=True))
                stopped = largest.amax() < rules.stop_below**2 * initial.mean()
    return system.parameters(solution)


class _Columns:
    """Some columns of a system on their way; their solution is written into ``solution``."""

    def __init__(self, system: System, solution: Tensor, outputs: slice, rules: CGRules) -> None:
        residual = system.residual[:, outputs].contiguous()  # a column after the other
        self._axes = (0, 1, 2) if rules.one_step_length else (2,)
        self._scale = residual.abs().amax(self._axes, keepdim=True).clamp(min=torch.finfo(residual.dtype).tiny)
        self._damping = rules.damping / self._scale / self._scale  # in two steps: the square could underflow
        self._system, self._rules, self._outputs = system, rules, outputs
        self._p = self._r = system.vector(residual / self._scale, outputs)
        self._negligible: Tensor | float = 0.0
        self._initial = self._norm = self._squared_norm()
        self._negligible = torch.finfo(self._norm.dtype).eps ** 2 * self._initial
        self._former: list[tuple[Vector, Tensor]] = []
        self._solution = solution[:, outputs].zero_()
        self._steps, self._previous = 0, self._norm

    def step(self, stopped: Tensor | None, is_last: bool) -> None:
        """One iteration; of no effect where it is ``stopped``. The ``is_last`` leaves no residual."""
        system, rules = self._system, self._rules
        if self._steps:
            self._turn(stopped)
        self._steps += 1
        image = system.image(self._p)
        alpha = _divide(self._norm, self._total(system.curvature(self._p, image)) + self._damping)
        self._solution.addcmul_(alpha, self._p.value)
        if is_last:
            self._solution.mul_(self._scale)
            return
        value = torch.addcmul(self._r.value, alpha, system.product(self._p, image), value=-1)
        if rules.orthogonal:
            self._former.append((self._r, self._norm))
            for other, squared in self._former:
                value.addcmul_(_divide(dot(value, other.dual), squared), other.value, value=-1)
        self._r = system.vector(value, self._outputs)
        self._previous, self._norm = self._norm, self._squared_norm()

    def _squared_norm(self) -> Tensor:
        """Of the residual; 0 where it is rounding, which makes every further step length zero."""
        norm = self._total(dot(self._r.value, self._r.dual))
        is_rounding = norm <= self._negligible
        if (noise := self._system.noise(self._r)) is not None:
            is_rounding |= norm <= self._total(noise)
        return norm.masked_fill(is_rounding, 0)  # NaN compares false and so stays NaN

    def norms(self) -> tuple[Tensor, Tensor]:
        """Squared norms of the residuals, now and at first."""
        return self._norm * self._scale * self._scale, self._initial * self._scale * self._scale

    def _turn(self, stopped: Tensor | None) -> None:
        """Take the next search direction."""
        if stopped is not None:
            self._norm = self._norm.masked_fill(stopped, 0)
        ratio = _divide(self._norm, self._previous + self._damping)
        self._p = self._r.plus(ratio, self._p if self._rules.conjugate or self._steps > 1 else self._r)

    def _total(self, columns: Tensor) -> Tensor:
        return columns.sum(self._axes, keepdim=True) if self._rules.one_step_length else columns


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator; where the denominator is zero, so is the numerator, and zero is returned."""
    return numerator / denominator.masked_fill(denominator == 0, 1)
