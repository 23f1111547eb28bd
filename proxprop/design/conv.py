"""The design matrix of a convolution: its rows are the input's patches (im2col), which are never stored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from proxprop.design.base import MatrixDesign, Parameters, accumulation_dtype
from proxprop.design.patch_gram import PatchGram, patch_sums, patches


@dataclasses.dataclass(frozen=True)
class ConvGeometry:
    """How a convolution reads its input; one entry for each spatial dimension.

    ``pad`` and ``pad_mode`` are what ``torch.nn.functional.pad`` takes, so the convolution itself has no padding.
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


class ConvDesign(MatrixDesign):
    """A for a convolution of any number of spatial dimensions, stride, dilation, groups and padding.

    Each group has its own block of rows ``[patch 1]``; m is batch times output positions.

    Args:
        input: The layer's input, ``[N, C, *spatial]`` or unbatched ``[C, *spatial]``.
        geometry: How the convolution reads it.
        trained: Whether the weight and whether the bias is trained.
    """

    def __init__(self, input: Tensor, geometry: ConvGeometry, trained: Sequence[bool]) -> None:
        super().__init__(input, geometry.weight_shape, geometry.groups, trained)
        self.geometry = geometry
        spatial = len(geometry.kernel_size)
        batched = (input if input.dim() == spatial + 2 else input[None]).to(self.dtype)
        if any(geometry.pad):
            batched = torch.nn.functional.pad(batched, geometry.pad, geometry.pad_mode)
        self.input = batched  # [N, C, *padded]
        self.positions = tuple(
            (size - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, dilation in zip(
                batched.shape[2:],
                geometry.kernel_size,
                geometry.stride,
                geometry.dilation,
                strict=True,
            )
        )
        self.rows = batched.shape[0] * math.prod(self.positions)
        self._patch_gram = PatchGram(
            self.input.shape,
            geometry.kernel_size,
            geometry.stride,
            geometry.dilation,
            geometry.groups,
        )

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
            like = input.new_empty(self.weight_shape)
            _, weight, _ = torch.ops.aten.convolution_backward(
                output, input, like, None, *self._arguments(), [False, True, False]
            )
        if self.train_bias:
            bias = output.transpose(0, 1).flatten(1).sum(1)
        return weight, bias

    def right_hand_side(self, output: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return super().right_hand_side(output)
        # By matrix products, image by image: cuDNN's weight gradient would use TF32, which they do only if told to.
        batch = self.input.shape[0]
        images = self._patches().unflatten(1, (batch, -1))  # [g, N, positions, d]
        outputs = self._batched(output).reshape(batch, self.groups, self.outputs, -1).transpose(0, 1)
        return (outputs @ images).sum(1, dtype=accumulation_dtype(output))  # [g, o, d]

    def squared_norms(self, output: Tensor) -> Tensor:
        return self._batched(output).square().transpose(0, 1).flatten(1).sum(1).reshape(self.groups, self.outputs, 1)

    @property
    def gram_cost(self) -> float:
        return self._patch_gram.cost if self.train_weight else 0.0

    def gram(self) -> Tensor:
        dtype = accumulation_dtype(self.input)
        count = torch.full((self.groups, 1, 1), self.rows, dtype=dtype, device=self.device)
        if not self.train_weight:
            return count
        weights = self._patch_gram(self.input)  # [g, d, d]
        if not self.train_bias:
            return weights
        sums = patch_sums(self.input, self.geometry.kernel_size, self.geometry.stride, self.geometry.dilation)
        sums = sums.reshape(self.groups, self.weight_columns, 1)
        return torch.cat([torch.cat([weights, sums], -1), torch.cat([sums.mT, count], -1)], -2)

    def kernel(self) -> Tensor:
        matrix = self._patches().to(accumulation_dtype(self.input))
        return matrix @ matrix.mT

    def to_rows(self, output: Tensor) -> Tensor:
        output = self._batched(output)
        grouped = output.reshape(output.shape[0], self.groups, self.outputs, -1)
        return grouped.permute(1, 2, 0, 3).reshape(self.groups, self.outputs, self.rows)

    def from_rows(self, rows: Tensor) -> Tensor:
        grouped = rows.reshape(self.groups, self.outputs, self.input.shape[0], -1)
        return grouped.permute(2, 0, 1, 3).reshape(self.input.shape[0], -1, *self.positions)

    def _patches(self) -> Tensor:
        """A itself, ``[g, m, d]``."""
        parts = []
        if self.train_weight:
            geometry = self.geometry
            parts.append(
                patches(
                    self.input,
                    geometry.kernel_size,
                    geometry.stride,
                    geometry.dilation,
                    geometry.groups,
                )
            )
        if self.train_bias:
            parts.append(self.input.new_ones(self.groups, self.rows, 1))
        return torch.cat(parts, dim=-1)

    def _arguments(self) -> tuple[object, ...]:
        """Stride, padding, dilation, transposed, output padding and groups, as ATen takes them."""
        zeros = [0] * len(self.positions)
        geometry = self.geometry
        return list(geometry.stride), zeros, list(geometry.dilation), False, zeros, geometry.groups
