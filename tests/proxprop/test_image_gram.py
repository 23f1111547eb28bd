"""The Gram and kernel matrices of images against those of their patches, and whole directions made with each form."""

import math
import random

import oracle
import pytest
import torch
from test_directions import LAYERS, directions, expected, prepared
from torch import Tensor

from proxprop import ProxPropConv2d, ProxPropConvTranspose2d, cost
from proxprop.design import ConvDesign, ConvGeometry
from proxprop.design.image_gram import (
    FORMS,
    BatchedGram,
    Im2colGram,
    PairGram,
    PixelGram,
    StripGram,
    batched,
    im2col,
    patches,
    pixels,
    strips,
)


def drawn(seed):
    """A small image and how a convolution reads it."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    spatial = draw.randint(1, 3)
    kernel, stride, dilation = ([draw.randint(1, most) for _ in range(spatial)] for most in (4, 3, 2))
    padding = [draw.randint(0, 3) for _ in range(spatial)]
    size = [
        max(1, d * (k - 1) + 1 - 2 * p) + draw.randint(0, 5) for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    groups, batch = draw.choice([1, 2]), draw.randint(1, 3)
    image = torch.randn(batch, groups * draw.randint(1, 3), *size, dtype=torch.float64)
    return image, tuple(padding), tuple(kernel), tuple(stride), tuple(dilation), groups


def matches_patches(gram, image):
    """Whether a form has AᵀA of ``image``."""
    matrix = patches(gram.padded(image), gram.kernel, gram.stride, gram.dilation, gram.groups, gram.taps_first)
    return torch.allclose(gram(image), matrix.mT @ matrix, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(60))
def test_each_form_gives_the_gram_matrix_of_the_patches(seed, monkeypatch):
    image, *reading = drawn(seed)
    assert all(matches_patches(form(tuple(image.shape), *reading), image) for form in FORMS)
    # Of one product's terms, as few as there may be: two strips or columns of the image, an image, pairs of one group.
    monkeypatch.setattr(strips, "ROWS_IN_WORKING_PRECISION", 2 * image.shape[0])
    monkeypatch.setattr(pixels, "TERMS", 2 * image.shape[0])
    monkeypatch.setattr(batched, "ROWS_IN_WORKING_PRECISION", 1)
    monkeypatch.setattr(im2col, "ROWS_IN_WORKING_PRECISION", 1)
    monkeypatch.setattr(cost.COSTS["cpu"], "working_set", 1)
    assert all(matches_patches(form(tuple(image.shape), *reading), image) for form in FORMS)
    assert all(matches_patches(StripGram(tuple(image.shape), *reading, width), image) for width in (1, 2, 3, 100))


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_batched_products_of_some_images_each(at_once, monkeypatch):
    image = torch.randn(7, 4, 6, 5, dtype=torch.float64)
    gram = BatchedGram((7, 4, 6, 5), (1, 1), (3, 3), (1, 1), (1, 1), 2)
    terms = 2 * math.prod(gram.positions)  # of two images
    monkeypatch.setattr(batched, "ROWS_IN_WORKING_PRECISION", terms)
    monkeypatch.setattr(cost.COSTS["cpu"], "working_set", at_once * 2 * gram.columns * terms * 8)
    products, by_torch = [], Tensor.__matmul__
    monkeypatch.setattr(Tensor, "__matmul__", lambda a, b: products.append(tuple(b.shape)) or by_torch(a, b))
    found = gram(image)
    sizes = [(count, rows) for _, count, rows, _ in products]
    whole = {1: [1, 1, 1], 2: [2, 1], 100: [3]}[at_once]
    assert sizes == [*((count, terms) for count in whole), (1, terms // 2)]
    assert torch.allclose(
        found, (lambda rows: by_torch(rows.mT, rows))(patches(gram.padded(image), (3, 3), (1, 1), (1, 1), 2))
    )


@pytest.mark.parametrize("seed", range(60))
def test_pixels_give_the_kernel_matrix_of_the_patches(seed):
    image, padding, kernel, stride, dilation, groups = drawn(seed)
    shape = (groups, image.shape[1] // groups, *kernel)
    pad = tuple(p for p in padding[::-1] for _ in range(2))
    design = ConvDesign(image, ConvGeometry(shape, stride, dilation, groups, pad, "constant"), (True, False))
    matrix = design._patches(design._padded(), images_last=True)
    assert torch.allclose(design._kernel_by_pixels(torch.float64), matrix @ matrix.mT, rtol=0, atol=1e-10)


CONVOLUTIONS = [name for name in LAYERS if name.startswith("conv") and not name.startswith("conv_transpose")]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # plain layers do so, too
@pytest.mark.parametrize("mode", ["prox_cg2", "prox_exact"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_directions_by_each_form(form, name, mode, monkeypatch):
    for other in FORMS:
        monkeypatch.setattr(other, "cost", 0.0 if other is form else math.inf)
        monkeypatch.setattr(other, "for_cpu", True)
    used = []
    monkeypatch.setattr(form, "__call__", lambda self, x, call=form.__call__: used.append(self) or call(self, x))
    monkeypatch.setattr(ConvDesign, "kernel_cost", math.inf)  # else the dual form would be taken here and there
    monkeypatch.setattr(ConvDesign, "product_cost", math.inf)
    layer, x, gradient = prepared(*LAYERS[name], mode, 0.7)
    actual = directions(layer, [x], gradient)
    assert used
    assert oracle.relative_error(actual, expected(layer, [x], gradient, mode, 0.7)) < 1e-9


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "groups", "form"),
    [
        ((64, 64, 8, 8), 3, 1, 1, PixelGram),
        ((64, 16, 8, 8), 3, 1, 1, StripGram),
        ((32, 96, 8, 8), 7, 1, 96, PairGram),
        ((32, 64, 8, 8), 1, 2, 1, Im2colGram),
        ((32, 96, 8, 8), 2, 2, 1, Im2colGram),
    ],
)
def test_which_form_is_taken(shape, kernel, stride, groups, form):
    pad = (kernel // 2 if stride == 1 else 0,) * 4
    weight = (groups, shape[1] // groups, kernel, kernel)
    geometry = ConvGeometry(weight, (stride,) * 2, (1, 1), groups, pad, "constant")
    for device, expected_form in (("cpu", form), ("meta", BatchedGram)):
        assert type(ConvDesign(torch.randn(shape, device=device), geometry, (True, True))._form) is expected_form


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation", "padding", "left"),
    [
        ((1,), (3,), (1,), (1,), (1,), (1,)),
        ((2, 2), (7, 7), (1, 1), (1, 1), (3, 3), (3, 3)),
        ((2, 8), (7, 7), (1, 1), (1, 1), (3, 3), (3, 7)),
        ((2,), (7,), (2,), (1,), (3,), (3,)),
        ((2,), (3,), (1,), (2,), (2,), (1,)),
        ((2,), (4,), (1,), (1,), (3,), (4,)),  # the first and the last tap both read, at one position each
        ((3,), (3,), (1,), (1,), (0,), (3,)),
    ],
)
def test_taps_that_read_only_zeros_are_left_out(size, kernel, stride, dilation, padding, left):
    pad = tuple(p for p in padding[::-1] for _ in range(2))
    narrowed, _ = ConvGeometry((2, 3, *kernel), stride, dilation, 1, pad, "constant").narrowed(size)
    assert narrowed.kernel_size == left


@pytest.mark.parametrize("mode", ["gradient", "prox_cg2", "prox_exact", "published_cg2"])
@pytest.mark.parametrize("groups", [1, 4])
def test_directions_where_taps_read_only_zeros(groups, mode):
    layer, x, gradient = prepared(
        lambda **k: ProxPropConv2d(4, 4, (5, 7), padding=(2, 3), groups=groups, **k), (3, 4, 1, 2), mode, 0.7
    )
    actual = directions(layer, [x], gradient)
    assert not actual["weight"][:, :, 0].any()
    assert oracle.relative_error(actual, expected(layer, [x], gradient, mode, 0.7)) < 1e-9


@pytest.mark.parametrize("mode", ["prox_cg3", "prox_exact"])
def test_transposed_convolutions_of_many_channels(mode):
    """Whose stacked parameters have another layout than the order of taps before channels."""
    layer, x, gradient = prepared(
        lambda **k: ProxPropConvTranspose2d(64, 2, 3, padding=1, **k), (32, 64, 6, 6), mode, 0.7
    )
    actual = directions(layer, [x], gradient)
    assert oracle.relative_error(actual, expected(layer, [x], gradient, mode, 0.7)) < 1e-9
