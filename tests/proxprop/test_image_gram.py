"""The Gram and kernel matrices of images against those of their patches, and whole directions made with each form."""

import math
import random

import oracle
import pytest
import torch
from test_directions import LAYERS, directions, expected, prepared

from proxprop import ProxPropConv2d, cost
from proxprop.design import ConvDesign, ConvGeometry, im2col_gram, pixel_gram
from proxprop.design.im2col_gram import Im2colGram
from proxprop.design.pair_gram import PairGram
from proxprop.design.patch_gram import PatchGram, patches
from proxprop.design.pixel_gram import PixelGram


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
    return image, padding, kernel, stride, dilation, groups


@pytest.mark.parametrize("seed", range(60))
def test_pixels_give_the_gram_matrix_of_the_patches(seed, monkeypatch):
    image, padding, kernel, stride, dilation, groups = drawn(seed)
    padded = torch.nn.functional.pad(image, [p for p in padding[::-1] for _ in range(2)])
    matrix = patches(padded, kernel, stride, dilation, groups, taps_first=True)
    for terms in (pixel_gram.TERMS, 2 * image.shape[0]):  # whole rows of the image in one product, or two columns
        monkeypatch.setattr(pixel_gram, "TERMS", terms)
        reading = (tuple(each) for each in (image.shape, padding, kernel, stride, dilation))
        gram = PixelGram(*reading, groups)(image)
        assert torch.allclose(gram, matrix.mT @ matrix, rtol=0, atol=1e-10)


@pytest.mark.parametrize("working_set", [1, 2**23])  # the pairs of one group at a time, and of all
@pytest.mark.parametrize("seed", range(60))
def test_pairs_of_pixels_give_the_gram_matrix_of_the_patches(seed, working_set, monkeypatch):
    monkeypatch.setattr(cost.COSTS["cpu"], "working_set", working_set)
    image, padding, kernel, stride, dilation, groups = drawn(seed)
    padded = torch.nn.functional.pad(image, [p for p in padding[::-1] for _ in range(2)])
    matrix = patches(padded, kernel, stride, dilation, groups)
    reading = (tuple(each) for each in (image.shape, padding, kernel, stride, dilation))
    assert torch.allclose(PairGram(*reading, groups)(image), matrix.mT @ matrix, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(60))
def test_patches_image_by_image_give_the_gram_matrix_of_all(seed, monkeypatch):
    monkeypatch.setattr(im2col_gram, "ROWS_IN_WORKING_PRECISION", 1)
    image, _, _, stride, dilation, groups = drawn(seed)
    kernel = [min(2, size) for size in image.shape[2:]]
    dilation = [1 if size < 3 else step for size, step in zip(image.shape[2:], dilation, strict=True)]
    matrix = patches(image, kernel, stride, dilation, groups)
    reading = (tuple(each) for each in (image.shape, kernel, stride, dilation))
    assert torch.allclose(Im2colGram(*reading, groups)(image), matrix.mT @ matrix, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(60))
def test_pixels_give_the_kernel_matrix_of_the_patches(seed):
    image, padding, kernel, stride, dilation, groups = drawn(seed)
    shape = (groups, image.shape[1] // groups, *kernel)
    pad = tuple(p for p in padding[::-1] for _ in range(2))
    design = ConvDesign(
        image, ConvGeometry(shape, tuple(stride), tuple(dilation), groups, pad, "constant"), (True, False)
    )
    matrix = design._patches(design._padded(), images_last=True)
    assert torch.allclose(design._kernel_by_pixels(torch.float64), matrix @ matrix.mT, rtol=0, atol=1e-10)


CONVOLUTIONS = [name for name in LAYERS if name.startswith("conv") and not name.startswith("conv_transpose")]


FORMS = [PatchGram, PixelGram, PairGram, Im2colGram]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # plain layers do so, too
@pytest.mark.parametrize("mode", ["prox_cg2", "prox_exact"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_directions_by_each_form(form, name, mode, monkeypatch):
    for other in FORMS:
        monkeypatch.setattr(other, "cost", 0.0 if other is form else math.inf)
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
        ((64, 16, 8, 8), 3, 1, 1, PatchGram),
        ((32, 96, 8, 8), 7, 1, 96, PairGram),
        ((32, 64, 8, 8), 1, 2, 1, Im2colGram),
        ((32, 96, 8, 8), 2, 2, 1, Im2colGram),
    ],
)
def test_which_form_is_taken(shape, kernel, stride, groups, form):
    pad = (kernel // 2 if stride == 1 else 0,) * 4
    weight = (groups, shape[1] // groups, kernel, kernel)
    geometry = ConvGeometry(weight, (stride,) * 2, (1, 1), groups, pad, "constant")
    assert type(ConvDesign(torch.randn(shape), geometry, (True, True))._patch_gram) is form


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
