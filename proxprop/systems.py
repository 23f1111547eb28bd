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
import copy
import functools
import math
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from proxprop.cost import cost_model
from proxprop.design import CollectedDesign, Design, GramDesign, MatrixDesign, Parameters, accumulation_dtype

ALL = slice(None)
"""Of each group, all outputs."""


def blocks(vectors_of: Tensor, vectors: int) -> Iterator[slice]:
    """Parts of the outputs of ``[g, o, n]``, such that so many ``vectors`` of each fit the working set together."""
    groups, outputs, n = vectors_of.shape
    bytes_each = vectors * groups * n * vectors_of.element_size()
    size = -(-outputs // -(-outputs * bytes_each // cost_model(vectors_of.device).working_set))
    return (slice(first, min(first + size, outputs)) for first in range(0, outputs, size))


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


ACCURATE, REFINABLE = 2.5e-4, 3e-2
"""Which relative error a direction may have, and which one a refinement brings there (it about squares it)."""

REFINEMENTS = 2
"""Of a factorisation in the working precision, at most. Each costs two products with A."""

PROBES = 4
"""How many sums of outputs tell the error."""

MANY_ROWS = 8
"""How many times the columns of A."""

LARGE = 1e8
"""From how many multiply-adds on float64 products for a right-hand side are worth avoiding."""

BLOCK = 192
"""Of a factorisation, which from four of them on is faster in blocks than LAPACK's own, on a CPU."""


def large(design: Design) -> bool:
    """Whether float64 products for a right-hand side, which are more accurate, cost too much."""
    if not isinstance(design, GramDesign) or design.dtype == torch.float64:
        return False
    return design.precise_right * design.product_cost > LARGE


def factorised(matrix: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The lower Cholesky factor of ``matrix + βI``, ``[g, n, n]``, and what is not 0 where there is none, ``[g]``.

    What is above the diagonal means nothing.
    """
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    kept = diagonal.clone()
    diagonal.add_(beta)  # a sum would be one more matrix to hold
    factor, info = cholesky(matrix)
    diagonal.copy_(kept)
    return factor, info


def cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.cholesky_ex`` of ``[g, n, n]`` with large products: on a CPU, column by column of blocks.

    The lower triangle alone is read, of the result as of ``matrix``.
    """
    n = matrix.shape[-1]
    if n < 4 * BLOCK or matrix.device.type != "cpu":
        factor, info = torch.linalg.cholesky_ex(matrix)
        return factor, info
    factor = torch.empty_like(matrix)
    failed = torch.zeros(factor.shape[0], dtype=torch.int32, device=factor.device)
    for begin in range(0, n, BLOCK):
        end = begin + BLOCK
        for one, given in zip(factor, matrix, strict=True):
            left = one[begin:, :begin]
            torch.addmm(given[begin:, begin:end], left, left[:BLOCK].T, alpha=-1, out=one[begin:, begin:end])
        corner, info = torch.linalg.cholesky_ex(factor[:, begin:end, begin:end])
        factor[:, begin:end, begin:end], failed = corner, failed | info
        below = factor[:, end:, begin:end].mT  # as LAPACK has it in memory
        below.copy_(torch.linalg.solve_triangular(corner, below, upper=False))
    return factor, failed


def solved(factor: Tensor, right: Tensor) -> Tensor:
    """X with X L Lᵀ = ``right``, ``[g, o, n]``; unlike ``cholesky_solve`` without a copy of the factor."""
    half = torch.linalg.solve_triangular(factor.mT, right, upper=True, left=False)
    solution: Tensor = torch.linalg.solve_triangular(factor, half, upper=False, left=False)
    return solution


def eps(tensor: Tensor) -> float:
    """The rounding of its precision."""
    return torch.finfo(tensor.dtype).eps


def trace(matrix: Tensor) -> float:
    """The largest of ``[g, n, n]``."""
    return float(matrix.diagonal(dim1=-2, dim2=-1).sum(-1).max())


def numbers_at_hand(tensor: Tensor) -> bool:
    """Whether Python may decide by the numbers in ``tensor``: nothing has to wait for them, nor is traced."""
    is_fake = hasattr(tensor, "fake_mode")  # has a shape, and no numbers
    return tensor.device.type == "cpu" and not is_fake and not torch.compiler.is_compiling()


def _norm(parameters: Parameters) -> float:
    return math.hypot(*(float(p.double().norm()) for p in parameters if p is not None))


class System(abc.ABC):
    """(AᵀA + βI) D = AᵀG in one form. Columns (output units or channels) do not mix."""

    separable: ClassVar[bool] = True
    """Whether ``image`` and the rest accept some of the columns, too."""
    residual: Tensor
    """The right-hand side in this form: the residual of D = 0, ``[g, o, n]``."""
    matrix: Tensor | None = None
    """What the form holds of AᵀA or AAᵀ, ``[g, n, n]`` or a diagonal ``[g, 1, n]``, once it has made it."""
    rough: bool = False
    """Whether its products have the rounding of the working precision, so that a solution by iterations may, too."""
    largest: Tensor | None = None
    """A bound of AᵀA's eigenvalues, ``[g, 1, 1]``, where the form knows one."""
    failed: Tensor | None = None
    """Which groups' factorisation failed, ``[g]``, once there was one."""

    def __init__(self, design: Design, gradient: Tensor, beta: float) -> None:
        self.design, self.gradient = design, gradient
        self.beta = min(beta, torch.finfo(design.dtype).max)

    def vector(self, value: Tensor, outputs: slice = ALL) -> Vector:
        """``value`` with its dual; where it is ``separable``, also of some ``outputs`` of each group alone."""
        return Vector(value, value)

    def lost(self, value: Tensor) -> Tensor | float:
        """A bound of what rounding loses of D in ``parameters``, ``[g, o, 1]``."""
        return 0.0

    def noise(self, v: Vector) -> Tensor | None:
        """What rounding may make of ⟨V, V⟩ in every column, ``[g, o, 1]``, where V stands for nothing; None for 0."""
        return None

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

    @functools.cached_property
    def largest(self) -> Tensor:  # type: ignore[override]
        assert self.matrix is not None
        largest = self.matrix.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(self.matrix.dtype).tiny)
        size: Tensor = torch.linalg.matrix_norm(self.matrix / largest, keepdim=True)  # its square could overflow
        return largest * size

    @abc.abstractmethod
    def gram_times(self, p: Vector) -> Tensor:
        """AᵀA P as a value of this form."""

    def image(self, p: Vector) -> Tensor:
        return torch.add(self.gram_times(p), p.value, alpha=self.beta)

    def curvature(self, p: Vector, image: Tensor) -> Tensor:
        return dot(p.dual, image)

    def product(self, p: Vector, image: Tensor) -> Tensor:
        return image


class RowSystem(GramSystem):
    """A form whose vectors have an entry for each row of A, D = AᵀC; all of it is in the working precision."""

    rough = True

    def lost(self, value: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(value, dim=-1, keepdim=True)
        return self.largest.sqrt() * length * eps(value)


class DirectSystem(GramSystem):
    """A form whose matrix can be formed, and factorised.

    With ``single``, that is tried in the working precision first, with residuals taken from A itself.
    """

    single: bool = False
    quick: bool = False
    """Whether products have the rounding of the working precision, so that a solution must be looked at."""
    blind: bool = False
    """Whether a loss of digits could not be seen."""

    def solve(self) -> Parameters:
        """D by Cholesky factorisation, in the accumulation precision.

        AᵀA + βI is positive definite, as β > 0. Where rounding takes that away (τ beyond what the precision resolves,
        or inputs that are not finite) the factor is replaced, without an exception or a device synchronisation, by
        the root of trace(AᵀA) + β: the step is then explicit, and short enough to be safe for any spectrum.
        """
        if self.single and (value := self._refined()) is not None and self._keeps_digits(value):
            return self.parameters(value)
        precision = accumulation_dtype(self.gradient)
        factor = self._factor(self._matrix(precision, precise=False))
        if self.blind:
            return self._precise(factor)
        if self.quick:
            # A solve costs nothing beside the products of many rows, which alone decide its accuracy then.
            is_small = self.design.rows > MANY_ROWS * self.design.columns
            value = self._accurate(factor if is_small else factor.to(self.design.dtype))
        else:
            value = self._solution(factor, self.residual)
        if value is not None and self._keeps_digits(value):
            return self.parameters(value)
        if self.quick and self.design.rough_gram:
            factor = self._factor(self._matrix(precision, precise=True))
        return self._precise(factor)

    def _factor(self, matrix: Tensor) -> Tensor:
        """The lower Cholesky factor of ``matrix + βI``, or of a multiple of the identity where it has none."""
        self.matrix = matrix
        factor, info = factorised(matrix, self.beta)
        self.failed = info != 0
        if numbers_at_hand(info) and not bool(self.failed.any()):
            return factor
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        explicit = (matrix.diagonal(dim1=-2, dim2=-1).sum(-1) + self.beta).sqrt()[:, None, None] * identity
        return torch.where(self.failed[:, None, None], explicit, factor)

    def _refined(self) -> Tensor | None:
        """The solution by a factorisation in the working precision; None where it stays inaccurate."""
        matrix = self._matrix(self.design.dtype, precise=False)
        if not trace(matrix) * eps(matrix) < self.beta:
            return None  # rounding hides β
        factor, info = factorised(matrix, self.beta)
        value = None if bool(info.any()) else self._accurate(factor)
        if value is not None:
            self.matrix, self.failed = matrix, info != 0
        return value

    def _accurate(self, factor: Tensor) -> Tensor | None:
        """The solution, iteratively refined with residuals from A itself; None where that does not do.

        Its error is known from a few random sums of outputs, whose residuals cost little.
        """
        value = self._solution(factor, self.residual.to(factor.dtype))
        weights = self._weights().to(value)
        probe = self._of_outputs(weights)
        refinable = self.single or self.design.rough_gram
        # Else the right-hand side alone has rounding, and that of the residual is as much.
        accurate = ACCURATE if refinable else 4 * ACCURATE
        for refinements_left in reversed(range(REFINEMENTS + 1 if refinable else 1)):
            sums = weights @ value
            size, missing = _norm(probe.parameters(sums)), _norm(probe.parameters(probe._correction(factor, sums)))
            if missing < accurate * size:
                return value
            if not refinements_left or not missing < REFINABLE * size:
                break
            value = value + self._correction(factor, value)
        return None

    def _correction(self, factor: Tensor, value: Tensor) -> Tensor:
        """What is missing to the solution, by its residual."""
        output = self.design.apply(tuple(p if p is None else p.to(self.design.dtype) for p in self.parameters(value)))
        right = self._right(self.design.as_applied(self.gradient) - output, value.dtype, precise=False)
        return self._solution(factor, torch.add(right, value, alpha=-self.beta))

    def _weights(self) -> Tensor:
        """Those of a few random sums of outputs, ``[sums, o]``, always the same."""
        generator = torch.Generator("cpu").manual_seed(0)
        return torch.randn(PROBES, self.design.outputs, generator=generator, device="cpu")

    def _of_outputs(self, weights: Tensor) -> DirectSystem:
        """The system of weighted sums of outputs, ``weights`` being ``[sums, o]``."""
        part = copy.copy(self)
        assert isinstance(self.design, MatrixDesign)
        part.design = self.design.of_outputs(range(len(weights)), self.design.dtype)
        part.gradient = self.design.sums(weights.to(self.gradient), self.gradient)
        return part

    def _keeps_digits(self, value: Tensor) -> bool:
        """Whether what ``value`` stands for is found without a loss of digits."""
        return True

    def _precise(self, factor: Tensor) -> Parameters:
        """D in the accumulation precision, that of the ``factor``."""
        return self.parameters(self._solution(factor, self._right(self.gradient, factor.dtype, precise=True)))

    @abc.abstractmethod
    def _matrix(self, dtype: torch.dtype, *, precise: bool) -> Tensor:
        """AᵀA or AAᵀ in precision ``dtype``, perhaps of ``precise`` products, ``[g, n, n]``."""

    @abc.abstractmethod
    def _right(self, output: Tensor, dtype: torch.dtype, *, precise: bool) -> Tensor:
        """The right-hand side for a gradient ``output``, ``[g, o, n]``, with or without ``precise`` products."""

    @abc.abstractmethod
    def _solution(self, factor: Tensor, right: Tensor) -> Tensor:
        """The solution for a right-hand side, given the lower Cholesky factor of ``matrix + βI``."""


class ParameterSystem(System):
    """A form whose vectors are parameters.

    With ``start``, the layer's parameters θ, the step is computed as the paper's published code computes it, by solving
    for the new parameters in the working precision: AᵀG is the difference of (AᵀA + βI) θ and Aᵀ(Aθ − G) + βθ, and D
    that of θ and the solution. Exactly, nothing is changed by that; in float32 most digits of a small step are.
    """

    def __init__(self, design: Design, gradient: Tensor, beta: float, start: Parameters | None) -> None:
        super().__init__(design, gradient, beta)
        self._start = None if start is None else design.stack(start).to(design.dtype)  # [g, o, d]

    def _right_hand_side(self, gradient: Tensor, precise: bool = True) -> Tensor:
        """AᵀG."""
        if self._start is None:
            return self.design.right_hand_side(gradient, precise)
        output = self.design.apply(self.design.unstack(self._start))
        right = self._adjoint(output).add_(self._start, alpha=self.beta)
        output = output - self.design.as_applied(gradient)
        return right.sub_(self._adjoint(output).add_(self._start, alpha=self.beta))

    def _adjoint(self, output: Tensor, precise: bool = True) -> Tensor:
        if self._start is None:
            return self.design.right_hand_side(output, precise)
        return self.design.stacked_adjoint(output)

    def _shifted(self, value: Tensor) -> Tensor:
        """``value`` as what it changes of θ."""
        return value if self._start is None else self._start - (self._start - value.to(self._start.dtype))

    def parameters(self, value: Tensor) -> Parameters:
        return self.design.unstack(self._shifted(value))


class Primal(ParameterSystem, DirectSystem):
    """d×d: everything runs in the accumulation precision, which is cheap where d is small, unless ``single``.

    ``precise`` asks for the most accurate Gram matrix and right-hand side, where nobody can look at the solution.
    """

    def __init__(
        self,
        design: GramDesign,
        gradient: Tensor,
        beta: float,
        start: Parameters | None = None,
        *,
        single: bool = False,
        precise: bool = False,
    ) -> None:
        super().__init__(design, gradient, beta, start)
        self.single = single
        can_look = start is None and numbers_at_hand(gradient)
        self.quick = single or (can_look and not precise and (large(design) or design.rough_gram))
        self.rough = single or (design.rough_gram and not precise)
        self.matrix: Tensor = design.gram(design.dtype if single else None, precise)  # [g, d, d]
        precise_right = precise or not (self.quick or large(design))
        self.residual = self._right(gradient, self.matrix.dtype, precise=precise_right)  # [g, o, d]

    def gram_times(self, p: Vector) -> Tensor:
        return p.value @ self.matrix

    def _matrix(self, dtype: torch.dtype, *, precise: bool) -> Tensor:
        if self.matrix.dtype == dtype and not precise:
            return self.matrix
        return self.design.gram(dtype, precise)

    def _right(self, output: Tensor, dtype: torch.dtype, *, precise: bool) -> Tensor:
        return self._right_hand_side(output, precise).to(dtype)

    def _solution(self, factor: Tensor, right: Tensor) -> Tensor:
        return solved(factor, right)


class Diagonal(Primal):
    """The primal form where AᵀA is diagonal: ``matrix`` is ``[g, 1, d]``, and all is element by element."""

    def gram_times(self, p: Vector) -> Tensor:
        return p.value * self.matrix

    def solve(self) -> Parameters:
        """D by a division, which cannot fail: AᵀA has no negative entries, and β > 0."""
        smallest = torch.finfo(self.matrix.dtype).tiny
        return self.parameters(self.residual / (self.matrix + self.beta).clamp(min=smallest))


class Dual(RowSystem, DirectSystem):
    """m×m: D = AᵀC with (AAᵀ + βI) C = G; the product with Aᵀ replaces back-propagation's own.

    Iterations and the product with the inverse run in the working precision.
    """

    design: MatrixDesign
    _amplification: float = 0.0
    """Of rounding in G, by a product with (AAᵀ + βI)⁻¹."""

    def __init__(self, design: MatrixDesign, gradient: Tensor, beta: float, *, single: bool = False) -> None:
        super().__init__(design, gradient, beta)
        self.single, self.blind = single, not numbers_at_hand(gradient)
        self.residual = self._right(gradient, gradient.dtype, precise=False)  # [g, o, m]

    def vector(self, value: Tensor, outputs: slice = ALL) -> Vector:
        if self.matrix is None:
            self.matrix = self.design.kernel(self.residual.dtype)
        return Vector(value, value @ self.matrix)

    def noise(self, v: Vector) -> Tensor:
        """Of a value in the null space of AAᵀ: its product with AAᵀ is rounding, and may be negative."""
        return eps(v.value) / self.design.rows * self.largest * dot(v.value, v.value)

    def gram_times(self, p: Vector) -> Tensor:
        return p.dual

    def parameters(self, value: Tensor) -> Parameters:
        return self.design.direction_of(self.design.from_rows(value))

    def _keeps_digits(self, value: Tensor) -> bool:
        """False where most of C stands for nothing, as that of equal rows, and its product with Aᵀ is rounding."""
        if value.dtype == accumulation_dtype(value):
            return True
        assert self.matrix is not None
        weights = self._weights().to(value)
        sums, limits = weights @ value, torch.finfo(value.dtype)
        length = max(_norm((sums,)), self._amplification * _norm((weights @ self.residual,)))
        rounding = math.sqrt(trace(self.matrix)) * (limits.eps * length + limits.tiny * math.sqrt(sums.numel()))
        part = self.design.of_outputs(range(PROBES), sums.dtype)
        return rounding < ACCURATE * _norm(part.direction_of(part.from_rows(sums)))

    def _precise(self, factor: Tensor) -> Parameters:
        design = self.design.in_precision(factor.dtype)
        return design.direction_of(design.from_rows(solved(factor, self.residual.to(factor))))

    def _matrix(self, dtype: torch.dtype, *, precise: bool) -> Tensor:
        return self.design.kernel(dtype)

    def _right(self, output: Tensor, dtype: torch.dtype, *, precise: bool) -> Tensor:
        return self.design.to_rows(output)

    def _solution(self, factor: Tensor, right: Tensor) -> Tensor:
        if self.design.outputs < self.design.rows or factor.dtype == right.dtype:
            return solved(factor, right.to(factor)).to(right)
        inverse = torch.cholesky_inverse(factor)
        self._amplification = float(inverse.norm()) / math.sqrt(inverse.shape[-1]) if numbers_at_hand(inverse) else 0.0
        return right @ inverse.to(right.dtype)


class Spectral(RowSystem):
    """The dual form in the basis of AAᵀ's eigenvectors, U: iterations are element by element.

    The eigendecomposition (in the accumulation precision) costs about as much as a few products with AAᵀ.
    """

    def __init__(self, design: GramDesign, gradient: Tensor, beta: float) -> None:
        super().__init__(design, gradient, beta)
        output = design.to_rows(gradient)
        kernel = design.kernel(output.dtype).to(accumulation_dtype(output))
        # Input that is not finite must give directions that are not, without an exception.
        finite = kernel.isfinite().all()
        eigenvalues, vectors = torch.linalg.eigh(torch.where(finite, kernel, 0.0))
        eigenvalues = torch.where(finite, eigenvalues.clamp(min=0), torch.nan)  # less than 0 by rounding alone
        self._eigenvalues = eigenvalues[:, None].to(output.dtype)  # [g, 1, m]
        self.matrix: Tensor = vectors.to(output.dtype)  # [g, m, m], the eigenvectors
        self.residual = output @ self.matrix  # [g, o, m]

    @functools.cached_property
    def largest(self) -> Tensor:  # type: ignore[override]
        return self._eigenvalues.amax(-1, keepdim=True)

    def vector(self, value: Tensor, outputs: slice = ALL) -> Vector:
        return Vector(value, value * self._eigenvalues)

    def gram_times(self, p: Vector) -> Tensor:
        return p.dual

    def parameters(self, value: Tensor) -> Parameters:
        return self.design.direction_of(self.design.from_rows(value @ self.matrix.mT))


class Bordered(ParameterSystem, GramSystem):
    """m×m, for a right-hand side R outside the range of Aᵀ, as rounding leaves it: (c, s) stands for Aᵀc + s·R."""

    def __init__(self, design: GramDesign, gradient: Tensor, beta: float, start: Parameters | None = None) -> None:
        super().__init__(design, gradient, beta, start)
        rights, images, scales, squares = [], [], [], []
        for outputs, part in self._parts():
            right = part._right_hand_side(self._of(gradient, outputs, part.design))
            scale = torch.linalg.vector_norm(right, torch.inf, -1, keepdim=True)  # [g, o, 1]
            scale = scale.clamp(min=torch.finfo(right.dtype).tiny)
            rights.append(right / scale)
            images.append(part.design.to_rows(part.design.apply(part.design.unstack(rights[-1]))))
            scales.append(scale)
            squares.append(torch.linalg.vector_norm(rights[-1], dim=-1, keepdim=True).square())
        self._rights = rights  # R over its scale, [g, o, d], of the outputs of each part
        self._image = torch.cat(images, 1)  # A R, [g, o, m]
        self._squared = torch.cat(squares, 1)  # [g, o, 1]
        self.matrix: Tensor = design.kernel(self._image.dtype)  # [g, m, m]
        self.residual = torch.cat([torch.zeros_like(self._image), torch.cat(scales, 1)], -1)  # [g, o, m + 1]

    def _parts(self) -> Iterator[tuple[slice, Bordered]]:
        """Some outputs of each group at a time, so that what is at hand stays in the cache."""
        if self._start is None or not isinstance(self.design, MatrixDesign):
            yield ALL, self
            return
        for outputs in blocks(self._start, vectors=3):
            part = copy.copy(self)
            part.design = self.design.of_outputs(range(self.design.outputs)[outputs], self.design.dtype)
            part._start = self._start[:, outputs]
            yield outputs, part

    def _of(self, gradient: Tensor, outputs: slice, part: GramDesign) -> Tensor:
        return gradient if outputs == ALL else part.from_rows(self.design.to_rows(gradient)[:, outputs])

    def vector(self, value: Tensor, outputs: slice = ALL) -> Vector:
        c, s, image = value[..., :-1], value[..., -1:], self._image[:, outputs]
        dual = torch.empty_like(value)
        torch.addcmul(c @ self.matrix, s, image, out=dual[..., :-1])
        torch.addcmul(dot(c, image), s, self._squared[:, outputs], out=dual[..., -1:])
        return Vector(value, dual)

    def gram_times(self, p: Vector) -> Tensor:
        return torch.nn.functional.pad(p.dual[..., :-1], (0, 1))

    def parameters(self, value: Tensor) -> Parameters:
        parts = []
        for right, (outputs, part) in zip(self._rights, self._parts(), strict=True):
            inside = part._adjoint(part.design.from_rows(value[:, outputs, :-1]))
            parts.append(part._shifted(torch.addcmul(inside, value[:, outputs, -1:], right)))
        return self.design.unstack(torch.cat(parts, 1))


class MatrixFree(ParameterSystem):
    """No Gram matrix: one product with A and one with Aᵀ an iteration."""

    separable = False

    def __init__(self, design: Design, gradient: Tensor, beta: float, start: Parameters | None = None) -> None:
        super().__init__(design, gradient, beta, start)
        self.rough = isinstance(design, MatrixDesign)
        self.residual = self._right_hand_side(gradient, precise=not large(design)).to(design.dtype)  # [g, o, d]

    def image(self, p: Vector) -> Tensor:
        return self.design.apply(self.design.unstack(p.value))

    def curvature(self, p: Vector, image: Tensor) -> Tensor:
        return self.design.squared_norms(image) + self.beta * dot(p.value, p.dual)

    def product(self, p: Vector, image: Tensor) -> Tensor:
        return torch.add(self._adjoint(image, precise=False).to(image.dtype), p.value, alpha=self.beta)


class Deferred(ParameterSystem):
    """A form of the system of several passes, whose right-hand side AᵀG is given, stacked, in place of G."""

    def _right_hand_side(self, gradient: Tensor, precise: bool = True) -> Tensor:
        return gradient


class DeferredPrimal(Deferred, Primal):
    """The primal form, where AᵀA is held."""

    design: CollectedDesign

    def _factor(self, matrix: Tensor) -> Tensor:
        known = self.design.factor
        if known is not None and known[0] == self.beta:
            self.failed = known[2]
            return known[1]
        factor = super()._factor(matrix)
        assert self.failed is not None
        self.design.factor = self.beta, factor, self.failed
        return factor


class DeferredDiagonal(Deferred, Diagonal):
    """The diagonal form, where that of AᵀA is held."""


class DeferredBordered(Deferred, Bordered, DirectSystem):
    """The bordered form, where A is held: the given right-hand side need not be in the range of Aᵀ."""

    design: CollectedDesign

    def __init__(self, design: CollectedDesign, gradient: Tensor, beta: float) -> None:
        super().__init__(design, gradient, beta)

    def _matrix(self, dtype: torch.dtype, *, precise: bool) -> Tensor:
        return self.matrix

    def _right(self, output: Tensor, dtype: torch.dtype, *, precise: bool) -> Tensor:
        return self.residual

    def _solution(self, factor: Tensor, right: Tensor) -> Tensor:
        """(c, s) of (R - Aᵀ(AAᵀ + βI)⁻¹A R)/β, or the explicit step of ``DirectSystem``.

        That one is also taken where rounding takes β away, and the factorisation does not tell (for independent rows).
        """
        assert self.failed is not None
        trace = self.matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        self.failed = self.failed | (torch.finfo(trace.dtype).eps * trace > self.beta).flatten()
        scale, failed = right[..., -1:], self.failed[:, None, None]
        s = scale / torch.where(failed, trace + self.beta, self.beta)
        c = solved(factor, self._image).masked_fill(failed, 0)
        return torch.cat([-s * c, s], -1)


def deferred_system(design: CollectedDesign, right: Tensor, beta: float) -> DirectSystem:
    """The system of what is held: ``right`` is AᵀG, ``[g, o, d]``; the solve is in its precision."""
    if design.diagonal:
        return DeferredDiagonal(design, right, beta)
    return (DeferredBordered if design.holds_rows else DeferredPrimal)(design, right, beta)
