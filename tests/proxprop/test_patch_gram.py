"""The Gram matrix from strips against im2col, for every width of the strips and for split rows of strips."""

import random

import pytest
import torch

from proxprop.design import patch_gram
from proxprop.design.patch_gram import PatchGram, patches


@pytest.mark.parametrize("seed", range(40))
def test_strips_of_every_width_give_the_gram_matrix_of_the_patches(seed, monkeypatch):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    spatial = draw.randint(1, 3)
    kernel, stride, dilation = ([draw.randint(1, most) for _ in range(spatial)] for most in (3, 3, 2))
    size = [d * (k - 1) + 1 + draw.randint(0, 7) for k, d in zip(kernel, dilation, strict=True)]
    groups, batch = draw.choice([1, 2]), draw.randint(1, 3)
    image = torch.randn(batch, groups * draw.randint(1, 3), *size, dtype=torch.float64)
    matrix = patches(image, kernel, stride, dilation, groups)
    for terms in (8192, 2 * batch):  # all strips of a row in one product, or two at a time
        monkeypatch.setattr(patch_gram, "ROWS_IN_WORKING_PRECISION", terms)
        for width in (None, 1, 2, 3, 100):
            gram = PatchGram(image.shape, kernel, stride, dilation, groups, width)(image)
            assert torch.allclose(gram, matrix.mT @ matrix, rtol=0, atol=1e-10)
