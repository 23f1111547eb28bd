"""Conjugate gradients on (AᵀA + βI) D = AᵀG, as the paper states them and as its published code runs them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from proxprop.design import Parameters
from proxprop.systems import ALL, System, Vector, blocks, dot, eps


@dataclasses.dataclass(frozen=True)
class CGRules:
    """What may differ between conjugate gradient solvers; the defaults are the textbook.

    Args:
        orthogonal: Make each residual orthogonal to all before it, as it would be without rounding. Without this the
            spectrum of real images (a largest eigenvalue thirty times the next) costs all digits of the direction
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


@dataclasses.dataclass
class Rounding:
    """Estimates of what rounding in a system's products with AᵀA made of a direction, by the textbook's rules."""

    length: float = 0.0
    error: float = 0.0
    """Both in the norm of D."""

    def add(self, lengths: Tensor, errors: Tensor) -> None:
        """Those of some columns."""
        self.length = math.hypot(self.length, float(lengths.norm()))
        self.error = math.hypot(self.error, float(errors.norm()))

    @property
    def is_tolerable(self) -> bool:
        return self.error < TOLERABLE * self.length < math.inf  # False for NaN, and for no length at all


TOLERABLE = 1e-2
"""Which relative error a direction may have by such an estimate, which is mostly several times too large."""


def conjugate_gradients(
    system: System, iterations: int, rules: CGRules, rounding: Rounding | None = None
) -> Parameters:
    """Run ``iterations`` conjugate gradient steps from D = 0 on all columns at once.

    Textbook rules are invariant to the scale of every column; a column that has converged to rounding, or is zero,
    stays as it is. Nothing in the loop waits for the device, but for ``rounding``.

    Args:
        system: The system, in any form.
        iterations: Number of steps, at least 1.
        rules: The textbook's, or deviations from it.
        rounding: Is told what happened to the direction; for the textbook's rules.

    Returns:
        D, shaped like the layer's parameters.
    """
    solution = torch.empty_like(system.residual, memory_format=torch.contiguous_format)
    parts: Iterable[slice] = [ALL]
    if system.separable and not rules.one_step_length:
        # Former residuals with their duals, and what an iteration has at hand.
        parts = blocks(solution, 2 * (iterations - 1) + 6)
    columns = (_Columns(system, solution, outputs, rules, rounding is not None) for outputs in parts)
    # Each to its end, as long as it is in the cache; what stops all of them has to be asked after each step.
    for together in [list(columns)] if rules.stop_below else ([one] for one in columns):
        stopped = None
        for step in range(1, iterations + 1):
            for one in together:
                one.step(stopped, is_last=step == iterations)
            if rules.stop_below:
                largest, initial = (torch.cat(norms, 1) for norms in zip(*(c.norms() for c in together), strict=True))
                stopped = largest.amax() < rules.stop_below**2 * initial.mean()
        if rounding is not None:
            for one in together:
                rounding.add(*one.rounding())
    return system.parameters(solution)


class _Columns:
    """Some columns of a system on their way; their solution is written into ``solution``."""

    def __init__(self, system: System, solution: Tensor, outputs: slice, rules: CGRules, watched: bool) -> None:
        residual = system.residual[:, outputs].contiguous()  # a column after the other
        self._axes = (0, 1, 2) if rules.one_step_length else (2,)
        self._scale = residual.abs().amax(self._axes, keepdim=True).clamp(min=torch.finfo(residual.dtype).tiny)
        self._damping = rules.damping / self._scale / self._scale  # in two steps: the square could underflow
        self._system, self._rules, self._outputs = system, rules, outputs
        self._p = self._r = system.vector(residual / self._scale, outputs)
        self._negligible: Tensor | float = 0.0
        self._seen: list[tuple[Tensor, ...]] | None = [] if watched else None
        self._initial = self._norm = self._squared_norm()
        self._negligible = eps(self._norm) ** 2 * self._initial
        self._former: list[tuple[Vector, Tensor]] = []
        self._solution = solution[:, outputs].zero_()
        self._steps, self._previous = 0, self._norm
        self._lost: Tensor | float = 0.0

    def step(self, stopped: Tensor | None, is_last: bool) -> None:
        """One iteration; of no effect where it is ``stopped``. The ``is_last`` leaves no residual."""
        system, rules = self._system, self._rules
        if self._steps:
            self._turn(stopped)
        self._steps += 1
        image = system.image(self._p)
        alpha = _divide(self._norm, self._total(system.curvature(self._p, image)) + self._damping)
        if self._seen is not None:
            self._seen.append((self._norm, alpha, torch.zeros_like(alpha) if self._noise is None else self._noise))
        self._solution.addcmul_(alpha, self._p.value)
        if is_last:
            if self._seen is not None:
                self._lost = system.lost(self._solution)
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
        self._noise = self._system.noise(self._r)
        if self._noise is not None:
            is_rounding |= norm <= self._total(self._noise)
        return norm.masked_fill(is_rounding, 0)  # NaN compares false and so stays NaN

    def rounding(self) -> tuple[Tensor, Tensor]:
        """The lengths of the directions, and of what rounding may have made of them, ``[g, o, 1]``.

        A product with AᵀA has an error of about its largest eigenvalue, by which residuals get wrong entries that no
        iteration takes away again, and a step along p makes them longer by the inverse of p's Rayleigh quotient. (‖p‖²
        follows from the norms of the residuals, to which former directions are orthogonal.) Noise in ‖r‖² does the
        same; where it is all of it, D's part in r is hidden, of a length of at most ‖r‖/β.
        """
        assert self._seen is not None
        norm, alpha, noise = (torch.stack(numbers) for numbers in zip(*self._seen, strict=True))
        is_zero = norm == 0
        squared = norm * (norm * norm.reciprocal().cumsum(0))  # ‖p‖²
        length = (alpha * squared.sqrt()).masked_fill(is_zero, 0)
        quotient = norm / (alpha * squared)
        largest = quotient[0] if self._system.largest is None else self._system.largest
        error = length.abs().cumsum(0) * (largest / quotient).abs() * eps(self._r.value) + length * (noise / norm)
        error = torch.where(is_zero, noise.sqrt() / self._system.beta, error.masked_fill(alpha == 0, torch.inf))
        total = error.norm(dim=0) + self._lost
        if self._system.design.clustered:
            total = total + self._brought_back(norm, alpha, length, quotient)
        return length.norm(dim=0) * self._scale, total * self._scale

    def _brought_back(self, norm: Tensor, alpha: Tensor, length: Tensor, quotient: Tensor) -> Tensor:
        """What rounding makes of a direction where the largest eigenvalue is that of several eigenvectors.

        Former residuals hold one vector of that space each. What the rounding of a product leaves in the rest of it is
        not taken away with them, and every further step multiplies it by α times the eigenvalue (its residual ``r``,
        and ``p`` of its search direction, are followed here), until it is a part of p's Rayleigh quotient.
        """
        largest, accuracy = quotient[0], eps(self._r.value)
        r, p, total = (torch.zeros_like(largest) for _ in range(3))
        for step in range(len(norm)):
            if step:
                p = r + _divide(norm[step], norm[step - 1]) * p
            part = (largest * (alpha[step] * p / length[step]).square() / quotient[step]).clamp(max=1)
            lost = alpha[step] * p + length[step] * part
            total = total.hypot(lost.nan_to_num(0.0))  # NaN where a step has no length
            r = r + largest * (alpha[step] * p + accuracy * length[step])
        return total

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
    """numerator / denominator; zero where the denominator is: a residual that counts as zero takes no part."""
    return numerator / denominator.masked_fill(denominator == 0, torch.inf)
