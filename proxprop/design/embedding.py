"""The design matrix of an embedding: each row of A has a one at its token."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from proxprop.design.base import MatrixDesign, Parameters, as_rows, transposed


class EmbeddingDesign(MatrixDesign):
    """A of shape [m, V] for m tokens out of V, with o = E outputs: AᵀA has the counts of the tokens on its diagonal.

    A token that does not occur has a column of zeros, and no direction. So where there are fewer rows than tokens, a
    stacked vector is ``[1, E, m]``: one of the rows with a token stands for it, and the others are zero.

    Args:
        tokens: The layer's input, integers ``[*]``.
        weight_shape: ``(E, V)``, of the weight in its layout.
        trained: Whether the weight is trained; there is no bias.
        dtype: Precision in which to work.
        padding: A token whose rows are zero rows of A, as PyTorch gives it no gradient. None for none.
        mask: Which rows count, ``[*]`` in one dimension; the others are no rows of A. None for all.
    """

    diagonal = True

    def __init__(
        self,
        tokens: Tensor,
        weight_shape: Sequence[int],
        trained: Sequence[bool],
        dtype: torch.dtype,
        padding: int | None = None,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__(tokens, weight_shape, groups=1, trained=trained, shared=None, layout=transposed, mask=mask)
        self.dtype = dtype
        self.input = self._unmasked(tokens.reshape(-1)).long()  # [m]
        self.rows = self.input.shape[0]
        self._live = None if padding is None else self.input != padding
        self._slots: Tensor | None = None
        if self.rows < self.columns:
            numbers = torch.arange(self.rows, device=self.device)
            last = self.input.new_zeros(self.columns).scatter_reduce_(0, self.input, numbers, "amax")
            self._slots = last[self.input]  # for each row, the last one with its token
            self._stands = self._slots == numbers

    def of_outputs(self, outputs: Sequence[int], dtype: torch.dtype) -> EmbeddingDesign:
        part = copy.copy(self)
        part.dtype, part.outputs = dtype, len(outputs)
        part.weight_shape = (part.outputs, self.columns)
        return part

    def stack(self, parameters: Parameters) -> Tensor:
        if self._slots is None:
            return super().stack(parameters)
        weight = parameters[0]
        assert weight is not None
        return torch.where(self._stands, weight[self.input].T, 0)[None]

    def unstack(self, stacked: Tensor) -> Parameters:
        if self._slots is None:
            return super().unstack(stacked)
        weight = stacked.new_zeros(self.columns, self.outputs).index_add_(0, self.input, stacked[0].T)
        return weight, None

    def apply(self, parameters: Parameters) -> Tensor:
        weight = parameters[0]
        assert weight is not None
        return self._live_rows(weight[self.input])  # [m, E]

    def _live_rows(self, output: Tensor) -> Tensor:
        return output if self._live is None else torch.where(self._live[:, None], output, 0)

    def _batched(self, output: Tensor) -> Tensor:
        rows = as_rows(output)
        return self._live_rows(rows if rows.shape[0] == self.rows else self._unmasked(rows))

    def _products(self, input: Tensor, output: Tensor) -> Parameters:
        return self._sums(output, input, self.columns), None

    def _sums(self, output: Tensor, places: Tensor, count: int) -> Tensor:
        """The rows of ``output`` summed by their places, ``[count, E]``, as the plain layer does it."""
        sums: Tensor = torch.ops.aten.embedding_dense_backward(output, places, count, -1, False)
        return sums

    def right_hand_side(self, output: Tensor, precise: bool = True) -> Tensor:
        # In the working precision: divided by counts, errors do not grow.
        if self._slots is None:
            return self.stack(self.adjoint(output))
        return self._sums(self._batched(output), self._slots, self.rows).T[None].contiguous()

    def gram(self, dtype: torch.dtype | None = None, precise: bool = False) -> Tensor:
        """The counts, stacked, in the working precision."""
        return self.counts() if self._slots is None else self._counts(self._slots, self.rows)

    def counts(self) -> Tensor:
        """How often each token occurs, ``[1, 1, V]``, in the working precision."""
        return self._counts(self.input, self.columns)

    def _counts(self, places: Tensor, count: int) -> Tensor:
        ones = self._live_rows(torch.ones(self.rows, 1, dtype=self.dtype, device=self.device))[:, 0]
        return ones.new_zeros(count).index_add_(0, places, ones)[None, None]

    def trace(self) -> Tensor:
        return self.counts().sum()

    def squared_norms(self, output: Tensor) -> Tensor:
        return output.square().sum(0).reshape(1, self.outputs, 1)

    def to_rows(self, output: Tensor) -> Tensor:
        return self._batched(output).T[None]

    def from_rows(self, rows: Tensor) -> Tensor:
        return rows[0].T

    def matrix(self) -> Tensor:
        one_hot = torch.nn.functional.one_hot(self.input, self.columns)
        return self._live_rows(one_hot.to(self.dtype))[None]

    def _gram(self, dtype: torch.dtype, precise: bool) -> Tensor:
        return self.gram()

    def _kernel(self, dtype: torch.dtype) -> Tensor:
        same = (self.input[:, None] == self.input).to(dtype)
        return self._live_rows(same)[None]

    @property
    def gram_cost(self) -> float:
        return self.rows

    precise_gram = False

    @property
    def kernel_cost(self) -> float:
        return self.rows**2

    @property
    def product_cost(self) -> float:
        return self.rows * self.outputs

    @property
    def _reading(self) -> tuple[Hashable, ...]:
        return ()
