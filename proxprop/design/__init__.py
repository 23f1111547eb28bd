"""Design matrices: what a layer's parameters are multiplied with."""

from proxprop.design.autograd import AutogradDesign
from proxprop.design.base import (
    Design,
    GramDesign,
    MatrixDesign,
    NoProximalStep,
    Parameters,
    accumulation_dtype,
    transposed,
    working_dtype,
)
from proxprop.design.collected import CollectedDesign, CollectedEmbedding
from proxprop.design.computed import ComputedDesign, is_linear_now, is_moved, parameters_behind
from proxprop.design.conv import ConvDesign, ConvGeometry
from proxprop.design.embedding import EmbeddingDesign
from proxprop.design.linear import LinearDesign
from proxprop.design.shared import SharedProducts
from proxprop.design.transposed_conv import TransposedConvDesign, TransposedConvGeometry

__all__ = [
    "AutogradDesign",
    "CollectedDesign",
    "CollectedEmbedding",
    "ComputedDesign",
    "ConvDesign",
    "ConvGeometry",
    "Design",
    "EmbeddingDesign",
    "GramDesign",
    "LinearDesign",
    "MatrixDesign",
    "NoProximalStep",
    "Parameters",
    "SharedProducts",
    "TransposedConvDesign",
    "TransposedConvGeometry",
    "accumulation_dtype",
    "is_linear_now",
    "is_moved",
    "parameters_behind",
    "transposed",
    "working_dtype",
]
