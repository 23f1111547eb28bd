"""What layers with one and the same input compute of it once: queries, keys and values of an attention block, say."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class SharedProducts:
    """Gram matrices of one input, held from the first layer that asks for one until the last has had it."""

    def __init__(self) -> None:
        self._waiting = 0
        self._products: dict[Hashable, Tensor] = {}

    @classmethod
    def of(cls, input: Tensor) -> SharedProducts | None:
        """For one more layer whose input is ``input``, as it is now: the object that other such layers have.

        None while compiling: a compiler finds equal products by itself.
        """
        if torch.compiler.is_compiling():
            return None
        known = _KNOWN.get(input)
        products = known[1]() if known is not None and known[0] == input._version else None
        if products is None:
            products = cls()
            # A weak reference: what is held belongs to the backward passes that are to come, and goes with them.
            _KNOWN[input] = (input._version, weakref.ref(products))
        products._waiting += 1
        return products

    def get(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """The product that ``key`` names, from ``compute()`` where no layer has asked for it before."""
        product = self._products[key] if key in self._products else compute()
        self._waiting -= 1
        if self._waiting > 0:
            self._products[key] = product
        else:
            self._products.clear()
        return product


_KNOWN: MutableMapping[Tensor, tuple[int, weakref.ref[SharedProducts]]] = WeakTensorKeyDictionary()
"""Each input's version and products."""
