"""What layers with one and the same input compute of it once: queries, keys and values of an attention block, say."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class SharedProducts:
    """Gram matrices of one input, held within one backward pass until the last layer has had them.

    The forward pass only counts the layers. What one backward pass has computed is never seen by another: the memory
    behind an input may hold something else by then (a buffer of numpy's that was filled again, ``x.data.copy_``).
    """

    def __init__(self) -> None:
        self._layers = 0
        self._pass = _NO_PASS
        self._waiting = 0
        self._input: weakref.ref[Tensor] | None = None
        self._products: dict[Hashable, Tensor] = {}

    @classmethod
    def of(cls, input: Tensor) -> SharedProducts:
        """For one more layer whose input is ``input``: the object that other such layers have."""
        known = _KNOWN.get(input)
        products = None if known is None else known()
        if products is None or products._pass != _NO_PASS:  # those of a backward pass that has begun are counted
            products = cls()
            _KNOWN[input] = weakref.ref(products)  # weakly: the backward passes that are to come hold it
        products._layers += 1
        return products

    def get(self, input: Tensor, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """The product of ``input`` that ``key`` names, from ``compute()`` where it was not asked for before.

        Args:
            input: As autograd has saved it for the layer that asks.
            key: Names the product.
            compute: Makes it.
        """
        now = torch._C._current_graph_task_id()
        if self._layers == 1 or now == _NO_PASS:
            return compute()
        if self._pass != now:
            self._products.clear()
            self._pass, self._waiting, self._input = now, self._layers, weakref.ref(input)
            torch.autograd.Variable._execution_engine.queue_callback(self._products.clear)
        self._waiting -= 1
        if self._input is None or self._input() is not input:
            return compute()  # hooks on saved tensors gave the layers copies, made at different times
        product = self._products[key] if key in self._products else compute()
        if self._waiting > 0:
            self._products[key] = product
        else:
            self._products.clear()
        return product


_NO_PASS = -1
"""What autograd calls the backward pass outside of any."""

_KNOWN: MutableMapping[Tensor, weakref.ref[SharedProducts]] = WeakTensorKeyDictionary()
"""The products of each input that a layer has seen."""
