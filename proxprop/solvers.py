"""Conjugate gradients on (AᵀA + βI) D = AᵀG, as the paper states them and as its published code runs them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from proxprop.design import Parameters
from proxprop.systems import System


@dataclasses.dataclass(frozen=True)
class CGRules:
    """What may differ between conjugate gradient solvers; the defaults are the textbook.

    Args:
        damping: An absolute number added to both denominators.
        stop_below: Stop when the largest column's residual norm falls below this times the root mean square of the
            initial ones.
        conjugate_second_direction: Whether the second search direction is conjugate to the first.
        one_step_length: Whether all columns share one step length.
    """

    damping: float = 0.0
    stop_below: float = 0.0
    conjugate_second_direction: bool = True
    one_step_length: bool = False


def conjugate_gradients(system: System, iterations: int, rules: CGRules) -> Parameters:
    """Run ``iterations`` conjugate gradient steps from D = 0 on all columns at once.

    Textbook rules are invariant to the scale of every column; a column that has converged to rounding, or is zero,
    stays as it is. Nothing in the loop waits for the device.

    Args:
        system: The system, in any form.
        iterations: Number of steps, at least 1.
        rules: Deviations from the textbook.

    Returns:
        D, shaped like the layer's parameters.
    """
    axes = (0, 1, 2) if rules.one_step_length else (system.axis,)

    def total(per_column: Tensor) -> Tensor:
        return per_column.sum(axes, keepdim=True)

    scale = system.residual.abs().amax(axes, keepdim=True)
    scale = torch.where(scale == 0, 1, scale)
    r = system.residual / scale
    r_image = system.residual_image(r)
    initial = norm = total(system.squared_norm(r, r_image))
    damping = rules.damping / scale.square()
    negligible = torch.finfo(r.dtype).eps ** 2 * initial

    p, p_image = r, system.direction_image(r, r_image)
    solution = torch.zeros_like(r)
    for step in range(1, iterations + 1):
        curvature = total(system.gram_form(p_image, p) + system.beta * system.squared_norm(p, p_image))
        alpha = _divide(norm, curvature + damping)
        solution = solution + alpha * p
        if step == iterations:
            break
        r = r - alpha * (system.gram_times(p_image) + system.beta * p)
        r_image = system.residual_image(r)
        previous, norm = norm, total(system.squared_norm(r, r_image))
        # A zero norm makes every further step length zero; NaN compares false and so stays NaN.
        norm = torch.where(norm <= negligible, 0, norm)
        if rules.stop_below:
            squared = norm * scale.square()
            stopped = squared.amax() < rules.stop_below**2 * (initial * scale.square()).mean()
            norm = torch.where(stopped, 0, norm)
        ratio = _divide(norm, previous + damping)
        unconjugated = step == 1 and not rules.conjugate_second_direction
        q, q_image = (r, r_image) if unconjugated else (p, p_image)
        p = r + ratio * q
        p_image = system.direction_image(p, r_image, ratio, q_image)
    return system.parameters(solution * scale)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and numerator where the denominator is zero (the numerator is zero there, too)."""
    return numerator / torch.where(denominator == 0, 1, denominator)
