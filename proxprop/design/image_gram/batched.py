"""From the patches in few operations: for a GPU, where one takes as long as many multiply-adds."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from proxprop.cost import cost_model
from proxprop.design.base import ROWS_IN_WORKING_PRECISION, accumulation_dtype
from proxprop.design.image_gram.base import ImageGram, patches


class BatchedGram(ImageGram):
    """Computes AᵀA from patches, as many at a time as the working set holds, by a batched product."""

    for_cpu: ClassVar[bool] = False

    @property
    def cost(self) -> float:
        return float(self.groups * self.batch * math.prod(self.positions) * self.columns**2)

    def __call__(self, image: Tensor) -> Tensor:
        dtype, positions = accumulation_dtype(image), math.prod(self.positions)
        images = max(1, ROWS_IN_WORKING_PRECISION // max(1, positions))  # of one product
        elements = self.groups * self.columns * max(images * positions, self.columns)
        products = max(1, cost_model(image.device).working_set // (elements * image.element_size()))
        total = torch.zeros(self.groups, self.columns, self.columns, dtype=dtype, device=image.device)
        for part in torch.split(self.padded(image), products * images):
            whole = len(part) - len(part) % images
            for some in (part[:whole], part[whole:]):
                if len(some):
                    rows = patches(some, self.kernel, self.stride, self.dilation, self.groups)
                    rows = rows.reshape(self.groups, -(-len(some) // images), -1, self.columns)
                    total += (rows.mT @ rows).sum(1, dtype=dtype)
        return total
