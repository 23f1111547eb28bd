"""Rows of a batch that are padding, and have no part in a step."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

import torch
from torch import Tensor


@dataclasses.dataclass(eq=False)
class _Mask:
    shape: torch.Size
    rows: Tensor
    """Flat, and one tensor for all layers: those with the same rows of an input share products."""
    used: bool = False
    unlike: torch.Size | None = None
    """Of an input that it did not apply to."""


_own = threading.local()
"""``masks`` are those that its thread is within, the innermost last. No context variable: older compilers know none."""

_open: set[_Mask] = set()
"""Those of all threads."""


@contextlib.contextmanager
def row_mask(mask: Tensor) -> Iterator[None]:
    """In forward passes within, leave rows of linear layers and embeddings out of their step: padded tokens, say.

    A row of padding has an input, so it counts in AᵀA, and shortens the step although it says nothing. Left out, the
    step is that of a batch without such rows; a gradient that they have is left out of the layer's, too. The mask
    applies to ``ProxPropLinear`` layers with inputs ``[*mask.shape, features]`` (so, too, to ``Conv1D`` of
    transformers), to ``ProxPropEmbedding`` layers with inputs shaped as the mask, and to both with these rows in one
    dimension. To choose rows makes the host wait for a GPU; in compiled code the layers run uncompiled. A mask is that
    of its thread.

    Args:
        mask: True for the rows that count, for example ``[N, T]``. It may change thereafter.

    Example:
        >>> with proxprop.row_mask(tokens != padding):
        ...     output = model(tokens)

    Raises:
        TypeError: if ``mask`` is no tensor of booleans.
        ValueError: at the end, if layers in training had inputs of other shapes alone.
    """
    if not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
        raise TypeError(
            f"row_mask takes a tensor of booleans, got {mask.dtype if isinstance(mask, Tensor) else type(mask)}"
        )
    own = _Mask(mask.shape, mask.flatten().clone())
    masks: list[_Mask] = vars(_own).setdefault("masks", [])
    masks.append(own)
    _open.add(own)
    try:
        yield
        if own.unlike is not None and not own.used:
            raise ValueError(
                f"row_mask: a mask {list(mask.shape)} wants inputs {[*mask.shape, 'features']} of a ProxPropLinear "
                f"or {list(mask.shape)} of a ProxPropEmbedding, got {list(own.unlike)}"
            )
    finally:
        masks.remove(own)  # which need not be the last: generators may end in any order
        _open.remove(own)


def is_masking() -> bool:
    """Whether there is a mask, which may apply. Compilers trace this."""
    return bool(getattr(_own, "masks", ()))


def is_masking_elsewhere() -> bool:
    """Whether another thread is within a mask, and this one within none."""
    return bool(_open) and not is_masking()


def masked_rows(input: Tensor, shape: torch.Size) -> Tensor | None:
    """Which rows of ``input`` have a part in the step, ``[m]``; None for all. They are shaped as ``shape``."""
    if not is_masking():
        return None
    mask: _Mask = _own.masks[-1]
    if shape not in (mask.shape, mask.rows.shape):
        mask.unlike = input.shape
        return None
    mask.used = True
    return mask.rows
