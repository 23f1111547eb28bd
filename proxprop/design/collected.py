"""The design matrices of several passes of one layer, one below the other: what a deferred step is taken on."""

from __future__ import annotations

import torch
from torch import Tensor

from proxprop.design.base import GramDesign, MatrixDesign, Parameters, accumulation_dtype
from proxprop.design.embedding import EmbeddingDesign


class CollectedDesign(GramDesign):
    """A of all passes together. It holds A itself or, where that has more rows than columns, AᵀA alone.

    An output is a matrix ``[g, o, m]``. There is a column for each parameter of an output, in their order, whatever
    the order and the choice that suited each pass.

    Args:
        like: The design matrix of a first pass, which is not taken yet.
    """

    def __init__(self, like: MatrixDesign) -> None:
        super().__init__(like.full_shape, like.groups, like.trained, like.dtype, like.device, like.layout)
        self.rows, self.clustered = 0, like.clustered
        self._matrix: Tensor | None = torch.zeros(self.groups, 0, self.columns, dtype=self.dtype, device=self.device)
        self._gram: Tensor | None = None
        self.factor: tuple[float, Tensor, Tensor] | None = None
        """β, the Cholesky factor of AᵀA + βI and where that failed, once there is one, for steps to come."""

    @property
    def holds_rows(self) -> bool:
        """Whether A is held, and not AᵀA."""
        return self._matrix is not None

    def add(self, design: MatrixDesign) -> None:
        """Take the rows of one more pass. Its input may change thereafter."""
        self.rows += design.rows
        places = design.places()
        if self._matrix is not None and self.rows <= self.columns:
            matrix = design.matrix()
            if places is not None:
                matrix = matrix.new_zeros(*matrix.shape[:2], self.columns).index_copy_(2, places, matrix)
            self._matrix = torch.cat([self._matrix, matrix], dim=1)
            return
        gram = design.gram(precise=True)  # nobody can look at the solution with A
        if places is not None:
            rows = gram.new_zeros(gram.shape[0], self.columns, gram.shape[2]).index_copy_(1, places, gram)
            gram = gram.new_zeros(gram.shape[0], self.columns, self.columns).index_copy_(2, places, rows)
        # A new tensor: other layers may have a share in the design's Gram matrix.
        self._gram = self.gram() + gram
        self._matrix = None

    def set_rows(self, matrix: Tensor) -> None:
        """Have A = ``matrix``, ``[g, m, d]``."""
        self.rows, self._matrix, self._gram = matrix.shape[1], matrix, None

    def set_gram(self, gram: Tensor, rows: int) -> None:
        """Have AᵀA = ``gram``, ``[g, d, d]``, of so many rows."""
        self.factor = None
        self.rows, self._matrix, self._gram = rows, None, gram

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """A, ``[g, m, d]``, where it is held."""
        assert self._matrix is not None
        return self._matrix.to(dtype)

    def gram(self, dtype: torch.dtype | None = None, precise: bool = False) -> Tensor:
        if self._gram is not None:
            return self._gram
        assert self._matrix is not None
        matrix = self.matrix(accumulation_dtype(self._matrix))
        return matrix.mT @ matrix

    @property
    def product_cost(self) -> float:
        return self.groups * self.rows * self.columns * self.outputs

    def kernel(self, dtype: torch.dtype) -> Tensor:
        matrix = self.matrix(dtype)
        return matrix @ matrix.mT

    def apply(self, parameters: Parameters) -> Tensor:
        stacked = self.stack(parameters)
        return stacked @ self.matrix(stacked.dtype).mT

    def adjoint(self, output: Tensor) -> Parameters:
        return self.unstack(output @ self.matrix(output.dtype))

    def to_rows(self, output: Tensor) -> Tensor:
        return output

    def from_rows(self, rows: Tensor) -> Tensor:
        return rows

    def squared_norms(self, output: Tensor) -> Tensor:
        return output.square().sum(-1, keepdim=True)


class CollectedEmbedding(CollectedDesign):
    """The same of an embedding, whose AᵀA is the counts of all tokens and is held in place of A at all times."""

    diagonal = True

    def __init__(self, like: EmbeddingDesign) -> None:
        super().__init__(like)
        self.set_gram(torch.zeros(1, 1, self.columns, dtype=self.dtype, device=self.device), 0)

    def add(self, design: MatrixDesign) -> None:
        assert isinstance(design, EmbeddingDesign)
        self.set_gram(self.gram() + design.counts(), self.rows + design.rows)
