"""The design matrix of a fully connected layer, A = [a 1] (algorithm: paper, Section 3)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from proxprop.design.base import (
    ROWS_IN_WORKING_PRECISION,
    SYMMETRIC,
    Layout,
    MatrixDesign,
    Parameters,
    accumulation_dtype,
    as_it_is,
    as_rows,
    symmetric_product,
)
from proxprop.design.shared import SharedProducts


class LinearDesign(MatrixDesign):
    """A = [a 1] for inputs ``a`` of shape ``[*, in]``: leading dimensions are rows, m = their product.

    Args:
        input: The layer's input, ``[*, in]``.
        weight_shape: ``(out, in)``.
        trained: Whether the weight and whether the bias is trained.
        shared: What layers with the same input have computed of it.
        sparse: Whether the input is a sparse tensor, of which the products take all entries.
        mask: Which rows count, ``[*]`` in one dimension; the others are no rows of A. None for all.
        layout: How the weight comes to ``weight_shape``.
    """

    precise_right = 1.0
    by_matrices = True

    def __init__(
        self,
        input: Tensor,
        weight_shape: Sequence[int],
        trained: Sequence[bool],
        shared: SharedProducts | None = None,
        sparse: bool = False,
        mask: Tensor | None = None,
        layout: Layout = as_it_is,
    ) -> None:
        super().__init__(input, weight_shape, groups=1, trained=trained, shared=shared, layout=layout, mask=mask)
        if sparse:
            input = input.to_dense()
        self.input = self._unmasked(as_rows(input)).to(self.dtype)  # [m, in]
        self.rows = self.input.shape[0]

    def apply(self, parameters: Parameters) -> Tensor:
        weight, bias = parameters
        if weight is None:
            assert bias is not None
            return bias.expand(self.rows, -1)
        return torch.nn.functional.linear(self.input, self.layout(weight), bias)  # [m, out]

    def _batched(self, output: Tensor) -> Tensor:
        rows = as_rows(output)
        return rows if rows.shape[0] == self.rows else self._unmasked(rows)  # a product of ours, or the layer's output

    def _products(self, input: Tensor, output: Tensor) -> Parameters:
        weight = self.layout(output.T @ input) if self.train_weight else None
        bias = output.sum(0) if self.train_bias else None
        return weight, bias

    def _stacked_products(self, input: Tensor, output: Tensor) -> Tensor:
        stacked = output.new_empty(1, self.outputs, self.columns)  # without a copy of what is multiplied
        if self.train_weight:
            torch.mm(output.T, input, out=stacked[0, :, : self.weight_columns])
        if self.train_bias:
            torch.sum(output, 0, out=stacked[0, :, -1])
        return stacked

    def squared_norms(self, output: Tensor) -> Tensor:
        return output.square().sum(0).reshape(1, self.outputs, 1)

    def trace(self) -> Tensor:
        squares = self.input.to(accumulation_dtype(self.input)).square().sum() * int(self.train_weight)
        return squares + self.rows * int(self.train_bias)

    @property
    def gram_cost(self) -> float:
        return SYMMETRIC * self.rows * self.columns**2

    @property
    def precise_gram(self) -> bool:
        return True

    @property
    def kernel_cost(self) -> float:
        return SYMMETRIC * self.rows**2 * self.columns

    @property
    def product_cost(self) -> float:
        return self.rows * self.columns * self.outputs

    @property
    def _reading(self) -> tuple[Hashable, ...]:
        return self.train_weight, self.train_bias, None if self._mask is None else id(self._mask)

    def matrix(self) -> Tensor:
        return self._with_ones(self.input, self.dtype)[None]

    def _with_ones(self, input: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of A for some of the input's, in precision ``dtype``."""
        rows = input.new_empty(input.shape[0], self.columns, dtype=dtype)
        if self.train_weight:
            rows[:, : self.weight_columns] = input
        if self.train_bias:
            rows[:, -1] = 1
        return rows

    def _gram(self, dtype: torch.dtype, precise: bool) -> Tensor:
        first, *others = torch.split(self.input, ROWS_IN_WORKING_PRECISION)
        total = symmetric_product(self._with_ones(first, dtype).T)
        for input in others:
            total = total.to(accumulation_dtype(input)) + symmetric_product(self._with_ones(input, dtype).T)
        return total.to(dtype)[None]

    def _kernel(self, dtype: torch.dtype) -> Tensor:
        shape = (self.rows, self.rows)
        products = (
            symmetric_product(self.input.to(dtype)) if self.train_weight else self.input.new_zeros(shape, dtype=dtype)
        )
        return (products.add_(1) if self.train_bias else products)[None]

    def to_rows(self, output: Tensor) -> Tensor:
        return self._batched(output).T[None]

    def from_rows(self, rows: Tensor) -> Tensor:
        return rows[0].T
