"""From the patches themselves: for kernels that hardly overlap, as 1×1 ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from proxprop.design.base import ROWS_IN_WORKING_PRECISION, SYMMETRIC, accumulation_dtype, symmetric_product
from proxprop.design.image_gram.base import ENTRY_COST, ImageGram, patches

FEWEST_CHANNELS = 48
"""With fewer, products are too small to be fast."""


class Im2colGram(ImageGram):
    """Computes AᵀA from patches, some images at a time."""

    @property
    def cost(self) -> float:
        """Infinite where products would be small."""
        if self.channels < FEWEST_CHANNELS:
            return math.inf
        rows, columns = self.batch * math.prod(self.positions), self.columns
        products = rows * columns**2 * (SYMMETRIC if self.groups == 1 else 1.0)
        return self.groups * (products + ENTRY_COST * (2 * rows * columns + columns**2))

    def __call__(self, image: Tensor) -> Tensor:
        images = max(1, ROWS_IN_WORKING_PRECISION // max(1, math.prod(self.positions)))
        total: Tensor | None = None
        for part in torch.split(self.padded(image), images):
            matrix = patches(part, self.kernel, self.stride, self.dilation, self.groups).mT  # [g, d, rows]
            gram = symmetric_product(matrix[0])[None] if self.groups == 1 else matrix @ matrix.mT
            total = gram.to(accumulation_dtype(image)) if total is None else total.add_(gram)
        assert total is not None
        return total
