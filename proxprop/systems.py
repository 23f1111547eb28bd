"""One linear system, (AᵀA + βI) D = AᵀG, in three equal forms.

Each form chooses where vectors live and how AᵀA acts there; solvers do not know which one they work in.

========== ====================== ============================ =========================================
form       a vector               stands for                   worth it when
========== ====================== ============================ =========================================
primal     ``V`` [g, o, d]        V                            few columns: convolutions, small layers
dual       ``V`` [g, m, o]        AᵀV                          few rows: wide fully connected layers
matrix-free ``V`` [g, o, d]       V                            few iterations, or a Gram matrix too large
========== ====================== ============================ =========================================
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from proxprop.design import Design, MatrixDesign, Parameters


class System(abc.ABC):
    """(AᵀA + βI) D = AᵀG in one form.

    Vectors come with their *image*: the expensive product that the cheap methods need. Columns of the system (output
    units or channels) do not mix; sums over one run along ``axis``.
    """

    axis: int
    beta: float
    residual: Tensor
    """The right-hand side in this form: the residual of D = 0."""

    @abc.abstractmethod
    def product(self, v: Tensor) -> Tensor:
        """The image of ``v``, by multiplication."""

    def residual_image(self, r: Tensor) -> Tensor | None:
        """The image of a residual, where its norm needs one."""
        return None

    def direction_image(
        self, p: Tensor, image: Tensor | None, ratio: Tensor | None = None, previous: Tensor | None = None
    ) -> Tensor:
        """The image of a search direction: p = r + ratio · p′, of whose terms the images may be known."""
        return self.product(p)

    @abc.abstractmethod
    def squared_norm(self, v: Tensor, image: Tensor | None) -> Tensor:
        """‖V‖² of every column."""

    @abc.abstractmethod
    def gram_form(self, image: Tensor, v: Tensor) -> Tensor:
        """⟨V, AᵀA V⟩ of every column."""

    @abc.abstractmethod
    def gram_times(self, image: Tensor) -> Tensor:
        """AᵀA V, as a vector of this form."""

    @abc.abstractmethod
    def parameters(self, v: Tensor) -> Parameters:
        """V, shaped like the layer's parameters."""


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

    axis = -1

    def __init__(self, design: MatrixDesign, gradient: Tensor, beta: float) -> None:
        self.design, self.beta = design, beta
        self.matrix = design.gram()  # [g, d, d]
        self.residual = design.stack(design.adjoint(gradient)).to(self.matrix.dtype)  # [g, o, d]

    def product(self, v: Tensor) -> Tensor:
        return v @ self.matrix

    def squared_norm(self, v: Tensor, image: Tensor | None) -> Tensor:
        return (v * v).sum(-1, keepdim=True)

    def gram_form(self, image: Tensor, v: Tensor) -> Tensor:
        return (v * image).sum(-1, keepdim=True)

    def gram_times(self, image: Tensor) -> Tensor:
        return image

    def parameters(self, v: Tensor) -> Parameters:
        return self.design.unstack(v)

    def _solve(self, factor: Tensor) -> Tensor:
        return torch.cholesky_solve(self.residual.mT, factor).mT


class Dual(DirectSystem):
    """m×m: D = AᵀC with (AAᵀ + βI) C = G; the product with Aᵀ replaces back-propagation's own."""

    axis = -2

    def __init__(self, design: MatrixDesign, gradient: Tensor, beta: float) -> None:
        self.design, self.beta = design, beta
        self.matrix = design.kernel()  # [g, m, m]
        self.residual = design.to_rows(gradient)  # [g, m, o]
        self._rounded = self.matrix.to(self.residual.dtype)

    def product(self, v: Tensor) -> Tensor:
        return self._rounded @ v

    def residual_image(self, r: Tensor) -> Tensor:
        return self.product(r)

    def direction_image(
        self, p: Tensor, image: Tensor | None, ratio: Tensor | None = None, previous: Tensor | None = None
    ) -> Tensor:
        assert image is not None
        return image if ratio is None or previous is None else image + ratio * previous

    def squared_norm(self, v: Tensor, image: Tensor | None) -> Tensor:
        assert image is not None
        return (v * image).sum(-2, keepdim=True)

    def gram_form(self, image: Tensor, v: Tensor) -> Tensor:
        return (image * image).sum(-2, keepdim=True)

    def gram_times(self, image: Tensor) -> Tensor:
        return image

    def parameters(self, v: Tensor) -> Parameters:
        return self.design.adjoint(self.design.from_rows(v))

    def _solve(self, factor: Tensor) -> Tensor:
        inverse = torch.cholesky_inverse(factor).to(self.residual.dtype)
        return inverse @ self.residual


class MatrixFree(System):
    """No Gram matrix: one product with A and one with Aᵀ an iteration."""

    axis = -1

    def __init__(self, design: Design, gradient: Tensor, beta: float) -> None:
        self.design, self.beta = design, beta
        self.residual = design.stack(design.adjoint(gradient))  # [g, o, d]

    def product(self, v: Tensor) -> Tensor:
        return self.design.apply(self.design.unstack(v))

    def squared_norm(self, v: Tensor, image: Tensor | None) -> Tensor:
        return (v * v).sum(-1, keepdim=True)

    def gram_form(self, image: Tensor, v: Tensor) -> Tensor:
        return self.design.squared_norms(image)

    def gram_times(self, image: Tensor) -> Tensor:
        return self.design.stack(self.design.adjoint(image))

    def parameters(self, v: Tensor) -> Parameters:
        return self.design.unstack(v)
