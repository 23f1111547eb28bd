"""Design matrices: what a layer's parameters are multiplied with."""

from proxprop.design.autograd import AutogradDesign
from proxprop.design.base import (
    Design,
    GramDesign,
    MatrixDesign,
    NoProximalStep,
    Parameters,
    accumulation_dtype,
    working_dtype,
)
from proxprop.design.collected import CollectedDesign
from proxprop.design.computed import ComputedDesign, is_linear_now, is_moved, parameters_behind
from proxprop.design.conv import ConvDesign, ConvGeometry
from proxprop.design.linear import LinearDesign
from proxprop.design.shared import SharedProducts

__all__ = [
    "AutogradDesign",
    "CollectedDesign",
    "ComputedDesign",
    "ConvDesign",
    "ConvGeometry",
    "Design",
    "GramDesign",
    "LinearDesign",
    "MatrixDesign",
    "NoProximalStep",
    "Parameters",
    "SharedProducts",
    "accumulation_dtype",
    "is_linear_now",
    "is_moved",
    "parameters_behind",
    "working_dtype",
]
