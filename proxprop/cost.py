"""What a solve costs on each kind of device: which form of the system is cheapest, and how much to hold at a time."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from proxprop.design import Design, MatrixDesign, Parameters
from proxprop.systems import Bordered, Diagonal, DirectSystem, Dual, MatrixFree, Primal, Spectral, System


@dataclasses.dataclass
class CostModel:
    """What a kind of device is good at. Costs are those of a multiply-add, relative to one in a large float32 product.

    Args:
        double: In a float64 matrix product.
        matrix_free: In a product with A or Aᵀ by the layer's own kernels (a convolution, say).
        eigen: An eigendecomposition of an m×m matrix in float64, in units of m³; ``math.inf`` where it makes the host
            wait for the device.
        working_set: How many bytes conjugate gradients hold at a time: what stays in the cache of a CPU, what a GPU has
            room for.
    """

    double: float
    matrix_free: float
    eigen: float
    working_set: int


COSTS = {
    "cpu": CostModel(double=2.0, matrix_free=2.0, eigen=15.0, working_set=2**23),
    "cuda": CostModel(double=1.0, matrix_free=2.0, eigen=math.inf, working_set=2**27),
}
"""The cost model of each device type; others use that of ``cuda``. Change an entry to steer the choice."""


def cost_model(device: torch.device) -> CostModel:
    return COSTS.get(device.type, COSTS["cuda"])


def direct_system(design: MatrixDesign, gradient: Tensor, beta: float) -> DirectSystem:
    """The cheaper of the two forms with a matrix to factorise (in float64)."""
    if design.diagonal:
        return Diagonal(design, gradient, beta)
    form = Primal if _primal(design, None) <= _dual(design, None) else Dual
    return form(design, gradient, beta)


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
    return best(design, gradient, beta)


def _primal(design: MatrixDesign, iterations: int | None) -> float:
    g, d, o = design.groups, design.columns, design.outputs
    solve = d**3 / 3 + d**2 * o if iterations is None else iterations * d**2 * o
    return design.gram_cost + cost_model(design.device).double * g * solve


def _dual(design: MatrixDesign, iterations: int | None) -> float:
    g, m, o = design.groups, design.rows, design.outputs
    if iterations is None:
        return g * (cost_model(design.device).double * (_kernel(design) + m**3) + m**2 * o)
    return g * (_kernel(design) + iterations * m**2 * o)


def _bordered(design: MatrixDesign, iterations: int) -> float:
    g, m, d, o = design.groups, design.rows, design.columns, design.outputs
    return g * (_kernel(design) + iterations * m**2 * o + 2 * m * d * o)


def _spectral(design: MatrixDesign) -> float:
    g, m, o = design.groups, design.rows, design.outputs
    return g * (_kernel(design) + cost_model(design.device).eigen * m**3 + 2 * m**2 * o)


def _kernel(design: MatrixDesign) -> float:
    return design.rows**2 * design.columns / 2  # symmetric


def _matrix_free(design: MatrixDesign, iterations: int) -> float:
    g, m, d, o = design.groups, design.rows, design.columns, design.outputs
    return cost_model(design.device).matrix_free * (2 * iterations - 1) * g * m * d * o
