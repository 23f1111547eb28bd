"""One linear system, (AᵀA + βI) D = AᵀG, in three equal forms.

Each form chooses where vectors live and how AᵀA acts there; solvers do not know in which one they work. With n the
length of a column (an output unit or channel), vectors are ``[g, o, n]``:

* ``Primal``: n = d, v stands for itself. For few columns of A: convolutions, small layers.
* ``Dual``: n = m, v stands for Aᵀv. For few rows of A: wide fully connected layers.
* ``MatrixFree``: n = d, v stands for itself. For few iterations, or a Gram matrix that is too large.
"""

from __future__ import annotations

import abc
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from proxprop.design import Design, MatrixDesign, Parameters, accumulation_dtype


class Vector(NamedTuple):
    """A vector and what it becomes in inner products: ⟨U, V⟩ = u.value · v.dual, column by column."""

    value: Tensor
    dual: Tensor

    def plus(self, factor: Tensor, other: Vector) -> Vector:
        """``self + factor · other``, without a product."""
        value = self.value + factor * other.value
        return Vector(value, value if self.dual is self.value else self.dual + factor * other.dual)


def dot(u: Tensor, v: Tensor) -> Tensor:
    """Inner products of columns, ``[g, o, n]`` twice to ``[g, o, 1]``."""
    return (u * v).sum(-1, keepdim=True)


class System(abc.ABC):
    """(AᵀA + βI) D = AᵀG in one form. Columns (output units or channels) do not mix."""

    separable: ClassVar[bool] = True
    """Whether ``vector``, ``image`` and the rest accept some of the columns, too."""
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
    """A form whose matrix can be formed, and factorised."""

    def solve(self) -> Parameters:
        """D by Cholesky factorisation, in the accumulation precision.

        AᵀA + βI is positive definite, as β > 0. Where rounding takes that away (τ beyond what the precision resolves,
        or inputs that are not finite) the factor is replaced, without an exception or a device synchronisation, by
        the root of trace(AᵀA) + β: the step is then explicit, and short enough to be safe for any spectrum.
        """
        matrix = self._matrix()
        shift = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        factor, info = torch.linalg.cholesky_ex(matrix + self.beta * shift)
        factor = torch.where((info == 0)[:, None, None], factor, (trace + self.beta).sqrt() * shift)
        return self.parameters(self._solution(factor))

    @abc.abstractmethod
    def _matrix(self) -> Tensor:
        """AᵀA or AAᵀ in the accumulation precision, ``[g, n, n]``."""

    @abc.abstractmethod
    def _solution(self, factor: Tensor) -> Tensor:
        """The solution, given the lower Cholesky factor of ``matrix + βI``."""


class Primal(DirectSystem):
    """d×d: everything runs in the accumulation precision, which is cheap where d is small."""

    def __init__(self, design: MatrixDesign, gradient: Tensor, beta: float) -> None:
        self.design, self.beta = design, beta
        self.gram = design.gram()  # [g, d, d]
        self.residual = design.right_hand_side(gradient).to(self.gram.dtype)  # [g, o, d]

    def image(self, p: Vector) -> Tensor:
        return p.value @ self.gram

    def gram_form(self, p: Vector, image: Tensor) -> Tensor:
        return dot(p.value, image)

    def gram_times(self, image: Tensor) -> Tensor:
        return image

    def parameters(self, value: Tensor) -> Parameters:
        return self.design.unstack(value)

    def _matrix(self) -> Tensor:
        return self.gram

    def _solution(self, factor: Tensor) -> Tensor:
        return torch.cholesky_solve(self.residual.mT, factor).mT


class Dual(DirectSystem):
    """m×m: D = AᵀC with (AAᵀ + βI) C = G; the product with Aᵀ replaces back-propagation's own.

    Iterations and the product with the inverse run in the working precision.
    """

    def __init__(self, design: MatrixDesign, gradient: Tensor, beta: float) -> None:
        self.design, self.beta = design, beta
        self.residual = design.to_rows(gradient)  # [g, o, m]
        self._kernel: Tensor | None = None

    def vector(self, value: Tensor) -> Vector:
        if self._kernel is None:
            self._kernel = self.design.kernel(self.residual.dtype)
        return Vector(value, value @ self._kernel)

    def image(self, p: Vector) -> Tensor:
        return p.dual

    def gram_form(self, p: Vector, image: Tensor) -> Tensor:
        return dot(image, image)

    def gram_times(self, image: Tensor) -> Tensor:
        return image

    def parameters(self, value: Tensor) -> Parameters:
        return self.design.adjoint(self.design.from_rows(value))

    def _matrix(self) -> Tensor:
        return self.design.kernel(accumulation_dtype(self.residual))

    def _solution(self, factor: Tensor) -> Tensor:
        return self.residual @ torch.cholesky_inverse(factor).to(self.residual.dtype)


class MatrixFree(System):
    """No Gram matrix: one product with A and one with Aᵀ an iteration."""

    separable = False

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
