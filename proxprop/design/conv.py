"""The design matrix of a convolution: its rows are the input's patches (im2col), which are hardly ever stored."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from proxprop.design.base import SYMMETRIC, MatrixDesign, Parameters, accumulation_dtype, symmetric_product
from proxprop.design.image_gram import (
    ENTRY_COST,
    ImageGram,
    PairGram,
    PixelGram,
    StripGram,
    cheapest_gram,
    output_positions,
    patch_sums,
    patches,
)
from proxprop.design.shared import SharedProducts

PATCH_ELEMENTS = 2**26
"""How many elements of patches are held at a time (256 MiB in float32)."""

FEW_CHANNELS = 16
"""With c channels, a convolution takes 1 + FEW_CHANNELS/c times as long as a large matrix product (on a CPU)."""


@dataclasses.dataclass(frozen=True)
class ConvGeometry:
    """How a convolution reads its input; one entry for each spatial dimension.

    ``pad`` and ``pad_mode`` are what ``torch.nn.functional.pad`` takes: two numbers a dimension, the last dimension
    first.
    """

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    pad: tuple[int, ...]
    pad_mode: str

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self.weight_shape[2:]

    def narrowed(self, size: Sequence[int]) -> tuple[ConvGeometry, tuple[int, ...]]:
        """Without the outermost taps that read nothing but zeros from images of that size, and how many those are.

        As many are left out on either side, for each dimension. Their columns of A are zero, and so is D.
        """
        if self.zero_padding is None or torch.compiler.is_compiling():
            return self, (0,) * len(size)
        counts = []
        for length, pad, taps, hop, step in zip(
            size, self.zero_padding, self.kernel_size, self.stride, self.dilation, strict=True
        ):
            (positions,) = output_positions((length + 2 * pad,), (taps,), (hop,), (step,))
            read = [
                any(0 <= pixel < length for pixel in range(start, start + hop * positions, hop))
                for start in range(-pad, step * taps - pad, step)
            ]
            at_most = min((taps - 1) // 2, pad // step)
            counts.append(next((i for i in range(at_most) if read[i] or read[-1 - i]), at_most))
        padding = tuple(p - c * s for p, c, s in zip(self.zero_padding, counts, self.dilation, strict=True))
        kernel = (taps - 2 * count for taps, count in zip(self.kernel_size, counts, strict=True))
        twice = tuple(p for p in padding[::-1] for _ in range(2))
        return dataclasses.replace(self, weight_shape=(*self.weight_shape[:2], *kernel), pad=twice), tuple(counts)

    @property
    def zero_padding(self) -> tuple[int, ...] | None:
        """The padding as a convolution's own argument, if that can express it."""
        before, after = self.pad[-2::-2], self.pad[::-2]
        return before if self.pad_mode == "constant" and before == after else None


class ConvDesign(MatrixDesign):
    """A for a convolution of any number of spatial dimensions, stride, dilation, groups and padding.

    Each group has its own block of rows ``[patch 1]``; m is batch times output positions.

    Args:
        input: The layer's input, ``[N, C, *spatial]`` or unbatched ``[C, *spatial]``.
        geometry: How the convolution reads it.
        trained: Whether the weight and whether the bias is trained.
        shared: What layers with the same input have computed of it.
    """

    precise_right = 6.0

    def __init__(
        self,
        input: Tensor,
        geometry: ConvGeometry,
        trained: Sequence[bool],
        shared: SharedProducts | None = None,
    ) -> None:
        spatial = len(geometry.kernel_size)
        geometry, self._unread = geometry.narrowed(input.shape[-spatial:])
        super().__init__(input, geometry.weight_shape, geometry.groups, trained, shared)
        batched = (input if input.dim() == spatial + 2 else input[None]).to(self.dtype)
        if geometry.zero_padding is None:
            self.input = torch.nn.functional.pad(batched, geometry.pad, geometry.pad_mode)
            self.padding, self.remaining_pad = (0,) * spatial, (0,) * 2 * spatial
        else:
            self.input = batched
            self.padding, self.remaining_pad = geometry.zero_padding, geometry.pad
        self.geometry = geometry
        padded = [size + 2 * pad for size, pad in zip(self.input.shape[2:], self.padding, strict=True)]
        self.positions = output_positions(padded, *self._taps)
        self.rows = batched.shape[0] * math.prod(self.positions)
        shape = tuple(self.input.shape)
        self._form: ImageGram = cheapest_gram(shape, self.padding, *self._taps, geometry.groups, self.device)

    @property
    def _taps(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return self.geometry.kernel_size, self.geometry.stride, self.geometry.dilation

    @property
    def full_shape(self) -> tuple[int, ...]:
        kernel = (size + 2 * count for size, count in zip(self.geometry.kernel_size, self._unread, strict=True))
        return (*self.weight_shape[:2], *kernel)

    def places(self) -> Tensor | None:
        if not (self.train_weight and (self._form.taps_first or any(self._unread))):
            return None
        count = math.prod(self.full_shape[1:])
        weight = torch.arange(count, device=self.device).reshape(1, *self.full_shape[1:])
        columns = self._ordered(self._narrow(weight).flatten(1))[0]
        return torch.cat([columns, columns.new_full((int(self.train_bias),), count)])

    def stack(self, parameters: Parameters) -> Tensor:
        weight, bias = parameters
        if weight is not None and (self._form.taps_first or any(self._unread)):
            weight = self._ordered(self._narrow(weight).flatten(1))
        return super().stack((weight, bias))

    def unstack(self, stacked: Tensor) -> Parameters:
        weight, bias = super().unstack(stacked)
        if self._form.taps_first and weight is not None:
            weight = weight.reshape(weight.shape[0], -1, weight.shape[1]).mT.reshape(self.weight_shape)
        return None if weight is None else self._widened(weight), bias

    def _narrow(self, weight: Tensor) -> Tensor:
        """The taps that read something, ``[o, c, *narrowed]`` of a layer's weight."""
        for axis, count in enumerate(self._unread, start=2):
            weight = weight.narrow(axis, count, weight.shape[axis] - 2 * count)
        return weight

    def _widened(self, weight: Tensor) -> Tensor:
        """The inverse of ``_narrow``, with zeros."""
        if not any(self._unread):
            return weight
        return torch.nn.functional.pad(weight, [count for count in self._unread[::-1] for _ in range(2)])

    def _ordered(self, columns: Tensor) -> Tensor:
        """Columns ``[*, channels·taps]`` in the order that the Gram matrix has them in."""
        if not self._form.taps_first:
            return columns
        shape = columns.shape[:-1]
        return columns.reshape(*shape, self.weight_shape[1], -1).mT.reshape(*shape, -1)

    def _image(self) -> Tensor:
        """What patches are cut from, without its padding by ``remaining_pad``."""
        return self.input

    def _padded(self) -> Tensor:
        """The input with all of its padding, ``[N, C, *padded]``."""
        if not any(self.remaining_pad):
            return self.input
        return torch.nn.functional.pad(self.input, self.remaining_pad)

    def _arguments(self) -> tuple[object, ...]:
        """Stride, padding, dilation, transposed, output padding and groups, as ATen takes them."""
        geometry = self.geometry
        zeros = [0] * len(self.padding)
        return list(geometry.stride), list(self.padding), list(geometry.dilation), False, zeros, geometry.groups

    def apply(self, parameters: Parameters) -> Tensor:
        weight, bias = parameters
        if weight is None:
            assert bias is not None
            shape = (self.input.shape[0], -1, *self.positions)
            return bias.reshape(1, -1, *(1 for _ in self.positions)).expand(shape)
        # The last argument keeps cuDNN from TF32, which it would use by default.
        flags = torch.backends.cudnn
        result: Tensor = torch.ops.aten._convolution(
            self.input,
            self._narrow(weight),
            bias,
            *self._arguments(),
            flags.benchmark,
            flags.deterministic,
            flags.enabled,
            False,
        )
        return result

    def _batched(self, output: Tensor) -> Tensor:
        return output.reshape(self.input.shape[0], self.weight_shape[0], *self.positions)

    def _products(self, input: Tensor, output: Tensor) -> Parameters:
        weight = bias = None
        if self.train_weight:
            like = self.layout(input.new_empty(self.weight_shape))
            _, weight, _ = torch.ops.aten.convolution_backward(
                output, input, like, None, *self._arguments(), [False, True, False]
            )
            weight = self._widened(weight)
        if self.train_bias:
            bias = output.transpose(0, 1).reshape(self.weight_shape[0], -1).sum(1)
        return weight, bias

    # In a solve no weight gradient of cuDNN's, which would use TF32; matrix products do so only if told to.

    def right_hand_side(self, output: Tensor, precise: bool = True) -> Tensor:
        if self.device.type == "cpu":
            return super().right_hand_side(output, precise)
        return self._by_patches(output, accumulation_dtype(output) if precise else self.dtype)

    def stacked_adjoint(self, output: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return super().stacked_adjoint(output)
        return self._by_patches(output, self.dtype).to(self.dtype)

    def direction_of(self, output: Tensor) -> Parameters:
        if self.device.type == "cpu":
            return super().direction_of(output)
        return self.unstack(self.stacked_adjoint(output))

    def _by_patches(self, output: Tensor, dtype: torch.dtype) -> Tensor:
        """The right-hand side by matrix products in precision ``dtype``, image by image."""
        largest = self.groups * self.columns * max(self.rows // self.input.shape[0], self.outputs)  # of an image
        images = max(1, PATCH_ELEMENTS // max(1, largest))
        total = torch.zeros((), dtype=accumulation_dtype(output), device=self.device)
        inputs, outputs = (torch.split(tensor, images) for tensor in (self._padded(), self._batched(output)))
        for input, part in zip(inputs, outputs, strict=True):
            matrices = self._patches(input.to(dtype)).reshape(self.groups, input.shape[0], -1, self.columns)
            part = part.to(dtype).reshape(input.shape[0], self.groups, self.outputs, -1).transpose(0, 1)
            total = total + (part @ matrices).sum(1, dtype=total.dtype)  # [g, o, d]
        return total

    def squared_norms(self, output: Tensor) -> Tensor:
        squares = self._batched(output).square().transpose(0, 1).reshape(self.weight_shape[0], -1)
        return squares.sum(1).reshape(self.groups, self.outputs, 1)

    def trace(self) -> Tensor:
        squares = patch_sums(self._padded().to(accumulation_dtype(self.input)).square(), *self._taps).sum()
        return squares * int(self.train_weight) + self.groups * self.rows * int(self.train_bias)

    @property
    def gram_cost(self) -> float:
        return self._form.cost if self.train_weight else 0.0

    @property
    def precise_gram(self) -> bool:
        """Whether the Gram matrix is made of float64 products: where they cost less than the layer's back-propagation.

        That is so for few channels, and first layers need it: raw pixels have the worst condition.
        """
        if isinstance(self._form, PixelGram):
            return False
        if isinstance(self._form, (StripGram, PairGram)):
            return 2 * self.gram_cost <= 3 * self.rows * self.weight_columns * self.weight_shape[0]
        # Else the solution has to be looked at, and mostly refined by two products.
        return self.gram_cost <= 2 * self.product_cost

    @property
    def _reading(self) -> tuple[Hashable, ...]:
        one_output = (1, *self.geometry.weight_shape[1:])
        geometry = dataclasses.replace(self.geometry, weight_shape=one_output)
        return self.train_weight, self.train_bias, geometry, self.precise_gram

    @property
    def rough_gram(self) -> bool:
        return not self.precise_gram and self.dtype != accumulation_dtype(self.input)

    def _gram(self, dtype: torch.dtype, precise: bool) -> Tensor:
        return self._accumulated_gram(precise or self.precise_gram).to(dtype)

    def _accumulated_gram(self, precise: bool) -> Tensor:
        dtype = accumulation_dtype(self.input)
        count = torch.full((self.groups, 1, 1), self.rows, dtype=dtype, device=self.device)
        if not self.train_weight:
            return count
        image = self._image()
        weights = self._form(image.to(dtype) if precise else image)  # [g, d, d]
        if not self.train_bias:
            return weights
        sums = patch_sums(image, *self._taps, self.remaining_pad).reshape(self.groups, 1, self.weight_columns)
        sums = self._ordered(sums).mT
        return torch.cat([torch.cat([weights, sums], -1), torch.cat([sums.mT, count], -1)], -2)

    def matrix(self) -> Tensor:
        return self._patches(self._padded())

    def _kernel(self, dtype: torch.dtype) -> Tensor:
        if not torch.compiler.is_compiling() and self._pixel_kernel_cost < self._patch_kernel_cost:
            return self._kernel_by_pixels(dtype).add_(int(self.train_bias))
        return self._squared(self._patches(self._padded(), images_last=True).to(dtype))

    def _squared(self, matrix: Tensor) -> Tensor:
        """``[g, m, n]`` times its transpose."""
        return symmetric_product(matrix[0])[None] if self.groups == 1 else matrix @ matrix.mT

    @property
    def product_cost(self) -> float:
        channels = min(self.weight_shape[1], self.outputs)
        return self.groups * self.rows * self.columns * self.outputs * (1 + FEW_CHANNELS / channels)

    @property
    def kernel_cost(self) -> float:
        return self.groups * min(self._pixel_kernel_cost, self._patch_kernel_cost)

    @property
    def _patch_kernel_cost(self) -> float:
        return SYMMETRIC * self.rows**2 * self.columns

    @property
    def _pixel_kernel_cost(self) -> float:
        """Infinite for products of no weights."""
        pixels = self.input.shape[0] * math.prod(self.input.shape[2:])
        sums = math.prod(self.geometry.kernel_size) * self.rows**2 * ENTRY_COST
        return SYMMETRIC * pixels**2 * self.weight_shape[1] + sums if self.train_weight else math.inf

    def _kernel_by_pixels(self, dtype: torch.dtype) -> Tensor:
        """Products of patches as sums over the products of pixels at the same tap, ``[g, m, m]``."""
        batch, _, *spatial = self.input.shape
        pixels = self.input.to(dtype).reshape(batch, self.groups, -1, math.prod(spatial))
        pixels = pixels.permute(1, 3, 0, 2).reshape(self.groups, math.prod(spatial) * batch, -1)
        products = self._squared(pixels).reshape(self.groups, *spatial, batch, *spatial, batch)
        shape = (self.groups, *self.positions, batch, *self.positions, batch)
        kernel = torch.zeros(shape, dtype=dtype, device=self.device)
        every = (slice(None),)
        for taps in itertools.product(*map(range, self.geometry.kernel_size)):
            axes = zip(taps, spatial, self.positions, self.padding, *self._taps[1:], strict=True)
            ends = [_read(tap * step - pad, size, count, hop) for tap, size, count, pad, hop, step in axes]
            to, read = (tuple(end[side] for end in ends) for side in range(2))
            kernel[every + to + every + to] += products[every + read + every + read]
        return kernel.reshape(self.groups, self.rows, self.rows)

    def to_rows(self, output: Tensor) -> Tensor:
        # Images last, so that sums of kernels run over long stretches of memory.
        output = self._batched(output)
        grouped = output.reshape(output.shape[0], self.groups, self.outputs, -1)
        return grouped.permute(1, 2, 3, 0).reshape(self.groups, self.outputs, self.rows)

    def from_rows(self, rows: Tensor) -> Tensor:
        grouped = rows.reshape(self.groups, self.outputs, -1, self.input.shape[0])
        return grouped.permute(3, 0, 1, 2).reshape(self.input.shape[0], -1, *self.positions)

    def sums(self, weights: Tensor, output: Tensor) -> Tensor:
        # Without the rows, which are a copy in another order.
        grouped = self._batched(output).reshape(self.input.shape[0], self.groups, self.outputs, -1)
        return (weights @ grouped).reshape(self.input.shape[0], -1, *self.positions)

    def _patches(self, padded: Tensor, images_last: bool = False) -> Tensor:
        """The rows of A for some padded images, ``[g, rows, d]``."""
        parts = []
        if self.train_weight:
            parts.append(patches(padded, *self._taps, self.groups, self._form.taps_first, images_last))
        if self.train_bias:
            rows = padded.shape[0] * math.prod(self.positions)
            parts.append(padded.new_ones(self.groups, rows, 1))
        return torch.cat(parts, dim=-1)


def _read(first: int, size: int, positions: int, hop: int) -> tuple[slice, slice]:
    """Where a tap reads pixels of the image along one axis: which output positions do so, and which pixels they read.

    Args:
        first: The pixel that the first position would read.
        size, positions: How many of each there are.
        hop: The stride.
    """
    start = max(0, -(first // hop))
    end = max(start, min(positions, (size - 1 - first) // hop + 1))
    return slice(start, end), slice(first + start * hop, first + end * hop if end > start else first + start * hop, hop)
