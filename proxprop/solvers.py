"""Conjugate gradients on (AᵀA + βI) D = AᵀG, as the paper states them and as its published code runs them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from proxprop.cost import cost_model
from proxprop.design import Parameters
from proxprop.systems import System, Vector, dot


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
    residual = system.residual
    if not system.separable or rules.one_step_length or rules.stop_below:
        return system.parameters(_iterate(system, residual, iterations, rules))
    solution = torch.empty_like(residual)
    size = _columns_at_once(residual, iterations)
    for part, columns in zip(torch.split(residual, size, 1), torch.split(solution, size, 1), strict=True):
        columns.copy_(_iterate(system, part, iterations, rules))
    return system.parameters(solution)


def _columns_at_once(residual: Tensor, iterations: int) -> int:
    """How many columns of ``residual`` to work on together, so that all their vectors fit the working set."""
    groups, outputs, n = residual.shape
    vectors = 2 * (iterations - 1) + 6  # former residuals with their duals, and what an iteration has at hand
    bytes_each = vectors * groups * n * residual.element_size()
    chunks = -(-outputs * bytes_each // cost_model(residual.device).working_set)
    return -(-outputs // chunks)


def _iterate(system: System, residual: Tensor, iterations: int, rules: CGRules) -> Tensor:
    """The solution for the columns of ``residual``."""
    axes = (0, 1, 2) if rules.one_step_length else (2,)

    def total(columns: Tensor) -> Tensor:
        return columns.sum(axes, keepdim=True)

    scale = residual.abs().amax(axes, keepdim=True).clamp(min=torch.finfo(residual.dtype).tiny)
    damping = rules.damping / scale / scale  # in two steps: the square could underflow

    p = r = system.vector(residual / scale)
    initial = norm = total(dot(r.value, r.dual))
    negligible = torch.finfo(norm.dtype).eps ** 2 * initial
    former: list[tuple[Vector, Tensor]] = []
    solution = torch.zeros((), dtype=residual.dtype, device=residual.device)
    for step in range(1, iterations + 1):
        image = system.image(p)
        alpha = _divide(norm, total(system.curvature(p, image)) + damping)
        solution = torch.addcmul(solution, alpha, p.value)
        if step == iterations:
            break
        value = torch.addcmul(r.value, alpha, system.product(p, image), value=-1)
        if rules.orthogonal:
            former.append((r, norm))
            for other, squared in former:
                value.addcmul_(_divide(dot(value, other.dual), squared), other.value, value=-1)
        r = system.vector(value)
        previous, norm = norm, total(dot(r.value, r.dual))
        # A zero norm makes every further step length zero. NaN compares false and so stays NaN.
        norm = norm.masked_fill(norm <= negligible, 0)
        if rules.stop_below:
            squared_norms = norm * scale * scale
            stopped = squared_norms.amax() < rules.stop_below**2 * (initial * scale * scale).mean()
            norm = norm.masked_fill(stopped, 0)
        ratio = _divide(norm, previous + damping)
        p = r.plus(ratio, p if rules.conjugate or step > 1 else r)
    return solution * scale


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator; where the denominator is zero, so is the numerator, and zero is returned."""
    return numerator / denominator.masked_fill(denominator == 0, 1)
