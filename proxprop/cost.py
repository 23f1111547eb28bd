"""What a solve costs on each kind of device: what that is good at, and how much to hold at a time."""

from __future__ import annotations

import dataclasses
import math

import torch


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
        cholesky: In a Cholesky factorisation of the same precision.
    """

    double: float
    matrix_free: float
    eigen: float
    working_set: int
    cholesky: float = 2.0


COSTS = {
    "cpu": CostModel(double=2.0, matrix_free=1.2, eigen=15.0, working_set=2**23),
    "cuda": CostModel(double=1.0, matrix_free=2.0, eigen=math.inf, working_set=2**29),
}
"""The cost model of each device type; others use that of ``cuda``. Change an entry to steer the choice."""


def cost_model(device: torch.device) -> CostModel:
    return COSTS.get(device.type, COSTS["cuda"])
