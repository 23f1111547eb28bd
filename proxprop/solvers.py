"""Conjugate gradients on (AᵀA + βI) D = AᵀG, as the paper states them and as its published code runs them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from proxprop.design import Parameters
from proxprop.systems import System, Vector, dot

COLUMNS_AT_ONCE = 1024
"""Columns of a system are independent; so many at a time bound the memory of the residuals that are kept."""


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
    separable = system.separable and not rules.one_step_length and not rules.stop_below
    chunks = torch.split(system.residual, COLUMNS_AT_ONCE, dim=1) if separable else [system.residual]
    solutions = [_iterate(system, chunk, iterations, rules) for chunk in chunks]
    return system.parameters(torch.cat(solutions, dim=1))


def _iterate(system: System, residual: Tensor, iterations: int, rules: CGRules) -> Tensor:
    """The solution for the columns of ``residual``."""
    axes = (0, 1, 2) if rules.one_step_length else (2,)

    def total(columns: Tensor) -> Tensor:
        return columns.sum(axes, keepdim=True)

    scale = residual.abs().amax(axes, keepdim=True).clamp(min=torch.finfo(residual.dtype).tiny)
    damping = rules.damping / scale / scale  # in two steps: the square could underflow

    p = r = system.vector((residual / scale).contiguous())
    initial = norm = total(dot(r.value, r.dual))
    negligible = torch.finfo(norm.dtype).eps ** 2 * initial
    kept: list[tuple[Vector, Tensor]] = []
    solution = torch.zeros_like(r.value)
    for step in range(1, iterations + 1):
        image = system.image(p)
        curvature = total(system.gram_form(p, image)) + system.beta * total(dot(p.value, p.dual))
        alpha = _divide(norm, curvature + damping)
        solution = torch.addcmul(solution, alpha, p.value)
        if step == iterations:
            break
        value = r.value - alpha * (system.gram_times(image) + system.beta * p.value)
        if rules.orthogonal:
            kept.append((r, norm))
            for other, squared in kept:
                projection = _divide(dot(value, other.dual), squared)
                value = torch.addcmul(value, projection, other.value, value=-1)
        r = system.vector(value)
        previous, norm = norm, total(dot(r.value, r.dual))
        # A zero norm makes every further step length zero. NaN compares false and so stays NaN.
        norm = torch.where(norm <= negligible, 0, norm)
        if rules.stop_below:
            squared_norms = norm * scale * scale
            stopped = squared_norms.amax() < rules.stop_below**2 * (initial * scale * scale).mean()
            norm = torch.where(stopped, 0, norm)
        ratio = _divide(norm, previous + damping)
        p = r.plus(ratio, p if rules.conjugate or step > 1 else r)
    return solution * scale


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator; where the denominator is zero, so is the numerator, and zero is returned."""
    return numerator / torch.where(denominator == 0, 1, denominator)
