"""Which form of the system is cheapest: a model of the multiply-adds of each."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from proxprop.design import Design, MatrixDesign
from proxprop.systems import DirectSystem, Dual, MatrixFree, Primal, System


@dataclasses.dataclass
class CostModel:
    """What a multiply-add costs, relative to one in a large float32 matrix product.

    Args:
        double: In a float64 matrix product.
        matrix_free: In a product with A or Aᵀ by the layer's own kernels (a convolution, say).
    """

    double: float
    matrix_free: float


COSTS = {
    "cpu": CostModel(double=2.0, matrix_free=2.0),
    "cuda": CostModel(double=1.0, matrix_free=2.0),
}
"""The cost model of each device type; others use that of ``cuda``. Change an entry to steer the choice."""


def direct_system(design: MatrixDesign, gradient: Tensor, beta: float) -> DirectSystem:
    """The cheaper of the two forms with a matrix to factorise (in float64)."""
    form = Primal if _primal(design, None) <= _dual(design, None) else Dual
    return form(design, gradient, beta)


def iterative_system(design: Design, gradient: Tensor, beta: float, iterations: int) -> System:
    """The cheapest form for that many conjugate gradient iterations."""
    if not isinstance(design, MatrixDesign):
        return MatrixFree(design, gradient, beta)
    best: type[Primal] | type[Dual] | type[MatrixFree] = Primal
    cost = _primal(design, iterations)
    for form, other in ((Dual, _dual(design, iterations)), (MatrixFree, _matrix_free(design, iterations))):
        if other < cost:
            best, cost = form, other
    return best(design, gradient, beta)


def _primal(design: MatrixDesign, iterations: int | None) -> float:
    g, d, o = design.groups, design.columns, design.outputs
    solve = d**3 / 3 + d**2 * o if iterations is None else iterations * d**2 * o
    return design.gram_cost + _model(design).double * g * solve


def _dual(design: MatrixDesign, iterations: int | None) -> float:
    g, m, d, o = design.groups, design.rows, design.columns, design.outputs
    model = _model(design)
    kernel = m**2 * d / 2  # symmetric
    if iterations is None:
        return g * (model.double * (kernel + m**3) + m**2 * o)
    return g * (kernel + iterations * m**2 * o)


def _matrix_free(design: MatrixDesign, iterations: int) -> float:
    products = 2 * iterations - 1
    return _model(design).matrix_free * products * design.groups * design.rows * design.columns * design.outputs


def _model(design: Design) -> CostModel:
    return COSTS.get(design.device.type, COSTS["cuda"])
