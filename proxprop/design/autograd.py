"""The design matrix of any module that is linear in its parameters, known only through its products."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from proxprop.design.base import Design, Parameters


class StackedDesign(Design):
    """A whose parameters are one stacked column (g = o = 1), so that conjugate gradients have one step length.

    Args:
        shapes: Of the parameters; None for one that is frozen.
        dtype: The precision in which to work.
        device: Where.
    """

    groups = outputs = 1

    def __init__(self, shapes: Sequence[torch.Size | None], dtype: torch.dtype, device: torch.device) -> None:
        self.shapes = tuple(shapes)
        self.columns = sum(shape.numel() for shape in self.shapes if shape is not None)
        self.dtype, self.device = dtype, device

    def stack(self, parameters: Parameters) -> Tensor:
        trained = [p for p, shape in zip(parameters, self.shapes, strict=True) if p is not None and shape is not None]
        return torch.cat([p.reshape(1, 1, -1) for p in trained], dim=-1)

    def unstack(self, stacked: Tensor) -> Parameters:
        parts = iter(torch.split(stacked, [shape.numel() for shape in self.shapes if shape is not None], dim=-1))
        return tuple(None if shape is None else next(parts).reshape(shape) for shape in self.shapes)

    def squared_norms(self, output: Tensor) -> Tensor:
        return output.square().sum().reshape(1, 1, 1)


class AutogradDesign(StackedDesign):
    """A of a module of unknown structure: A θ is a forward pass, Aᵀ z a vector-Jacobian product.

    Args:
        forward: The module's output as a function of its parameters (frozen ones are passed as zeros).
        like: The parameters, for their shapes and devices.
        trained: Which of them are trained.
        dtype: The precision in which to work.
    """

    def __init__(
        self,
        forward: Callable[[Sequence[Tensor]], Tensor],
        like: Sequence[Tensor],
        trained: Sequence[bool],
        dtype: torch.dtype,
    ) -> None:
        shapes = [tensor.shape if train else None for tensor, train in zip(like, trained, strict=True)]
        super().__init__(shapes, dtype, like[0].device)
        self.forward = forward
        self.zeros = [torch.zeros_like(tensor, dtype=dtype) for tensor in like]

    def apply(self, parameters: Parameters) -> Tensor:
        with torch.no_grad():
            return self.forward([zero if p is None else p for zero, p in zip(self.zeros, parameters, strict=True)])

    def adjoint(self, output: Tensor) -> Parameters:
        with torch.enable_grad():
            pairs = list(zip(self.zeros, self.shapes, strict=True))
            leaves = [zero.detach().requires_grad_(shape is not None) for zero, shape in pairs]
            result = self.forward(leaves)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            if not result.requires_grad:  # the module does not use those that are trained
                products = iter([torch.zeros_like(leaf) for leaf in wanted])
            else:
                products = iter(torch.autograd.grad(result, wanted, output.to(result.dtype), materialize_grads=True))
        return tuple(None if shape is None else next(products) for shape in self.shapes)
