"""One linear system, (AᵀA + βI) D = AᵀG, in six equal forms.

Each form chooses where vectors live and how AᵀA acts there; solvers do not know in which one they work. With n the
length of a column (an output unit or channel), vectors are ``[g, o, n]``:

* ``Primal``: n = d, v stands for itself. For few columns of A: convolutions, small layers.
* ``Diagonal``: the same where AᵀA is diagonal: element by element. For embeddings.
* ``Dual``: n = m, v stands for Aᵀv. For few rows of A: wide fully connected layers.
* ``Spectral``: n = m, v stands for AᵀUv, with U the eigenvectors of AAᵀ. The same for many iterations.
* ``Bordered``: n = m + 1. The dual form of the published solver, whose right-hand side carries rounding.
* ``MatrixFree``: n = d, v stands for itself. For few iterations, or a Gram matrix that is too large.
"""

from __future__ import annotations

import abc
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from proxprop.design import CollectedDesign, Design, GramDesign, Parameters, accumulation_dtype


class Vector(NamedTuple):
    """A vector and what it becomes in inner products: ⟨U, V⟩ = u.value · v.dual, column by column."""

    value: Tensor
    dual: Tensor

    def plus(self, factor: Tensor, other: Vector) -> Vector:
        """``self + factor · other``, without a product."""
        value = torch.addcmul(self.value, factor, other.value)
        return Vector(value, value if self.dual is self.value else torch.addcmul(self.dual, factor, other.dual))


def dot(u: Tensor, v: Tensor) -> Tensor:
    """Inner products of columns, ``[g, o, n]`` twice to ``[g, o, 1]``."""
    return (u * v).sum(-1, keepdim=True)


class System(abc.ABC):
    """(AᵀA + βI) D = AᵀG in one form. Columns (output units or channels) do not mix."""

    separable: ClassVar[bool] = True
    """Whether ``vector``, ``image`` and the rest accept some of the columns, too."""
    residual: Tensor
    """The right-hand side in this form: the residual of D = 0, ``[g, o, n]``."""
    matrix: Tensor | None = None
    """What the form holds of AᵀA or AAᵀ, ``[g, n, n]`` or a diagonal ``[g, 1, n]``, once it has made it."""
    failed: Tensor | None = None
    """Which groups' factorisation failed, ``[g]``, once there was one."""

    def __init__(self, design: Design, beta: float) -> None:
        self.design = design
        self.beta = min(beta, torch.finfo(design.dtype).max)

    def vector(self, value: Tensor) -> Vector:
        """``value`` with its dual."""
        return Vector(value, value)

    @abc.abstractmethod
    def image(self, p: Vector) -> Tensor:
        """The product with A or with AᵀA + βI that the next two methods need."""

    @abc.abstractmethod
    def curvature(self, p: Vector, image: Tensor) -> Tensor:
        """⟨P, (AᵀA + βI) P⟩ of every column, ``[g, o, 1]``."""

    @abc.abstractmethod
    def product(self, p: Vector, image: Tensor) -> Tensor:
        """(AᵀA + βI) P as a value of this form."""

    @abc.abstractmethod
    def parameters(self, value: Tensor) -> Parameters:
        """What ``value`` stands for, shaped like the layer's parameters."""


class GramSystem(System):
    """A form whose vectors know their product with AᵀA."""

    design: GramDesign

    @abc.abstractmethod
    def gram_times(self, p: Vector) -> Tensor:
        """AᵀA P as a value of this form."""

    def image(self, p: Vector) -> Tensor:
        return torch.add(self.gram_times(p), p.value, alpha=self.beta)

    def curvature(self, p: Vector, image: Tensor) -> Tensor:
        return dot(p.dual, image)

    def product(self, p: Vector, image: Tensor) -> Tensor:
        return image


class DirectSystem(GramSystem):
    """A form whose matrix can be formed, and factorised."""

    def solve(self) -> Parameters:
        """D by Cholesky factorisation, in the accumulation precision.

        AᵀA + βI is positive definite, as β > 0. Where rounding takes that away (τ beyond what the precision resolves,
        or inputs that are not finite) the factor is replaced, without an exception or a device synchronisation, by
        the root of trace(AᵀA) + β: the step is then explicit, and short enough to be safe for any spectrum.
        """
        matrix = self.matrix = self._matrix()
        shift = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        factor, info = torch.linalg.cholesky_ex(torch.add(matrix, shift, alpha=self.beta))
        self.failed = info != 0
        factor = torch.where(~self.failed[:, None, None], factor, (trace + self.beta).sqrt() * shift)
        return self.parameters(self._solution(factor))

    @abc.abstractmethod
    def _matrix(self) -> Tensor:
        """AᵀA or AAᵀ in the accumulation precision, ``[g, n, n]``."""

    @abc.abstractmethod
    def _solution(self, factor: Tensor) -> Tensor:
        """The solution, given the lower Cholesky factor of ``matrix + βI``."""


class ParameterSystem(System):
    """A form whose vectors are parameters.

    With ``start``, the layer's parameters θ, the step is computed as the paper's published code computes it, by solving
    for the new parameters in the working precision: AᵀG is the difference of (AᵀA + βI) θ and Aᵀ(Aθ − G) + βθ, and D
    that of θ and the solution. Exactly, nothing is changed by that; in float32 most digits of a small step are.
    """

    def __init__(self, design: Design, beta: float, start: Parameters | None) -> None:
        super().__init__(design, beta)
        self._start = None if start is None else design.stack(start).to(design.dtype)  # [g, o, d]

    def _right_hand_side(self, gradient: Tensor) -> Tensor:
        """AᵀG."""
        if self._start is None:
            return self._adjoint(gradient)
        output, shift = self.design.apply(self.design.unstack(self._start)), self.beta * self._start
        return (self._adjoint(output) + shift) - (self._adjoint(output - self.design.as_applied(gradient)) + shift)

    def _adjoint(self, output: Tensor) -> Tensor:
        if self._start is None:
            return self.design.right_hand_side(output)
        return self.design.stack(self.design.adjoint(output))

    def parameters(self, value: Tensor) -> Parameters:
        if self._start is not None:
            value = self._start - (self._start - value.to(self._start.dtype))
        return self.design.unstack(value)


class Primal(ParameterSystem, DirectSystem):
    """d×d: everything runs in the accumulation precision, which is cheap where d is small."""

    def __init__(self, design: GramDesign, gradient: Tensor, beta: float, start: Parameters | None = None) -> None:
        super().__init__(design, beta, start)
        self.matrix: Tensor = design.gram()  # [g, d, d]
        self.residual = self._right_hand_side(gradient).to(self.matrix.dtype)  # [g, o, d]

    def gram_times(self, p: Vector) -> Tensor:
        return p.value @ self.matrix

    def _matrix(self) -> Tensor:
        return self.matrix

    def _solution(self, factor: Tensor) -> Tensor:
        return torch.cholesky_solve(self.residual.mT, factor).mT


class Diagonal(Primal):
    """The primal form where AᵀA is diagonal: ``matrix`` is ``[g, 1, d]``, and all is element by element."""

    def gram_times(self, p: Vector) -> Tensor:
        return p.value * self.matrix

    def solve(self) -> Parameters:
        """D by a division, which cannot fail: AᵀA has no negative entries, and β > 0."""
        smallest = torch.finfo(self.matrix.dtype).tiny
        return self.parameters(self.residual / (self.matrix + self.beta).clamp(min=smallest))


class Dual(DirectSystem):
    """m×m: D = AᵀC with (AAᵀ + βI) C = G; the product with Aᵀ replaces back-propagation's own.

    Iterations and the product with the inverse run in the working precision.
    """

    def __init__(self, design: GramDesign, gradient: Tensor, beta: float) -> None:
        super().__init__(design, beta)
        self.residual = design.to_rows(gradient).contiguous()  # [g, o, m], a column after the other

    def vector(self, value: Tensor) -> Vector:
        if self.matrix is None:
            self.matrix = self.design.kernel(self.residual.dtype)
        return Vector(value, value @ self.matrix)

    def gram_times(self, p: Vector) -> Tensor:
        return p.dual

    def parameters(self, value: Tensor) -> Parameters:
        return self.design.adjoint(self.design.from_rows(value))

    def _matrix(self) -> Tensor:
        return self.design.kernel(accumulation_dtype(self.residual))

    def _solution(self, factor: Tensor) -> Tensor:
        return self.residual @ torch.cholesky_inverse(factor).to(self.residual.dtype)


class Spectral(GramSystem):
    """The dual form in the basis of AAᵀ's eigenvectors, U: iterations are element by element.

    The eigendecomposition (in the accumulation precision) costs about as much as a few products with AAᵀ.
    """

    def __init__(self, design: GramDesign, gradient: Tensor, beta: float) -> None:
        super().__init__(design, beta)
        output = design.to_rows(gradient)
        kernel = design.kernel(output.dtype).to(accumulation_dtype(output))
        # Input that is not finite must give directions that are not, without an exception.
        finite = kernel.isfinite().all()
        eigenvalues, vectors = torch.linalg.eigh(torch.where(finite, kernel, 0.0))
        eigenvalues = torch.where(finite, eigenvalues.clamp(min=0), torch.nan)  # less than 0 by rounding alone
        self._eigenvalues = eigenvalues[:, None].to(output.dtype)  # [g, 1, m]
        self.matrix: Tensor = vectors.to(output.dtype)  # [g, m, m], the eigenvectors
        self.residual = output @ self.matrix  # [g, o, m]

    def vector(self, value: Tensor) -> Vector:
        return Vector(value, value * self._eigenvalues)

    def gram_times(self, p: Vector) -> Tensor:
        return p.dual

    def parameters(self, value: Tensor) -> Parameters:
        return self.design.adjoint(self.design.from_rows(value @ self.matrix.mT))


class Bordered(ParameterSystem, GramSystem):
    """m×m, for a right-hand side R outside the range of Aᵀ, as rounding leaves it: (c, s) stands for Aᵀc + s·R."""

    separable = False

    def __init__(self, design: GramDesign, gradient: Tensor, beta: float, start: Parameters | None = None) -> None:
        super().__init__(design, beta, start)
        right = self._right_hand_side(gradient)  # [g, o, d]
        scale = right.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(right.dtype).tiny)  # [g, o, 1]
        self._right = right / scale
        self._image = design.to_rows(design.apply(design.unstack(self._right)))  # A R, [g, o, m]
        self._squared = dot(self._right, self._right)  # [g, o, 1]
        self.matrix: Tensor = design.kernel(right.dtype)  # [g, m, m]
        self.residual = torch.cat([torch.zeros_like(self._image), scale], -1)  # [g, o, m + 1]

    def vector(self, value: Tensor) -> Vector:
        c, s = value[..., :-1], value[..., -1:]
        inner = torch.addcmul(dot(c, self._image), s, self._squared)
        return Vector(value, torch.cat([torch.addcmul(c @ self.matrix, s, self._image), inner], -1))

    def gram_times(self, p: Vector) -> Tensor:
        return torch.nn.functional.pad(p.dual[..., :-1], (0, 1))

    def parameters(self, value: Tensor) -> Parameters:
        stacked = self._adjoint(self.design.from_rows(value[..., :-1]))
        return super().parameters(torch.addcmul(stacked, value[..., -1:], self._right))


class MatrixFree(ParameterSystem):
    """No Gram matrix: one product with A and one with Aᵀ an iteration."""

    separable = False

    def __init__(self, design: Design, gradient: Tensor, beta: float, start: Parameters | None = None) -> None:
        super().__init__(design, beta, start)
        self.residual = self._right_hand_side(gradient).to(design.dtype)  # [g, o, d]

    def image(self, p: Vector) -> Tensor:
        return self.design.apply(self.design.unstack(p.value))

    def curvature(self, p: Vector, image: Tensor) -> Tensor:
        return self.design.squared_norms(image) + self.beta * dot(p.value, p.dual)

    def product(self, p: Vector, image: Tensor) -> Tensor:
        return torch.add(self._adjoint(image).to(image.dtype), p.value, alpha=self.beta)


class Deferred(ParameterSystem):
    """A form of the system of several passes, whose right-hand side AᵀG is given, stacked, in place of G."""

    def _right_hand_side(self, gradient: Tensor) -> Tensor:
        return gradient


class DeferredPrimal(Deferred, Primal):
    """The primal form, where AᵀA is held."""


class DeferredDiagonal(Deferred, Diagonal):
    """The diagonal form, where that of AᵀA is held."""


class DeferredBordered(Deferred, Bordered, DirectSystem):
    """The bordered form, where A is held: the given right-hand side need not be in the range of Aᵀ."""

    design: CollectedDesign

    def _matrix(self) -> Tensor:
        return self.matrix

    def _solution(self, factor: Tensor) -> Tensor:
        """(c, s) of (R - Aᵀ(AAᵀ + βI)⁻¹A R)/β, or the explicit step of ``DirectSystem``.

        That one is also taken where rounding takes β away, and the factorisation does not tell (for independent rows).
        """
        assert self.failed is not None
        trace = self.matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        self.failed = self.failed | (torch.finfo(trace.dtype).eps * trace > self.beta).flatten()
        scale, failed = self.residual[..., -1:], self.failed[:, None, None]
        s = scale / torch.where(failed, trace + self.beta, self.beta)
        c = torch.cholesky_solve(self._image.mT, factor).mT.masked_fill(failed, 0)
        return torch.cat([-s * c, s], -1)


def deferred_system(design: CollectedDesign, right: Tensor, beta: float) -> DirectSystem:
    """The system of what is held: ``right`` is AᵀG, ``[g, o, d]``; the solve is in its precision."""
    if design.diagonal:
        return DeferredDiagonal(design, right, beta)
    return (DeferredBordered if design.holds_rows else DeferredPrimal)(design, right, beta)
