"""ISAAC Newton (Petersen et al., ICLR 2023): fully connected layers whose weight gradient is λ(AᵀA/m + λI)⁻¹AᵀG."""

from __future__ import annotations

import isaac
from torch import nn

from proxprop import ProxPropLinear


def with_isaac_layers(model: nn.Module, damping: float) -> nn.Module:
    """`model`, its `ProxPropLinear` layers replaced in place by ISAAC's, with the same parameters.

    Their direction is that of `prox_exact` over τ, without the bias in A, for 1/τ = m · `damping`, with m rows in A.
    The bias has its plain gradient.
    """
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, ProxPropLinear):
                rival = isaac.Linear(layer.in_features, layer.out_features, damping, bias=layer.bias is not None)
                rival.weight, rival.bias = layer.weight, layer.bias
                setattr(parent, name, rival)
    return model
