"""By products of all pairs of the image's pixels: for small images and large kernels.

The products of two pixels, summed over the batch, are wanted in every entry whose two taps read these pixels at one
position of the kernel. Which positions those are splits into one question for each spatial dimension, so the sums are a
small product with a matrix of zeros and ones a dimension, in the accumulation precision. A depthwise 7×7 convolution
of 8×8 pixels has 64² pairs of pixels, where its patches take 64 products for each of 49² pairs of taps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from proxprop.cost import cost_model
from proxprop.design.base import accumulation_dtype
from proxprop.design.image_gram.base import ENTRY_COST, ImageGram

PAIR_COST = 300
"""What it costs to sort a product of two pixels, in multiply-adds (measured on a CPU)."""


class PairGram(ImageGram):
    """Computes AᵀA from pairs of pixels."""

    @property
    def cost(self) -> float:
        size, pairs = self.shape[2:], float(self.channels**2)
        entries = pairs * math.prod(size) ** 2
        total = entries * (self.batch + PAIR_COST)
        for axis in reversed(range(len(size))):
            total += entries * self.kernel[axis] ** 2
            entries *= (self.kernel[axis] / size[axis]) ** 2
        return self.groups * (total + ENTRY_COST * entries)

    def __call__(self, image: Tensor) -> Tensor:
        pixels = (
            image.reshape(self.batch, self.groups, self.channels * math.prod(self.shape[2:]))
            .permute(1, 2, 0)
            .contiguous()
        )  # [g, c·pixels, N]
        bytes_each = 8 * pixels.shape[1] ** 2
        at_once = max(1, cost_model(image.device).working_set // bytes_each)
        counts = [self._counts(axis, image) for axis in range(len(self.shape) - 2)]
        return torch.cat([self._sums(part @ part.mT, counts) for part in torch.split(pixels, at_once)])

    def _sums(self, products: Tensor, counts: list[Tensor]) -> Tensor:
        """Of products of pixels ``[g, c·pixels, c·pixels]``, those that each pair of taps reads, ``[g, d, d]``."""
        groups, channels, size = products.shape[0], self.channels, self.shape[2:]
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
        return sums.permute(0, *order).reshape(groups, self.columns, self.columns)

    def _counts(self, axis: int, like: Tensor) -> Tensor:
        """How many positions have two taps read two pixels of an axis, ``[taps², pixels²]``."""
        size, taps = self.shape[2 + axis], self.kernel[axis]
        position, tap, pixel = (torch.arange(n, device=like.device) for n in (self.positions[axis], taps, size))
        read = self.stride[axis] * position + self.dilation[axis] * tap[:, None] - self.padding[axis]
        reads = (read[:, None] == pixel[:, None]).to(accumulation_dtype(like))  # [taps, pixels, positions]
        return torch.einsum("aip,bjp->abij", reads, reads).reshape(taps**2, size**2)
