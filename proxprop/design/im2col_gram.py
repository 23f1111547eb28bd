"""The Gram matrix of an image's patches from the patches themselves: for kernels that hardly overlap, as 1×1 ones."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from proxprop.design.base import ROWS_IN_WORKING_PRECISION, SYMMETRIC, accumulation_dtype, symmetric_product
from proxprop.design.patch_gram import ENTRY_COST, output_positions, patches


@dataclasses.dataclass(frozen=True)
class Im2colGram:
    """Computes AᵀA, with the patches of images of one shape as A's rows.

    Args:
        shape: ``(N, C, *spatial)`` of the padded image.
        kernel, stride, dilation: One number for each spatial dimension.
        groups: Channels are split into this many groups, each with a Gram matrix of its own.
    """

    shape: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    taps_first: ClassVar[bool] = False
    """Whether the order of columns is taps, channels, and not channels, taps."""
    padded: ClassVar[bool] = True
    """Whether it is called with the image's padding."""
    rough: ClassVar[bool] = True
    """Whether its sums in the working precision may be too long for some solves."""

    @property
    def cost(self) -> float:
        """Multiply-adds of the products, and what handling their entries costs in such terms."""
        rows = self.shape[0] * math.prod(output_positions(self.shape[2:], self.kernel, self.stride, self.dilation))
        columns = self.shape[1] // self.groups * math.prod(self.kernel)
        products = rows * columns**2 * (SYMMETRIC if self.groups == 1 else 1.0)
        return self.groups * (products + ENTRY_COST * (2 * rows * columns + columns**2))

    def __call__(self, image: Tensor) -> Tensor:
        """The Gram matrices ``[groups, d, d]`` with d = C/groups·taps, in the accumulation precision."""
        positions = math.prod(output_positions(self.shape[2:], self.kernel, self.stride, self.dilation))
        images = max(1, ROWS_IN_WORKING_PRECISION // max(1, positions))
        total: Tensor | None = None
        for part in torch.split(image, images):
            matrix = patches(part, self.kernel, self.stride, self.dilation, self.groups).mT  # [g, d, rows]
            gram = symmetric_product(matrix[0])[None] if self.groups == 1 else matrix @ matrix.mT
            total = gram.to(accumulation_dtype(image)) if total is None else total.add_(gram)
        assert total is not None
        return total
