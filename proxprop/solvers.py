"""Conjugate gradients on (AᵀA + βI) D = AᵀG, as the paper states them and as its published code runs them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from proxprop.design import Parameters
from proxprop.systems import System, Vector


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
    axes = (0, 1, 2) if rules.one_step_length else (2,)

    def total(columns: Tensor) -> Tensor:
        return columns.sum(axes, keepdim=True)

    scale = system.residual.abs().amax(axes, keepdim=True).clamp(min=torch.finfo(system.residual.dtype).tiny)
    damping = rules.damping / scale / scale  # in two steps: the square could underflow

    p = r = system.vector(system.residual / scale)
    initial = norm = total(r.value * r.dual)
    negligible = torch.finfo(norm.dtype).eps ** 2 * initial
    basis = _Basis(r.value, iterations - 1 if rules.orthogonal else 0)
    solution = torch.zeros_like(r.value)
    for step in range(1, iterations + 1):
        image = system.image(p)
        curvature = total(system.gram_form(p, image)) + system.beta * total(p.value * p.dual)
        alpha = _divide(norm, curvature + damping)
        solution = solution + alpha * p.value
        if step == iterations:
            break
        value = r.value - alpha * (system.gram_times(image) + system.beta * p.value)
        if rules.orthogonal:
            basis.append(r, norm)
            value = basis.orthogonalised(value)
        r = system.vector(value)
        previous, norm = norm, total(r.value * r.dual)
        # A zero norm makes every further step length zero. NaN compares false and so stays NaN.
        norm = torch.where(norm <= negligible, 0, norm)
        if rules.stop_below:
            squared = norm * scale.square()
            stopped = squared.amax() < rules.stop_below**2 * (initial * scale.square()).mean()
            norm = torch.where(stopped, 0, norm)
        ratio = _divide(norm, previous + damping)
        p = r.plus(ratio, p if rules.conjugate or step > 1 else r)
    return system.parameters(solution * scale)


class _Basis:
    """The residuals so far, in one block of memory."""

    def __init__(self, like: Tensor, size: int) -> None:
        self.values = like.new_empty(*like.shape[:-1], size, like.shape[-1])  # [g, o, size, n]
        self.duals: Tensor | None = None
        self.norms: list[Tensor] = []

    def append(self, r: Vector, norm: Tensor) -> None:
        index = len(self.norms)
        self.values[..., index, :] = r.value
        if r.dual is not r.value:
            if self.duals is None:
                self.duals = torch.empty_like(self.values)
            self.duals[..., index, :] = r.dual
        self.norms.append(norm)

    def orthogonalised(self, value: Tensor) -> Tensor:
        """``value`` less its projections on the residuals."""
        count = len(self.norms)
        values = self.values[..., :count, :]
        duals = values if self.duals is None else self.duals[..., :count, :]
        coefficients = (duals @ value.unsqueeze(-1)).squeeze(-1)  # [g, o, count]
        coefficients = _divide(coefficients, torch.cat(self.norms, dim=-1))
        return value - (coefficients.unsqueeze(-2) @ values).squeeze(-2)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator; where the denominator is zero, so is the numerator, and zero is returned."""
    return numerator / torch.where(denominator == 0, 1, denominator)
