"""A warning where autograd adds the directions of several passes: their sum is the step of no batch."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_told: set[str] = set()
"""The kinds of sums that have been warned of: each once in a process."""

_LAST: MutableMapping[Tensor, tuple[int, weakref.ref[Tensor] | None, int]] = WeakTensorKeyDictionary()
"""Of a parameter: the last backward pass that had a direction for it; its gradient after that, with its version."""


def warn_where_added(parameters: Sequence[Tensor]) -> None:
    """To be called in a backward pass that is about to give ``parameters`` a direction at once."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        _tell("processes", "each process takes the step of its own batch, and the mean of those is taken for the whole")
    now = torch._C._current_graph_task_id()
    if len(_told & {"calls", "passes"}) == 2:
        return
    for parameter in parameters:  # layers may share one of theirs
        known = _LAST.get(parameter)
        if known is not None and known[0] == now:
            _tell(
                "calls", "a layer was called several times, or layers share parameters, and their directions are added"
            )
            continue
        if known is not None and known[1] is not None:
            gradient = known[1]()
            if gradient is not None and parameter.grad is gradient and gradient._version == known[2]:
                _tell("passes", "directions of several backward passes are added in .grad")
        _LAST[parameter] = now, None, 0
        callback = functools.partial(_remember, weakref.ref(parameter), now)
        torch.autograd.Variable._execution_engine.queue_callback(callback)


def _remember(reference: weakref.ref[Tensor], task: int) -> None:
    parameter = reference()
    if parameter is not None and parameter.grad is not None:
        _LAST[parameter] = task, weakref.ref(parameter.grad), parameter.grad._version


def _tell(kind: str, what: str) -> None:
    if kind not in _told:
        _told.add(kind)
        warnings.warn(
            f"ProxProp: {what}, which is not the step of the whole batch; proxprop.defer(model, optimizer) takes that",
            stacklevel=2,
        )


def accumulating(node: Any, count: int) -> tuple[bool, bool, list[Tensor]]:
    """Whether this backward pass asks for one of the tensors that the last ``count`` inputs of ``node`` are views of,
    whether it adds to ``.grad`` of one, and the leaves among those."""
    views = [view for view, _ in node.next_functions[len(node.next_functions) - count :] if view is not None]
    targets = [view.next_functions[0][0] for view in views]
    leaves = [target for target in targets if target.name() == "torch::autograd::AccumulateGrad"]
    added = any(_is_asked(leaf, returned=False) for leaf in leaves)
    return any(_is_asked(target, returned=True) for target in targets), added, [leaf.variable for leaf in leaves]


def _is_asked(node: Any, returned: bool) -> bool:
    """``returned`` is the answer for what ``torch.autograd.grad`` is asked for: of a leaf, PyTorch raises an error."""
    try:
        asked: bool = torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return returned
    return asked
