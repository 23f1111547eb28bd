"""The design matrix of any module that is linear in its parameters, known only through its products."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from proxprop.design.base import Design, Parameters


class AutogradDesign(Design):
    """A of a module of unknown structure: A θ is a forward pass, Aᵀ z a vector-Jacobian product.

    All parameters are one stacked column (g = o = 1), so conjugate gradients have one step length.

    Args:
        forward: The module's output as a function of its parameters (frozen ones are passed as zeros).
        like: The parameters, for their shapes and devices.
        trained: Which of them are trained.
        dtype: The precision in which to work.
    """

    groups = outputs = 1

    def __init__(
        self,
        forward: Callable[[Sequence[Tensor]], Tensor],
        like: Sequence[Tensor],
        trained: Sequence[bool],
        dtype: torch.dtype,
    ) -> None:
        self.forward = forward
        self.zeros = [torch.zeros_like(tensor, dtype=dtype) for tensor in like]
        self.trained = tuple(trained)
        self.columns = sum(zero.numel() for zero, train in zip(self.zeros, self.trained, strict=True) if train)
        self.device, self.dtype = self.zeros[0].device, dtype

    def apply(self, parameters: Parameters) -> Tensor:
        with torch.no_grad():
            return self.forward([zero if p is None else p for zero, p in zip(self.zeros, parameters, strict=True)])

    def adjoint(self, output: Tensor) -> Parameters:
        with torch.enable_grad():
            leaves = [zero.detach().requires_grad_(train) for zero, train in zip(self.zeros, self.trained, strict=True)]
            result = self.forward(leaves)
            wanted = [leaf for leaf, train in zip(leaves, self.trained, strict=True) if train]
            products = iter(torch.autograd.grad(result, wanted, output.to(result.dtype), materialize_grads=True))
        return tuple(next(products) if train else None for train in self.trained)

    def stack(self, parameters: Parameters) -> Tensor:
        return torch.cat([p.reshape(1, 1, -1) for p in parameters if p is not None], dim=-1)

    def unstack(self, stacked: Tensor) -> Parameters:
        sizes = [zero.numel() for zero, train in zip(self.zeros, self.trained, strict=True) if train]
        parts = iter(torch.split(stacked, sizes, dim=-1))
        return tuple(
            next(parts).reshape(zero.shape) if train else None
            for zero, train in zip(self.zeros, self.trained, strict=True)
        )

    def squared_norms(self, output: Tensor) -> Tensor:
        return output.square().sum().reshape(1, 1, 1)
