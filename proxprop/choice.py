"""Which form of a layer's linear system is cheapest, by counting multiply-adds."""

from __future__ import annotations

from torch import Tensor

from proxprop.cost import cost_model
from proxprop.design import Design, MatrixDesign, Parameters, accumulation_dtype
from proxprop.systems import (
    Bordered,
    Diagonal,
    DirectSystem,
    Dual,
    MatrixFree,
    Primal,
    Spectral,
    System,
    large,
    numbers_at_hand,
)

LOOK = 2e7
"""What calls for a look at a solution cost, in multiply-adds (measured on a CPU)."""


def direct_system(design: MatrixDesign, gradient: Tensor, beta: float) -> DirectSystem:
    """The cheapest of the two forms with a matrix to factorise, in the accumulation or in the working precision."""
    if design.diagonal:
        return Diagonal(design, gradient, beta)
    singles, can_look = [False], numbers_at_hand(gradient)
    if can_look and design.dtype != accumulation_dtype(gradient):
        singles.append(True)
    primal, primal_single = min((_direct_primal(design, single), single) for single in singles)
    dual, dual_single = min((_direct_dual(design, single), single) for single in singles)
    if primal <= dual:
        return Primal(design, gradient, beta, single=primal_single, precise=not can_look)
    return Dual(design, gradient, beta, single=dual_single)


def iterative_system(
    design: Design, gradient: Tensor, beta: float, iterations: int, start: Parameters | None = None
) -> System:
    """The cheapest form for that many conjugate gradient iterations; with ``start``, see ``ParameterSystem``."""
    if not isinstance(design, MatrixDesign):
        return MatrixFree(design, gradient, beta, start)
    if design.diagonal:
        return Diagonal(design, gradient, beta, start)
    primal, matrix_free = _primal(design, iterations), _matrix_free(design, iterations)
    if start is not None:
        bordered = _bordered(design, iterations)
        if bordered < min(primal, matrix_free):
            return Bordered(design, gradient, beta, start)
        return (Primal if primal <= matrix_free else MatrixFree)(design, gradient, beta, start)
    best: type[Primal] | type[Dual] | type[Spectral] | type[MatrixFree] = Primal
    least = primal
    for form, cost in ((Dual, _dual(design, iterations)), (Spectral, _spectral(design)), (MatrixFree, matrix_free)):
        if cost < least:
            best, least = form, cost
    if best is Primal:
        return Primal(design, gradient, beta, single=_single(design, iterations))
    return best(design, gradient, beta)


def _direct_primal(design: MatrixDesign, single: bool) -> float:
    g, d, o = design.groups, design.columns, design.outputs
    right = 0.0 if single or large(design) else _precise_right(design)
    return _gram(design, single) + right + _direct(design, d, g * d**2 * o, single)


def _direct_dual(design: MatrixDesign, single: bool) -> float:
    g, m, o = design.groups, design.rows, design.outputs
    kernel = design.kernel_cost * (1.0 if single else cost_model(design.device).double)
    if not single and o >= m:  # the inverse, and a product with it in the working precision
        return kernel + _direct(design, m, g * 2 / 3 * m**3, single) + g * m**2 * o
    return kernel + _direct(design, m, g * m**2 * o, single)


def _direct(design: MatrixDesign, n: int, solve: float, single: bool) -> float:
    """A factorisation, and ``solve`` multiply-adds with it; in the working precision with one refinement."""
    costs = cost_model(design.device)
    factorisation = costs.cholesky * design.groups * n**3 / 3
    if single:
        return factorisation + 2 * solve + 2 * costs.matrix_free * design.product_cost + LOOK
    return costs.double * (factorisation + solve)


def _gram(design: MatrixDesign, single: bool) -> float:
    return design.gram_cost * (cost_model(design.device).double if design.precise_gram and not single else 1.0)


def _precise_right(design: MatrixDesign) -> float:
    """What a right-hand side of float64 products costs more than one that is not."""
    return (cost_model(design.device).double - 1) * design.precise_right * design.product_cost


def _single(design: MatrixDesign, iterations: int) -> bool:
    """Whether iterations in the accumulation precision would cost a good part of the layer's own products."""
    double = cost_model(design.device).double
    return double > 1 and double * iterations * design.columns > design.rows


def _primal(design: MatrixDesign, iterations: int) -> float:
    g, d, o = design.groups, design.columns, design.outputs
    single = _single(design, iterations)
    return _gram(design, single) + g * iterations * d**2 * o * (1.0 if single else cost_model(design.device).double)


def _dual(design: MatrixDesign, iterations: int) -> float:
    return design.kernel_cost + iterations * design.groups * design.rows**2 * design.outputs


def _bordered(design: MatrixDesign, iterations: int) -> float:
    return _dual(design, iterations) + 2 * design.product_cost


def _spectral(design: MatrixDesign) -> float:
    g, m, o = design.groups, design.rows, design.outputs
    return design.kernel_cost + g * (cost_model(design.device).eigen * m**3 + 2 * m**2 * o)


def _matrix_free(design: MatrixDesign, iterations: int) -> float:
    factor = 1.0 if design.by_matrices else cost_model(design.device).matrix_free
    return factor * (2 * iterations - 1) * design.product_cost
