"""Ways to form the Gram matrix of an image's patches, one a file, and which of them is cheapest."""

from __future__ import annotations

import torch

from proxprop.design.image_gram.base import ENTRY_COST, ImageGram, output_positions, patch_sums, patches
from proxprop.design.image_gram.batched import BatchedGram
from proxprop.design.image_gram.im2col import Im2colGram
from proxprop.design.image_gram.pairs import PairGram
from proxprop.design.image_gram.pixels import PixelGram
from proxprop.design.image_gram.strips import StripGram

__all__ = [
    "ENTRY_COST",
    "FORMS",
    "BatchedGram",
    "Im2colGram",
    "ImageGram",
    "PairGram",
    "PixelGram",
    "StripGram",
    "cheapest_gram",
    "output_positions",
    "patch_sums",
    "patches",
]

FORMS: tuple[type[ImageGram], ...] = (StripGram, PixelGram, PairGram, Im2colGram, BatchedGram)


def cheapest_gram(
    shape: tuple[int, ...],
    padding: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    device: torch.device,
) -> ImageGram:
    """That of the device's ``FORMS`` which costs least, for what ``ImageGram`` takes."""
    reading = shape, padding, kernel, stride, dilation, groups
    on_cpu = device.type == "cpu"
    if on_cpu and torch.compiler.is_compiling():  # would trace all that the others count and sort at first
        return StripGram(*reading)
    of_device = (form(*reading) for form in FORMS if form.for_cpu == on_cpu)
    return min(of_device, key=lambda gram: gram.cost)
