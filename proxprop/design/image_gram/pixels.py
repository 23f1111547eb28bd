"""By products of single pixels: for many channels.

An entry depends on which two taps of the kernel it belongs to only through their distance, and through the rows and
columns that the first of them runs over. So for each distance, one batched product over the batch and the columns that
all such pairs of taps share, and small ones for the few columns that some have alone, give all entries as sums. A 3×3
kernel with stride 1 has 13 distances (but for sign), where its patches have 81 pairs. Padding with zeros costs nothing.
Strips (``StripGram``) make larger products of more operations, which is faster for few channels.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from proxprop.design.base import accumulation_dtype
from proxprop.design.image_gram.base import ENTRY_COST, ImageGram

FEWEST_CHANNELS = 48
"""With fewer, products are too small to be fast."""

TERMS = 2048
"""How many terms of a sum are in the image's precision. (Strips come out with about as many.)"""

CALL_COST = 1.2e6
"""What calling one product costs, in multiply-adds (measured on a CPU)."""


@dataclasses.dataclass(frozen=True)
class _Segment:
    """Some pixels along one axis, a stride apart, and the first taps of the pairs whose sums they belong to."""

    start: int
    count: int
    taps: tuple[int, ...]


class PixelGram(ImageGram):
    """Computes AᵀA from single pixels."""

    taps_first: ClassVar[bool] = True

    @property
    def cost(self) -> float:
        """Infinite where products would be small."""
        return _cost(self) if self.channels >= FEWEST_CHANNELS else math.inf

    def __call__(self, image: Tensor) -> Tensor:
        batch, channels = self.batch, self.channels
        taps, spatial = math.prod(self.kernel), self.shape[2:]
        gram = torch.zeros(
            (self.groups, taps, channels, taps, channels), dtype=accumulation_dtype(image), device=image.device
        )
        # Transposing a matrix is faster than permuting a tensor.
        pixels = image.reshape(batch * self.shape[1], -1).T.contiguous()
        pixels = pixels.reshape(*spatial, batch, self.groups, channels)
        hop = self.stride[-1]
        if hop > 1:
            columns = [pixels[(slice(None),) * (len(spatial) - 1) + (slice(first, None, hop),)] for first in range(hop)]
            pixels = torch.cat(columns, dim=len(spatial) - 1)
        rows = pixels.flatten(len(spatial) - 1, len(spatial)).transpose(-3, -2).contiguous()  # [*, g, columns·N, c]
        for offset in self._offsets():
            for (i, j), block in self._blocks(rows, offset).items():
                gram[:, i, :, j] = block
                if i != j:
                    gram[:, j, :, i] = block.mT
        return gram.reshape(self.groups, self.columns, self.columns)

    def _offsets(self) -> Iterator[tuple[int, ...]]:
        """Differences of two kernel positions, one of each pair ±offset (the Gram matrix is symmetric)."""
        for offset in itertools.product(*(range(1 - taps, taps) for taps in self.kernel)):
            if offset >= (0,) * len(offset):
                yield offset

    def _segments(self, axis: int, delta: int) -> list[_Segment]:
        """The pixels along ``axis`` of all pairs of taps that are ``delta`` apart, each once."""
        taps = range(max(0, -delta), self.kernel[axis] - max(0, delta))
        hop, step, size = self.stride[axis], self.dilation[axis], self.shape[2 + axis]
        count = self.positions[axis]
        readers: dict[int, list[int]] = {}
        for tap in taps:
            start = step * tap - self.padding[axis]
            for pixel in range(start, start + hop * count, hop):
                if 0 <= pixel < size and 0 <= pixel + step * delta < size:
                    readers.setdefault(pixel, []).append(tap)
        segments: list[_Segment] = []
        for pixel, members in sorted(readers.items(), key=lambda item: (item[0] % hop, item[0])):
            last = segments[-1] if segments else None
            if last and last.start + hop * last.count == pixel and last.taps == tuple(members):
                segments[-1] = dataclasses.replace(last, count=last.count + 1)
            else:
                segments.append(_Segment(pixel, 1, tuple(members)))
        return segments

    def _rows(self, outer: Sequence[int]) -> dict[tuple[tuple[int, ...], ...], list[tuple[int, ...]]]:
        """Image rows, as indices of all but the last axis, by the first taps that read them."""
        rows: dict[tuple[tuple[int, ...], ...], list[tuple[int, ...]]] = {}
        for segments in itertools.product(*(self._segments(axis, delta) for axis, delta in enumerate(outer))):
            pixels = (range(s.start, s.start + h * s.count, h) for s, h in zip(segments, self.stride, strict=False))
            rows.setdefault(tuple(s.taps for s in segments), []).extend(itertools.product(*pixels))
        return rows

    def _place(self, pixel: int) -> int:
        """Where a column of the image lies in a row: those a stride apart are neighbours."""
        hop, size = self.stride[-1], self.shape[-1]
        return sum(len(range(first, size, hop)) for first in range(pixel % hop)) + pixel // hop

    def _blocks(self, image: Tensor, offset: tuple[int, ...]) -> dict[tuple[int, int], Tensor]:
        """The blocks ``[g, c, c]`` of all pairs of taps that are ``offset`` apart, by their indices."""
        *outer, inner = offset
        blocks: dict[tuple[int, int], Tensor] = {}
        for segment in self._segments(len(outer), inner):
            for taps, rows in self._rows(outer).items():
                total = self._products(image, rows, segment, offset)
                for first in itertools.product(*taps, segment.taps):
                    second = tuple(tap + delta for tap, delta in zip(first, offset, strict=True))
                    pair = self._flat(first), self._flat(second)
                    blocks[pair] = blocks[pair] + total if pair in blocks else total
        return blocks

    def _products(
        self, image: Tensor, rows: list[tuple[int, ...]], segment: _Segment, offset: tuple[int, ...]
    ) -> Tensor:
        """Products of a segment of some rows with what lies at ``offset`` from it, ``[g, c, c]``.

        They are summed in the image's precision over a few thousand terms, and then in the accumulation precision.
        """
        batch, step = self.batch, self.dilation
        *up, along = [hop * delta for hop, delta in zip(step, offset, strict=True)]
        first, second = self._place(segment.start), self._place(segment.start + along)
        at_once = max(1, TERMS // max(1, batch))
        total: Tensor | None = None
        part: Tensor | None = None
        terms = 0
        for row in rows:
            one, other = image[row], image[tuple(a + b for a, b in zip(row, up, strict=True))]  # [g, columns·N, c]
            for start in range(0, segment.count, at_once):
                count = min(at_once, segment.count - start)
                left = one.narrow(1, (first + start) * batch, count * batch).mT
                right = other.narrow(1, (second + start) * batch, count * batch)
                if part is not None and terms + count <= at_once:
                    part.baddbmm_(left, right)
                    terms += count
                    continue
                if part is not None:
                    total = part.to(accumulation_dtype(image)) if total is None else total.add_(part)
                part, terms = left @ right, count
        assert part is not None
        return part.to(accumulation_dtype(image)) if total is None else total.add_(part)

    def _flat(self, tap: tuple[int, ...]) -> int:
        """The index of a kernel position."""
        index = 0
        for position, taps in zip(tap, self.kernel, strict=True):
            index = index * taps + position
        return index


@functools.lru_cache(maxsize=1024)
def _cost(gram: PixelGram) -> float:
    batch, channels = gram.batch, gram.channels
    terms, calls, sums = 0, 0, 0
    for *outer, inner in gram._offsets():
        segments, rows = gram._segments(len(outer), inner), gram._rows(outer)
        count = sum(map(len, rows.values()))
        terms += batch * count * sum(s.count for s in segments)
        calls += count * len(segments)
        sums += sum(math.prod(map(len, taps)) for taps in rows) * sum(len(s.taps) for s in segments)
    sorting = ENTRY_COST * math.prod(gram.shape)
    return gram.groups * channels**2 * (terms + ENTRY_COST * sums) + CALL_COST * calls + sorting
