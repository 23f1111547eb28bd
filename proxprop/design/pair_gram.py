"""The Gram matrix of an image's patches by products of all pairs of its pixels: for small images and large kernels.

The products of two pixels, summed over the batch, are wanted in every entry whose two taps read these pixels at one
position of the kernel. Which positions those are splits into one question for each spatial dimension, so the sums are a
small product with a matrix of zeros and ones a dimension, in the accumulation precision. A depthwise 7×7 convolution
of 8×8 pixels has 64² pairs of pixels, where its patches take 64 products for each of 49² pairs of taps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from proxprop.cost import cost_model
from proxprop.design.base import accumulation_dtype
from proxprop.design.patch_gram import ENTRY_COST, output_positions

PAIR_COST = 300
"""What it costs to sort a product of two pixels, in multiply-adds (measured on a CPU)."""


@dataclasses.dataclass(frozen=True)
class PairGram:
    """Computes AᵀA, with the patches of images of one shape as A's rows.

    Args:
        shape: ``(N, C, *spatial)`` of the image without its padding.
        padding: Zeros on either side, one number for each spatial dimension.
        kernel, stride, dilation: The same.
        groups: Channels are split into this many groups, each with a Gram matrix of its own.
    """

    shape: tuple[int, ...]
    padding: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    taps_first: ClassVar[bool] = False
    """Whether the order of columns is taps, channels, and not channels, taps."""
    padded: ClassVar[bool] = False
    """Whether it is called with the image's padding."""
    rough: ClassVar[bool] = False
    """Whether its sums in the working precision may be too long for some solves."""

    @property
    def cost(self) -> float:
        """Multiply-adds of the products, and what handling their entries costs in such terms."""
        size, pairs = self.shape[2:], float(self._channels**2)
        entries = pairs * math.prod(size) ** 2
        total = entries * (self.shape[0] + PAIR_COST)
        for axis in reversed(range(len(size))):
            total += entries * self.kernel[axis] ** 2
            entries *= (self.kernel[axis] / size[axis]) ** 2
        return self.groups * (total + ENTRY_COST * entries)

    def __call__(self, image: Tensor) -> Tensor:
        """The Gram matrices ``[groups, d, d]`` with d = C/groups·taps, in the accumulation precision."""
        batch, size = self.shape[0], self.shape[2:]
        pixels = image.reshape(batch, self.groups, -1).permute(1, 2, 0).contiguous()  # [g, c·pixels, N]
        bytes_each = 8 * pixels.shape[1] ** 2
        at_once = max(1, cost_model(image.device).working_set // bytes_each)
        counts = [self._counts(axis).to(image.device, accumulation_dtype(image)) for axis in range(len(size))]
        return torch.cat([self._sums(part @ part.mT, counts) for part in torch.split(pixels, at_once)])

    def _sums(self, products: Tensor, counts: list[Tensor]) -> Tensor:
        """Of products of pixels ``[g, c·pixels, c·pixels]``, those that each pair of taps reads, ``[g, d, d]``."""
        groups, channels, size = products.shape[0], self._channels, self.shape[2:]
        axes = range(len(size))
        first, second = ([1 + side * (1 + len(size)) + axis for axis in range(1 + len(size))] for side in range(2))
        products = products.reshape(groups, channels, *size, channels, *size)
        # [g, c, c, then two of each spatial dimension]
        pairs = products.permute(0, *(axis for both in zip(first, second, strict=True) for axis in both))
        sums = pairs.to(counts[0].dtype).reshape(-1, size[-1] ** 2) @ counts[-1].T
        after = counts[-1].shape[0]
        for axis in reversed(axes[:-1]):
            sums = counts[axis] @ sums.reshape(-1, size[axis] ** 2, after)
            after *= counts[axis].shape[0]
        taps = (tap for axis in axes for tap in (self.kernel[axis],) * 2)
        sums = sums.reshape(groups, channels, channels, *taps)
        order = (*range(1, sums.dim(), 2), *range(2, sums.dim(), 2))
        columns = channels * math.prod(self.kernel)
        return sums.permute(0, *order).reshape(groups, columns, columns)

    def _counts(self, axis: int) -> Tensor:
        """How many positions have two taps read two pixels of an axis, ``[taps², pixels²]``."""
        size, taps = self.shape[2 + axis], self.kernel[axis]
        reads = torch.zeros(taps, size, self._positions(axis))
        for tap, position, pixel in self._reads(axis):
            reads[tap, pixel, position] = 1
        return torch.einsum("aip,bjp->abij", reads, reads).reshape(taps**2, size**2)

    def _reads(self, axis: int) -> Iterator[tuple[int, int, int]]:
        """Tap, position, and the pixel that the one reads at the other."""
        for tap in range(self.kernel[axis]):
            for position in range(self._positions(axis)):
                pixel = self.stride[axis] * position + self.dilation[axis] * tap - self.padding[axis]
                if 0 <= pixel < self.shape[2 + axis]:
                    yield tap, position, pixel

    def _positions(self, axis: int) -> int:
        padded = self.shape[2 + axis] + 2 * self.padding[axis]
        return output_positions((padded,), (self.kernel[axis],), (self.stride[axis],), (self.dilation[axis],))[0]

    @property
    def _channels(self) -> int:
        return self.shape[1] // self.groups
