"""The design matrix of a transposed convolution: that of a convolution of the input with zeros between its pixels."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from proxprop.design.base import MatrixDesign
from proxprop.design.conv import ConvDesign, ConvGeometry
from proxprop.design.image_gram import BatchedGram, StripGram, output_positions
from proxprop.design.shared import SharedProducts


def transposed_kernel(weight: Tensor, groups: int) -> Tensor:
    """The layout of a transposed convolution's weight: ``[in, out/groups, *kernel]`` to ``[out, in/groups, *kernel]``
    with the kernel the other way round, and back.
    """
    spatial = tuple(range(2, weight.dim()))
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return grouped.transpose(1, 2).flatten(0, 1).flip(spatial)


@dataclasses.dataclass(frozen=True)
class TransposedConvGeometry(ConvGeometry):
    """The convolution (of stride 1) that a transposed one is; ``spacing`` is the distance of the input's pixels."""

    spacing: tuple[int, ...]

    @classmethod
    def of(
        cls,
        weight_shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        output_padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> TransposedConvGeometry:
        """From the arguments of ``torch.nn.ConvTranspose2d`` and the shape of its weight."""
        inputs, outputs, *kernel = weight_shape
        before = [step * (taps - 1) - pad for step, taps, pad in zip(dilation, kernel, padding, strict=True)]
        after = [pad + extra for pad, extra in zip(before, output_padding, strict=True)]
        return cls(
            weight_shape=(groups * outputs, inputs // groups, *kernel),
            stride=(1,) * len(kernel),
            dilation=tuple(dilation),
            groups=groups,
            pad=tuple(number for both in zip(reversed(before), reversed(after), strict=True) for number in both),
            pad_mode="constant",
            spacing=tuple(stride),
        )


class TransposedConvDesign(ConvDesign):
    """A for a transposed convolution of any number of spatial dimensions; m is batch times output positions.

    Products with A and Aᵀ are those of the transposed convolution itself; Gram matrices and patches need the zeros.

    Args:
        input: The layer's input, ``[N, C, *spatial]`` or unbatched ``[C, *spatial]``.
        geometry: How it is read.
        trained: Whether the weight and whether the bias is trained.
        shared: What layers with the same input have computed of it.
    """

    geometry: TransposedConvGeometry

    def __init__(
        self,
        input: Tensor,
        geometry: TransposedConvGeometry,
        trained: Sequence[bool],
        shared: SharedProducts | None = None,
    ) -> None:
        layout = functools.partial(transposed_kernel, groups=geometry.groups)
        MatrixDesign.__init__(self, input, geometry.weight_shape, geometry.groups, trained, shared, layout)
        spatial = len(geometry.kernel_size)
        self.geometry = geometry
        self.clustered = max(geometry.spacing) > 1  # outputs between pixels have taps, and a block of AᵀA, of their own
        self.input = (input if input.dim() == spatial + 2 else input[None]).to(self.dtype)
        pads = [before + after for before, after in zip(*self._pads(), strict=True)]
        padded = [size + pad for size, pad in zip(self._spread_size(), pads, strict=True)]
        self.positions = output_positions(padded, *self._taps)
        self.rows = self.input.shape[0] * math.prod(self.positions)
        self._unread, self.remaining_pad = (0,) * spatial, (0,) * 2 * spatial
        shape = (*self.input.shape[:2], *padded)
        form = StripGram if self.device.type == "cpu" else BatchedGram
        self._form = form(shape, (0,) * spatial, *self._taps, geometry.groups)

    @property
    def _pixel_kernel_cost(self) -> float:
        return math.inf  # products of pixels know nothing of the zeros

    def _pads(self) -> tuple[Sequence[int], Sequence[int]]:
        """Padding before and after, a number for each dimension; negative where the image is cut."""
        return self.geometry.pad[-2::-2], self.geometry.pad[::-2]

    def _spread_size(self) -> list[int]:
        """The spatial size with the zeros between, and no padding."""
        return [hop * (size - 1) + 1 for size, hop in zip(self.input.shape[2:], self.geometry.spacing, strict=True)]

    def _image(self) -> Tensor:
        return self._padded()

    def _padded(self) -> Tensor:
        spread = self.input.new_zeros(*self.input.shape[:2], *self._spread_size())
        places: tuple[Any, ...] = (..., *(slice(None, None, hop) for hop in self.geometry.spacing))
        spread[places] = self.input
        return torch.nn.functional.pad(spread, self.geometry.pad)

    def _arguments(self) -> tuple[object, ...]:
        geometry, (before, after) = self.geometry, self._pads()
        taps = zip(geometry.dilation, geometry.kernel_size, before, strict=True)
        padding = [step * (size - 1) - pad for step, size, pad in taps]
        extra = [last - first for first, last in zip(before, after, strict=True)]
        return list(geometry.spacing), padding, list(geometry.dilation), True, extra, geometry.groups
