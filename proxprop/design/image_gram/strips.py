"""By products of strips of the image, without patches: for few channels.

An entry is a sum, over all positions of the kernel, of products of two pixels at a fixed offset from each other.
The image is cut into strips, one image row high (a point, in one dimension; a line of any volume) and some columns
wide. For a fixed offset between strips, one batched product ``strip(r)ᵀ strip(r + offset)`` over the batch and the
strips of a row holds the products of all pixel pairs in question; what a pair of kernel positions needs of it is a sum
over rows ``r`` and then a sum along a diagonal. The products run in the image's precision over a few thousand terms at
most, all further sums in the accumulation precision. Against im2col this saves operations (strips about as wide as the
kernel need the fewest), memory, and digits.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from proxprop.design.base import ROWS_IN_WORKING_PRECISION, accumulation_dtype
from proxprop.design.image_gram.base import ENTRY_COST, ImageGram

MATRIX_COST = 1e5
"""What one more matrix of a batched product costs where there are many groups, in multiply-adds (measured on a CPU)."""


@dataclasses.dataclass(frozen=True)
class StripGram(ImageGram):
    """Computes AᵀA from strips.

    Args:
        width: Output columns in a strip; by default the cheapest width.
    """

    width: int | None = None

    @property
    def cost(self) -> float:
        return self._cost(self._width)

    def __call__(self, image: Tensor) -> Tensor:
        taps = self.kernel[-1]
        outer_taps = math.prod(self.kernel[:-1])
        shape = (self.groups, self.channels, outer_taps, taps, self.channels, outer_taps, taps)
        gram = torch.zeros(shape, dtype=accumulation_dtype(image), device=image.device)
        for width, strips in self._strips(self.padded(image)):
            for offset in self._offsets():
                self._add(gram, strips, offset, width)
        return gram.reshape(self.groups, self.columns, self.columns)

    def _cost(self, width: int) -> float:
        tiles = -(-self.positions[-1] // width)
        terms = self.batch * tiles + ENTRY_COST * -(-tiles // self._tiles_at_once)
        offsets = (math.prod([2 * taps - 1 for taps in self.kernel[:-1]]) + 1) // 2
        products = terms * (self.channels * self._span(width)) ** 2 + (MATRIX_COST if self.groups > 1 else 0.0)
        elements = self.batch * self.channels * math.prod(self.padded_size)
        return self.groups * (math.prod(self._outer_size) * offsets * products + ENTRY_COST * elements)

    @functools.cached_property
    def _width(self) -> int:
        if self.width is not None:
            return min(self.width, self.positions[-1])
        # Strips much wider than the kernel only add products that are not needed.
        widest = min(self.positions[-1], 2 * self._span(1))
        best = 1
        for width in range(2, widest + 1):
            if self._cost(width) < self._cost(best):
                best = width
        return best

    @property
    def _outer_size(self) -> tuple[int, ...]:
        return self.padded_size[:-1]

    @property
    def _tiles_at_once(self) -> int:
        """Strips of a row in one product, by the number of terms that it may sum."""
        return max(1, ROWS_IN_WORKING_PRECISION // max(1, self.batch))

    def _span(self, width: int) -> int:
        """Image columns that ``width`` neighbouring output columns read."""
        return self.stride[-1] * (width - 1) + self.dilation[-1] * (self.kernel[-1] - 1) + 1

    def _offsets(self) -> Iterator[tuple[int, ...]]:
        """Differences of two outer kernel positions, one of each pair ±offset (the Gram matrix is symmetric)."""
        for offset in itertools.product(*(range(1 - taps, taps) for taps in self.kernel[:-1])):
            if offset >= (0,) * len(offset):
                yield offset

    def _strips(self, image: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Their width, and strips ``[groups, *outer, tiles·N, C/groups·span]``; narrower ones for what is left over."""
        outer = len(self._outer_size)
        grouped = image.reshape(self.batch, self.groups, self.channels, *image.shape[2:])
        columns, hop = self.positions[-1], self.stride[-1]
        for width, first in ((self._width, 0), (columns % self._width, columns - columns % self._width)):
            if width == 0:
                continue
            tiles = (columns - first) // width
            view = grouped[..., first * hop :].unfold(-1, self._span(width), width * hop)
            view = view.permute(1, *range(3, 4 + outer), 0, 2, 4 + outer)  # [g, *outer, tiles, N, c, span]
            for start in range(0, tiles, self._tiles_at_once):
                chunk = view.narrow(1 + outer, start, min(self._tiles_at_once, tiles - start))
                rows = chunk.shape[1 + outer] * self.batch
                yield width, chunk.reshape(self.groups, *self._outer_size, rows, self.channels * self._span(width))

    def _add(self, gram: Tensor, strips: Tensor, offset: tuple[int, ...], width: int) -> None:
        """Add what strips at ``offset`` from each other contribute."""
        shift = [step * delta for step, delta in zip(self.dilation[:-1], offset, strict=True)]
        left, right = strips, strips
        for axis, (size, delta) in enumerate(zip(self._outer_size, shift, strict=True), start=1):
            left = left.narrow(axis, max(0, -delta), size - abs(delta))
            right = right.narrow(axis, max(0, delta), size - abs(delta))
        products = (left.mT @ right).to(gram.dtype)  # [g, *outer, c·span, c·span]
        for first in itertools.product(*(range(taps) for taps in self.kernel[:-1])):
            second = tuple(tap + delta for tap, delta in zip(first, offset, strict=True))
            if not all(0 <= tap < taps for tap, taps in zip(second, self.kernel[:-1], strict=True)):
                continue
            rows = products
            for axis, (tap, delta) in enumerate(zip(first, shift, strict=True)):
                start, hop = self.dilation[axis] * tap - max(0, -delta), self.stride[axis]
                rows = rows.narrow(axis + 1, start, hop * (self.positions[axis] - 1) + 1)
                rows = rows[(slice(None),) * (axis + 1) + (slice(None, None, hop),)]
            block = self._diagonals(rows.sum(tuple(range(1, len(shift) + 1))) if shift else rows, width)
            i, j = self._flat(first), self._flat(second)
            gram[:, :, i, :, :, j, :] += block
            if any(offset):
                gram[:, :, j, :, :, i, :] += block.permute(0, 3, 4, 1, 2)

    def _flat(self, tap: tuple[int, ...]) -> int:
        """The index of an outer kernel position."""
        index = 0
        for position, taps in zip(tap, self.kernel[:-1], strict=True):
            index = index * taps + position
        return index

    def _diagonals(self, products: Tensor, width: int) -> Tensor:
        """Sum ``[g, c·span, c·span]`` along the diagonals that pairs of taps run through: ``[g, c, taps, c, taps]``."""
        span, taps, channels = self._span(width), self.kernel[-1], self.channels
        hop, step = self.stride[-1], self.dilation[-1]
        line = channels * span
        view = products.contiguous().as_strided(
            (products.shape[0], channels, taps, channels, taps, width),
            (line * line, span * line, step * line, span, step, hop * (line + 1)),
        )
        return view.sum(-1)
