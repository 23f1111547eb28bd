"""The design matrix of a convolution: its rows are the input's patches (im2col), which are hardly ever stored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from proxprop.design.base import MatrixDesign, Parameters, accumulation_dtype
from proxprop.design.patch_gram import PatchGram, output_positions, patch_sums, patches
from proxprop.design.shared import SharedProducts

PATCH_ELEMENTS = 2**26
"""How many elements of patches are held at a time (256 MiB in float32)."""


@dataclasses.dataclass(frozen=True)
class ConvGeometry:
    """How a convolution reads its input; one entry for each spatial dimension.

    ``pad`` and ``pad_mode`` are what ``torch.nn.functional.pad`` takes: two numbers a dimension, the last dimension
    first.
    """

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    pad: tuple[int, ...]
    pad_mode: str

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self.weight_shape[2:]

    @property
    def zero_padding(self) -> tuple[int, ...] | None:
        """The padding as a convolution's own argument, if that can express it."""
        before, after = self.pad[-2::-2], self.pad[::-2]
        return before if self.pad_mode == "constant" and before == after else None


class ConvDesign(MatrixDesign):
    """A for a convolution of any number of spatial dimensions, stride, dilation, groups and padding.

    Each group has its own block of rows ``[patch 1]``; m is batch times output positions.

    Args:
        input: The layer's input, ``[N, C, *spatial]`` or unbatched ``[C, *spatial]``.
        geometry: How the convolution reads it.
        trained: Whether the weight and whether the bias is trained.
        shared: What layers with the same input have computed of it.
    """

    def __init__(
        self,
        input: Tensor,
        geometry: ConvGeometry,
        trained: Sequence[bool],
        shared: SharedProducts | None = None,
    ) -> None:
        super().__init__(input, geometry.weight_shape, geometry.groups, trained, shared)
        spatial = len(geometry.kernel_size)
        batched = (input if input.dim() == spatial + 2 else input[None]).to(self.dtype)
        if geometry.zero_padding is None:
            self.input = torch.nn.functional.pad(batched, geometry.pad, geometry.pad_mode)
            self.padding, self.remaining_pad = (0,) * spatial, (0,) * 2 * spatial
        else:
            self.input = batched
            self.padding, self.remaining_pad = geometry.zero_padding, geometry.pad
        self.geometry = geometry
        padded = [size + 2 * pad for size, pad in zip(self.input.shape[2:], self.padding, strict=True)]
        self.positions = output_positions(padded, *self._taps)
        self.rows = batched.shape[0] * math.prod(self.positions)
        self._padded_shape = (*self.input.shape[:2], *padded)

    @property
    def _taps(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return self.geometry.kernel_size, self.geometry.stride, self.geometry.dilation

    def _padded(self) -> Tensor:
        """The input with all of its padding, ``[N, C, *padded]``."""
        if not any(self.remaining_pad):
            return self.input
        return torch.nn.functional.pad(self.input, self.remaining_pad)

    def _arguments(self) -> tuple[object, ...]:
        """Stride, padding, dilation, transposed, output padding and groups, as ATen takes them."""
        geometry = self.geometry
        zeros = [0] * len(self.padding)
        return list(geometry.stride), list(self.padding), list(geometry.dilation), False, zeros, geometry.groups

    def apply(self, parameters: Parameters) -> Tensor:
        weight, bias = parameters
        if weight is None:
            assert bias is not None
            shape = (self.input.shape[0], -1, *self.positions)
            return bias.reshape(1, -1, *(1 for _ in self.positions)).expand(shape)
        # The last argument keeps cuDNN from TF32, which it would use by default.
        flags = torch.backends.cudnn
        result: Tensor = torch.ops.aten._convolution(
            self.input, weight, bias, *self._arguments(), flags.benchmark, flags.deterministic, flags.enabled, False
        )
        return result

    def _batched(self, output: Tensor) -> Tensor:
        return output.reshape(self.input.shape[0], self.weight_shape[0], *self.positions)

    def _products(self, input: Tensor, output: Tensor) -> Parameters:
        weight = bias = None
        if self.train_weight:
            like = self.layout(input.new_empty(self.weight_shape))
            _, weight, _ = torch.ops.aten.convolution_backward(
                output, input, like, None, *self._arguments(), [False, True, False]
            )
        if self.train_bias:
            bias = output.transpose(0, 1).reshape(self.weight_shape[0], -1).sum(1)
        return weight, bias

    def right_hand_side(self, output: Tensor) -> Tensor:
        # cuDNN's weight gradient would use TF32; matrix products do so only if told to.
        return super().right_hand_side(output) if self.device.type == "cpu" else self._by_patches(output)

    def _by_patches(self, output: Tensor) -> Tensor:
        """The right-hand side by matrix products, image by image."""
        images = max(1, PATCH_ELEMENTS // (self.columns * self.rows // self.input.shape[0]))
        total = torch.zeros((), dtype=accumulation_dtype(output), device=self.device)
        inputs, outputs = (torch.split(tensor, images) for tensor in (self._padded(), self._batched(output)))
        for input, part in zip(inputs, outputs, strict=True):
            matrices = self._patches(input).reshape(self.groups, input.shape[0], -1, self.columns)
            part = part.reshape(input.shape[0], self.groups, self.outputs, -1).transpose(0, 1)
            total = total + (part @ matrices).sum(1, dtype=total.dtype)  # [g, o, d]
        return total

    def squared_norms(self, output: Tensor) -> Tensor:
        squares = self._batched(output).square().transpose(0, 1).reshape(self.weight_shape[0], -1)
        return squares.sum(1).reshape(self.groups, self.outputs, 1)

    def trace(self) -> Tensor:
        squares = patch_sums(self._padded().to(accumulation_dtype(self.input)).square(), *self._taps).sum()
        return squares * int(self.train_weight) + self.groups * self.rows * int(self.train_bias)

    @property
    def gram_cost(self) -> float:
        return self._patch_gram().cost if self.train_weight else 0.0

    @property
    def _precise(self) -> bool:
        """Whether the Gram matrix is made of float64 products: where they cost less than the layer's back-propagation.

        That is so for few channels, and first layers need it: raw pixels have the worst condition.
        """
        return 2 * self.gram_cost <= 3 * self.rows * self.weight_columns * self.weight_shape[0]

    def _patch_gram(self) -> PatchGram:
        return PatchGram(self._padded_shape, *self._taps, self.geometry.groups)

    @property
    def _reading(self) -> tuple[Hashable, ...]:
        one_output = (1, *self.geometry.weight_shape[1:])
        geometry = dataclasses.replace(self.geometry, weight_shape=one_output)
        return self.train_weight, self.train_bias, geometry, self._precise

    def _gram(self) -> Tensor:
        dtype = accumulation_dtype(self.input)
        count = torch.full((self.groups, 1, 1), self.rows, dtype=dtype, device=self.device)
        if not self.train_weight:
            return count
        image = self._padded()
        weights = self._patch_gram()(image.to(dtype) if self._precise else image)  # [g, d, d]
        if not self.train_bias:
            return weights
        sums = patch_sums(image, *self._taps).reshape(self.groups, self.weight_columns, 1)
        return torch.cat([torch.cat([weights, sums], -1), torch.cat([sums.mT, count], -1)], -2)

    def matrix(self) -> Tensor:
        return self._patches(self._padded())

    def _kernel(self, dtype: torch.dtype) -> Tensor:
        matrix = self.matrix().to(dtype)
        return matrix @ matrix.mT

    def to_rows(self, output: Tensor) -> Tensor:
        output = self._batched(output)
        grouped = output.reshape(output.shape[0], self.groups, self.outputs, -1)
        return grouped.permute(1, 2, 0, 3).reshape(self.groups, self.outputs, self.rows)

    def from_rows(self, rows: Tensor) -> Tensor:
        grouped = rows.reshape(self.groups, self.outputs, self.input.shape[0], -1)
        return grouped.permute(2, 0, 1, 3).reshape(self.input.shape[0], -1, *self.positions)

    def _patches(self, padded: Tensor) -> Tensor:
        """The rows of A for some padded images, ``[g, rows, d]``."""
        parts = []
        if self.train_weight:
            parts.append(patches(padded, *self._taps, self.groups))
        if self.train_bias:
            rows = padded.shape[0] * math.prod(self.positions)
            parts.append(padded.new_ones(self.groups, rows, 1))
        return torch.cat(parts, dim=-1)
