"""One linear system, (AᵀA + βI) D = AᵀG, in three equal forms.

Each form chooses where vectors live and how AᵀA acts there; solvers do not know in which one they work. With n the
length of a column (an output unit or channel), vectors are ``[g, o, n]``:

* ``Primal``: n = d, v stands for itself. For few columns of A: convolutions, small layers.
* ``Dual``: n = m, v stands for Aᵀv. For few rows of A: wide fully connected layers.
* ``MatrixFree``: n = d, v stands for itself. For few iterations, or a Gram matrix that is too large.
"""

from __future__ import annotations

import abc
from typing import NamedTuple

import torch
from torch import Tensor

from proxprop.design import Design, MatrixDesign, Parameters


class Vector(NamedTuple):
    """A vector and what it becomes in inner products: ⟨U, V⟩ = u.value · v.dual, column by column."""

    value: Tensor
    dual: Tensor

    def plus(self, factor: Tensor, other: Vector) -> Vector:
        """``self + factor · other``, without a product."""
        value = self.value + factor * other.value
        return Vector(value, value if self.dual is self.value else self.dual + factor * other.dual)


class System(abc.ABC):
    """(AᵀA + βI) D = AᵀG in one form. Columns (output units or channels) do not mix."""

    beta: float
    residual: Tensor
    """The right-hand side in this form: the residual of D = 0, ``[g, o, n]``."""

    def vector(self, value: Tensor) -> Vector:
        """``value`` with its dual."""
        return Vector(value, value)

    @abc.abstractmethod
    def image(self, p: Vector) -> Tensor:
        """The product with A or its Gram matrix that the next two methods need."""

    @abc.abstractmethod
    def gram_form(self, p: Vector, image: Tensor) -> Tensor:
        """⟨P, AᵀA P⟩ of every column, ``[g, o, 1]``."""

    @abc.abstractmethod
    def gram_times(self, image: Tensor) -> Tensor:
        """AᵀA P as a vector of this form."""

    @abc.abstractmethod
    def parameters(self, value: Tensor) -> Parameters:
        """What ``value`` stands for, shaped like the layer's parameters."""


class DirectSystem(System):
    """A form whose matrix is at hand and can be factorised."""

    matrix: Tensor
    """AᵀA or AAᵀ, ``[g, n, n]``."""

    def solve(self) -> Parameters:
        """D by Cholesky factorisation.

        The matrix is positive definite by construction (β > 0). Where rounding takes that away (τ beyond what the
        precision resolves, or non-finite inputs), the factorisation is discarded without an exception or a device
        synchronisation, and the step is the explicit one divided by trace(AᵀA) + β, which is safe for any spectrum.
        """
        trace = self.matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        shifted = self.matrix.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(self.beta)
        factor, info = torch.linalg.cholesky_ex(shifted)
        solution = self._solve(factor)
        safe = self.residual / (trace + self.beta).to(self.residual.dtype)
        return self.parameters(torch.where((info == 0)[:, None, None], solution, safe))

    @abc.abstractmethod
    def _solve(self, factor: Tensor) -> Tensor:
        """The solution, given the lower Cholesky factor of ``matrix + βI``."""


class Primal(DirectSystem):
    """d×d: everything runs in the accumulation precision, which is cheap where d is small."""

    def __init__(self, design: MatrixDesign, gradient: Tensor, beta: float) -> None:
        self.design, self.beta = design, beta
        self.matrix = design.gram()  # [g, d, d]
        self.residual = design.right_hand_side(gradient).to(self.matrix.dtype)  # [g, o, d]

    def image(self, p: Vector) -> Tensor:
        return p.value @ self.matrix

    def gram_form(self, p: Vector, image: Tensor) -> Tensor:
        return (p.value * image).sum(-1, keepdim=True)

    def gram_times(self, image: Tensor) -> Tensor:
        return image

    def parameters(self, value: Tensor) -> Parameters:
        return self.design.unstack(value)

    def _solve(self, factor: Tensor) -> Tensor:
        return torch.cholesky_solve(self.residual.mT, factor).mT


class Dual(DirectSystem):
    """m×m: D = AᵀC with (AAᵀ + βI) C = G; the product with Aᵀ replaces back-propagation's own."""

    def __init__(self, design: MatrixDesign, gradient: Tensor, beta: float) -> None:
        self.design, self.beta = design, beta
        self.matrix = design.kernel()  # [g, m, m]
        self.residual = design.to_rows(gradient)  # [g, o, m]
        self._rounded = self.matrix.to(self.residual.dtype)

    def vector(self, value: Tensor) -> Vector:
        return Vector(value, value @ self._rounded)

    def image(self, p: Vector) -> Tensor:
        return p.dual

    def gram_form(self, p: Vector, image: Tensor) -> Tensor:
        return (image * image).sum(-1, keepdim=True)

    def gram_times(self, image: Tensor) -> Tensor:
        return image

    def parameters(self, value: Tensor) -> Parameters:
        return self.design.adjoint(self.design.from_rows(value))

    def _solve(self, factor: Tensor) -> Tensor:
        return self.residual @ torch.cholesky_inverse(factor).to(self.residual.dtype)


class MatrixFree(System):
    """No Gram matrix: one product with A and one with Aᵀ an iteration."""

    def __init__(self, design: Design, gradient: Tensor, beta: float) -> None:
        self.design, self.beta = design, beta
        self.residual = design.right_hand_side(gradient).to(design.dtype)  # [g, o, d]

    def image(self, p: Vector) -> Tensor:
        return self.design.apply(self.design.unstack(p.value))

    def gram_form(self, p: Vector, image: Tensor) -> Tensor:
        return self.design.squared_norms(image)

    def gram_times(self, image: Tensor) -> Tensor:
        return self.design.right_hand_side(image).to(image.dtype)

    def parameters(self, value: Tensor) -> Parameters:
        return self.design.unstack(value)
