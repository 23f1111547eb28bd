"""Rows of a batch that are padding, and have no part in a step."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor


@dataclasses.dataclass
class _Mask:
    mask: Tensor
    used: bool = False
    unlike: torch.Size | None = None
    """Of an input that it did not apply to."""

    def __post_init__(self) -> None:
        self.rows = self.mask.flatten()  # once: layers with the same rows of an input share products


_active: _Mask | None = None  # no context variable, which compilers do not know


@contextlib.contextmanager
def row_mask(mask: Tensor) -> Iterator[None]:
    """In forward passes within, leave rows of linear layers and embeddings out of their step: padded tokens, say.

    A row of padding has an input, so it counts in AᵀA, and shortens the step although it says nothing. Left out, the
    step is that of a batch without such rows; a gradient that they have is left out of the layer's, too. The mask
    applies to ``ProxPropLinear`` layers with inputs ``[*mask.shape, features]`` (so, too, to ``Conv1D`` of
    transformers), to ``ProxPropEmbedding`` layers with inputs shaped as the mask, and to both with these rows in one
    dimension. To choose rows makes the host wait for a GPU; in compiled code the layers run uncompiled.

    Args:
        mask: True for the rows that count, for example ``[N, T]``.

    Example:
        >>> with proxprop.row_mask(tokens != padding):
        ...     output = model(tokens)

    Raises:
        TypeError: if ``mask`` is no tensor of booleans.
        ValueError: at the end, if layers in training had inputs of other shapes alone.
    """
    global _active
    if not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
        raise TypeError(
            f"row_mask takes a tensor of booleans, got {mask.dtype if isinstance(mask, Tensor) else type(mask)}"
        )
    before, _active = _active, _Mask(mask)
    try:
        yield
        if _active.unlike is not None and not _active.used:
            raise ValueError(
                f"row_mask: a mask {list(mask.shape)} wants inputs {[*mask.shape, 'features']} of a ProxPropLinear "
                f"or {list(mask.shape)} of a ProxPropEmbedding, got {list(_active.unlike)}"
            )
    finally:
        _active = before


def is_masking() -> bool:
    """Whether there is a mask, which may apply."""
    return _active is not None


def masked_rows(input: Tensor, shape: torch.Size) -> Tensor | None:
    """Which rows of ``input`` have a part in the step, ``[m]``; None for all. They are shaped as ``shape``."""
    if _active is None:
        return None
    if shape not in (_active.mask.shape, _active.rows.shape):
        _active.unlike = input.shape
        return None
    _active.used = True
    return _active.rows
