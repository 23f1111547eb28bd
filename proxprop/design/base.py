"""What a solver may ask of the design matrix A of a layer that is linear in its parameters, z = A θ."""

from __future__ import annotations

import abc
import copy
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from proxprop.design.shared import SharedProducts

Parameters = tuple[Tensor | None, ...]
"""One tensor for each parameter of the layer, in the layer's order and shapes; None where it is frozen."""


class NoProximalStep(TypeError):
    """A proximal step is not defined, or not known, for what a layer is asked to do."""


Layout = Callable[[Tensor], Tensor]
"""Takes a layer's weight to one with a row for each output, ``[o, *]``, and such a one back: its own inverse."""


def as_rows(tensor: Tensor) -> Tensor:
    """``[*, n]`` to ``[m, n]``, for n = 0, too."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def as_it_is(weight: Tensor) -> Tensor:
    """The layout of weights that have a row for each output, as those of ``Linear`` and convolutions."""
    return weight


def transposed(weight: Tensor) -> Tensor:
    """The layout of weights ``[in, out]``."""
    return weight.T


ROWS_IN_WORKING_PRECISION = 8192
"""How many terms a float32 sum may have where a solve depends on it (8192 leave an error of about 3e-7)."""


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The precision in which a solve handles ``tensor``: its own, float32 at the least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """The precision of Gram matrices: float64, because their condition numbers use up float32.

    Devices without float64 (Apple's MPS) get float32.
    """
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def symmetric_product(matrix: Tensor, blocks: int = 8) -> Tensor:
    """``matrix @ matrix.mT`` for ``[m, n]``, on a CPU computing little more than half of it.

    On a GPU it is one operation: each takes as long as many multiply-adds.
    """
    m = matrix.shape[0]
    size = max(64, -(-m // blocks))
    if 2 * size > m or matrix.device.type != "cpu":
        return matrix @ matrix.T
    product = matrix.new_empty(m, m)
    for start in range(0, m, size):
        end = start + size
        torch.mm(matrix[start:end], matrix[:end].T, out=product[start:end, :end])
        product[:start, start:end] = product[start:end, :start].T  # while it is in the cache
    return product


SYMMETRIC = 0.6
"""What ``symmetric_product`` computes of a product."""


class Design(abc.ABC):
    """The design matrix A of one layer at one input, block-diagonal over groups.

    Index conventions, here and in every solver:

    * ``g`` groups (1 for all but grouped convolutions),
    * ``m`` rows of A: batch elements, times output positions for a convolution,
    * ``d`` columns of A in a group: the trained parameters of one output,
    * ``o`` outputs (units or channels) in a group.

    Matrices have a row for each output, as PyTorch's weights have: *stacked* parameters are ``[g, o, d]``, outputs of
    the layer are ``[g, o, m]`` (``to_rows``). So θ and z of the paper stand transposed.
    """

    groups: int
    rows: int
    """Of a layer of known structure alone."""
    columns: int
    outputs: int
    device: torch.device
    dtype: torch.dtype
    clustered: bool = False
    """Whether AᵀA has its largest eigenvalue, or nearly that, several times, whatever the input: blocks of one kind."""

    @abc.abstractmethod
    def apply(self, parameters: Parameters) -> Tensor:
        """A θ, shaped like the layer's output."""

    @abc.abstractmethod
    def adjoint(self, output: Tensor) -> Parameters:
        """Aᵀ z for ``output`` shaped like the layer's output."""

    @abc.abstractmethod
    def stack(self, parameters: Parameters) -> Tensor:
        """Parameters as one tensor ``[g, o, d]``."""

    @abc.abstractmethod
    def unstack(self, stacked: Tensor) -> Parameters:
        """The inverse of ``stack``."""

    def as_applied(self, output: Tensor) -> Tensor:
        """``output`` of the layer, shaped as ``apply`` shapes its own."""
        return output

    def stacked_adjoint(self, output: Tensor) -> Tensor:
        """``adjoint``, stacked."""
        return self.stack(self.adjoint(output))

    def right_hand_side(self, output: Tensor, precise: bool = True) -> Tensor:
        """Aᵀ z, stacked, as accurate as a solve needs it: a solve amplifies its error by the condition of A.

        ``precise`` False says that the condition is moderate.
        """
        return self.stacked_adjoint(output)

    def direction_of(self, output: Tensor) -> Parameters:
        """Aᵀ z as the result of a solve."""
        return self.adjoint(output)

    @abc.abstractmethod
    def squared_norms(self, output: Tensor) -> Tensor:
        """‖z‖² for each output, ``[g, o, 1]``."""


class GramDesign(Design):
    """A design matrix of a weight and a bias, of which Gram matrices can be formed.

    ``weight_shape`` is that of the weight in ``layout``: a row for each output.
    """

    diagonal = False
    """Whether AᵀA is diagonal, and ``gram`` its diagonal alone, ``[g, 1, d]``."""
    precise_right: ClassVar[float] = 0.0
    """What a precise right-hand side costs more than one that is not, in products with A on a CPU."""

    def __init__(
        self,
        weight_shape: Sequence[int],
        groups: int,
        trained: Sequence[bool],
        dtype: torch.dtype,
        device: torch.device,
        layout: Layout = as_it_is,
    ) -> None:
        self.device, self.dtype, self.layout = device, dtype, layout
        self.weight_shape = tuple(weight_shape)
        self.train_weight, self.train_bias = trained
        self.groups = groups
        self.outputs = self.weight_shape[0] // groups
        self.weight_columns = torch.Size(self.weight_shape[1:]).numel() if self.train_weight else 0
        self.columns = self.weight_columns + int(self.train_bias)

    @property
    def trained(self) -> tuple[bool, bool]:
        """Whether the weight and whether the bias is."""
        return self.train_weight, self.train_bias

    @abc.abstractmethod
    def gram(self, dtype: torch.dtype | None = None, precise: bool = False) -> Tensor:
        """AᵀA in precision ``dtype``, by default the accumulation precision, ``[g, d, d]``.

        ``precise`` asks a ``rough_gram`` for products of the accumulation precision, too.
        """

    @property
    def rough_gram(self) -> bool:
        """Whether products in the working precision decide how accurate ``gram`` is."""
        return False

    @property
    @abc.abstractmethod
    def product_cost(self) -> float:
        """What a product with A or Aᵀ costs, over all groups, in multiply-adds of a large matrix product."""

    @abc.abstractmethod
    def kernel(self, dtype: torch.dtype) -> Tensor:
        """AAᵀ in precision ``dtype``, ``[g, m, m]``."""

    @abc.abstractmethod
    def to_rows(self, output: Tensor) -> Tensor:
        """An output as a matrix ``[g, o, m]``."""

    @abc.abstractmethod
    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of ``to_rows``."""

    def stack(self, parameters: Parameters) -> Tensor:
        weight, bias = parameters
        parts = []
        if weight is not None:
            parts.append(self.layout(weight).reshape(self.groups, self.outputs, self.weight_columns))
        if bias is not None:
            parts.append(bias.reshape(self.groups, self.outputs, 1))
        return torch.cat(parts, dim=-1)

    def unstack(self, stacked: Tensor) -> Parameters:
        weight = bias = None
        if self.train_weight:
            weight = self.layout(stacked[..., : self.weight_columns].reshape(self.weight_shape))
        if self.train_bias:
            bias = stacked[..., -1].reshape(-1)
        return weight, bias


class MatrixDesign(GramDesign):
    """A design matrix of known structure, at one input."""

    input: Tensor
    """The input as the products take it, ``[N, ...]``; each of its N elements is m/N rows of A."""

    by_matrices: ClassVar[bool] = False
    """Whether its products with A and Aᵀ are products of matrices, and not the layer's own kernels."""

    def __init__(
        self,
        input: Tensor,
        weight_shape: Sequence[int],
        groups: int,
        trained: Sequence[bool],
        shared: SharedProducts | None,
        layout: Layout = as_it_is,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__(weight_shape, groups, trained, working_dtype(input), input.device, layout)
        self._saved_input = input
        self._shared = shared
        self._mask = mask

    def _unmasked(self, rows: Tensor) -> Tensor:
        """Those of ``rows``, one for each of the mask's entries, that count."""
        return rows if self._mask is None else rows[self._mask]

    @abc.abstractmethod
    def matrix(self) -> Tensor:
        """A itself, ``[g, m, d]``; new memory."""

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The shape of the layer's weight in ``layout``, of which A may leave out entries that are never read."""
        return self.weight_shape

    def places(self) -> Tensor | None:
        """Which entries of an output's parameters, weight before bias, A's columns belong to; None for all in order."""
        return None

    @property
    @abc.abstractmethod
    def gram_cost(self) -> float:
        """Multiply-adds that ``gram`` needs, over all groups."""

    @property
    @abc.abstractmethod
    def precise_gram(self) -> bool:
        """Whether all of them are in the precision that ``gram`` is asked for, or only the sums of their results."""

    @property
    @abc.abstractmethod
    def kernel_cost(self) -> float:
        """Multiply-adds that ``kernel`` needs, over all groups."""

    @abc.abstractmethod
    def trace(self) -> Tensor:
        """The trace of AᵀA, over all groups together, in the accumulation precision."""

    def of_outputs(self, outputs: Sequence[int], dtype: torch.dtype) -> MatrixDesign:
        """The design matrix of a layer with some of each group's outputs alone, in precision ``dtype``."""
        part = copy.copy(self)
        part.input, part.dtype, part._shared = self.input.to(dtype), dtype, None
        part.outputs = len(outputs)
        part.weight_shape = (self.groups * part.outputs, *self.weight_shape[1:])
        return part

    def sums(self, weights: Tensor, output: Tensor) -> Tensor:
        """Weighted sums of each group's outputs, ``weights`` being ``[sums, o]``; an output of ``of_outputs``."""
        return self.of_outputs(range(len(weights)), self.dtype).from_rows(weights @ self.to_rows(output))

    def gram(self, dtype: torch.dtype | None = None, precise: bool = False) -> Tensor:
        dtype = dtype or accumulation_dtype(self.input)
        precise = precise and self.rough_gram
        return self._once(("gram", dtype, precise), functools.partial(self._gram, dtype, precise))

    def kernel(self, dtype: torch.dtype) -> Tensor:
        return self._once(("kernel", dtype), functools.partial(self._kernel, dtype))

    def _once(self, name: tuple[Hashable, ...], compute: Callable[[], Tensor]) -> Tensor:
        """A product, computed once for all layers with this input that read it in the same way."""
        if self._shared is None:
            return compute()
        return self._shared.get(self._saved_input, (*name, *self._reading), compute)

    @property
    @abc.abstractmethod
    def _reading(self) -> tuple[Hashable, ...]:
        """What else than the input decides A, and the precision of its products."""

    @abc.abstractmethod
    def _gram(self, dtype: torch.dtype, precise: bool) -> Tensor: ...

    @abc.abstractmethod
    def _kernel(self, dtype: torch.dtype) -> Tensor: ...

    @abc.abstractmethod
    def _batched(self, output: Tensor) -> Tensor:
        """An output as ``[N, ...]``, with the N of ``input``."""

    @abc.abstractmethod
    def _products(self, input: Tensor, output: Tensor) -> Parameters:
        """Aᵀ z for the rows of A that belong to ``input``."""

    def as_applied(self, output: Tensor) -> Tensor:
        return self._batched(output)

    def adjoint(self, output: Tensor) -> Parameters:
        return self._products(self.input, self._batched(output))

    def stacked_adjoint(self, output: Tensor) -> Tensor:
        return self._stacked_products(self.input, self._batched(output))

    def _stacked_products(self, input: Tensor, output: Tensor) -> Tensor:
        """``_products``, stacked."""
        return self.stack(self._products(input, output))

    def in_precision(self, dtype: torch.dtype) -> MatrixDesign:
        """The same design matrix in precision ``dtype``."""
        return self.of_outputs(range(self.outputs), dtype)

    def right_hand_side(self, output: Tensor, precise: bool = True) -> Tensor:
        """A sum of products of a few thousand rows each: those are in the input's precision, more are summed up in the
        accumulation precision. ``precise``, all is in that: what rounding puts outside the range of Aᵀ, a large τ
        amplifies."""
        if precise:
            dtype = accumulation_dtype(output)
            return self._stacked_products(self.input.to(dtype), self._batched(output).to(dtype))
        elements = max(1, ROWS_IN_WORKING_PRECISION * self.input.shape[0] // self.rows)
        inputs, outputs = (torch.split(tensor, elements) for tensor in (self.input, self._batched(output)))
        total = self._stacked_products(inputs[0], outputs[0])
        for input, part in zip(inputs[1:], outputs[1:], strict=True):
            total = total.to(accumulation_dtype(output)) + self._stacked_products(input, part)
        return total
