"""What the ways to form the Gram matrix of an image's patches have in common, and patches themselves (im2col)."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from proxprop.design.base import accumulation_dtype

ENTRY_COST = 50
"""What it costs to convert and sum an entry of a product, in multiply-adds (measured on a CPU)."""


@dataclasses.dataclass(frozen=True)
class ImageGram(abc.ABC):
    """A way to compute AᵀA, with the patches of images of one shape as A's rows.

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
    for_cpu: ClassVar[bool] = True
    """Whether it is for a CPU, and not for other devices."""

    @property
    @abc.abstractmethod
    def cost(self) -> float:
        """Multiply-adds of the products, and what all else costs in such terms."""

    @abc.abstractmethod
    def __call__(self, image: Tensor) -> Tensor:
        """The Gram matrices ``[groups, d, d]`` with d = C/groups·taps, in the accumulation precision."""

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def channels(self) -> int:
        """Of a group."""
        return self.shape[1] // self.groups

    @property
    def columns(self) -> int:
        """d, of a group."""
        return self.channels * math.prod(self.kernel)

    @property
    def padded_size(self) -> tuple[int, ...]:
        return tuple(size + 2 * pad for size, pad in zip(self.shape[2:], self.padding, strict=True))

    @property
    def positions(self) -> tuple[int, ...]:
        """How many the kernel takes along each dimension."""
        return output_positions(self.padded_size, self.kernel, self.stride, self.dilation)

    def padded(self, image: Tensor) -> Tensor:
        if not any(self.padding):
            return image
        return torch.nn.functional.pad(image, [pad for pad in self.padding[::-1] for _ in range(2)])


def output_positions(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """How many positions a kernel takes along each dimension of an unpadded image."""
    return tuple(
        (length - step * (taps - 1) - 1) // hop + 1
        for length, taps, hop, step in zip(size, kernel, stride, dilation, strict=True)
    )


def windows(image: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """A view ``[*, *positions, *kernel]`` of ``image`` ``[*, *spatial]``."""
    first = image.dim() - len(kernel)
    for axis, (taps, hop, step) in enumerate(zip(kernel, stride, dilation, strict=True), start=first):
        image = image.unfold(axis, step * (taps - 1) + 1, hop)[..., ::step]
    return image


def patches(
    image: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    taps_first: bool = False,
    images_last: bool = False,
) -> Tensor:
    """im2col: ``image`` ``[N, C, *spatial]`` to ``[groups, N·positions, C/groups·taps]``, or in other orders."""
    spatial, channels = len(kernel), image.shape[1] // groups
    grouped = image.reshape(image.shape[0], groups, channels, *image.shape[2:])
    view = windows(grouped, kernel, stride, dilation)  # [N, g, c, *positions, *kernel]
    positions = range(3, 3 + spatial)
    taps = range(3 + spatial, 3 + 2 * spatial)
    rows = image.shape[0] * math.prod(view.shape[3 : 3 + spatial])
    columns = (*taps, 2) if taps_first else (2, *taps)
    order = (*positions, 0) if images_last else (0, *positions)
    return view.permute(1, *order, *columns).reshape(groups, rows, channels * math.prod(kernel))


def patch_sums(
    image: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], pad: Sequence[int] = ()
) -> Tensor:
    """The sum of all patches: ``image`` ``[N, C, *spatial]`` to ``[C, *kernel]`` in the accumulation precision.

    ``pad`` is what ``torch.nn.functional.pad`` takes, zeros that ``image`` still lacks.
    """
    total = image.sum(0, dtype=accumulation_dtype(image))  # [C, *spatial]
    if any(pad):
        total = torch.nn.functional.pad(total, list(pad))
    return windows(total, kernel, stride, dilation).sum(tuple(range(1, 1 + len(kernel))))
