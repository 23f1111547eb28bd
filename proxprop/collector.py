"""What the layers' backward passes leave for a deferred step."""

from __future__ import annotations

import functools
import weakref
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from proxprop.design import CollectedDesign, CollectedEmbedding, Design, EmbeddingDesign, MatrixDesign

_Seen = tuple[weakref.ref[Tensor], int]
"""A gradient, and the version that it had."""


class _Pass:
    """What one backward pass has brought so far. The pass itself keeps it alive, so it is gone where that fails."""

    def __init__(self, trained: tuple[bool, ...]) -> None:
        self.trained = trained
        self.nodes: list[Any] = []
        self.design: CollectedDesign | None = None
        self.rows = 0


class Collector:
    """The design matrices of one layer's passes since the last step; layers with the same parameters have one.

    Args:
        name: The layer's dotted name, for errors.
        parameters: Its weight and bias, as the optimizer has them; None for no bias.
    """

    def __init__(self, name: str, parameters: Sequence[Tensor | None]) -> None:
        self.name, self.parameters = name, tuple(parameters)
        self.design: CollectedDesign | None = None
        self.rows: int | None = None
        """How many there were; None for no pass."""
        self.known: tuple[bool, bool] | None = None
        """Whether weight and bias are trained in what the step will be taken on, so that rows are counted alone; None
        where design matrices are wanted."""
        self._trained: tuple[bool, ...] | None = None
        self._era = object()
        self._passes: MutableMapping[int, _Pass] = weakref.WeakValueDictionary()
        """Those under way, whose gradients are still to come: a layer that is called often has one for all calls."""
        # Of each parameter: its gradient after the last accumulation, and the last direction, with their versions.
        self._accumulated: list[_Seen | None] = [None for _ in self.parameters]
        self._written: list[_Seen | None] = [None for _ in self.parameters]
        self._hooks: dict[int, Any] = {}

    def close(self) -> None:
        """Leave the parameters as they were found."""
        for hook in self._hooks.values():
            hook.remove()
        self.clear()

    def clear(self) -> None:
        """Forget all passes."""
        self.design, self.rows, self._trained, self._era = None, None, None, object()
        self._accumulated = [None for _ in self.parameters]

    def _watch(self, trained: Sequence[bool]) -> None:
        """Have the accumulations of those parameters seen."""
        for place, (parameter, train) in enumerate(zip(self.parameters, trained, strict=True)):
            # It may have been frozen since the forward pass.
            if train and parameter is not None and parameter.requires_grad and place not in self._hooks:
                see = functools.partial(self._see, place)
                self._hooks[place] = parameter.register_post_accumulate_grad_hook(see)  # type: ignore[no-untyped-call]

    def add(self, node: Any, design: Design) -> None:
        """Take the design matrix of one more pass, once for each of its nodes in autograd's graph.

        Raises:
            RuntimeError: for a layer without a known structure, if other parameters are trained than in the passes
                before, and where ``.grad`` still holds the direction of the last step.
        """
        if getattr(node, "collected_in", None) is self._era:  # a second backward pass through the same graph
            return
        if not isinstance(design, MatrixDesign):
            raise RuntimeError(f"{self.name}: a deferred step needs a weight that is a parameter")
        self._check_gradients(design.trained)
        self._watch(design.trained)
        task = torch._C._current_graph_task_id()
        current = self._passes.get(task)
        if current is None:
            self._passes[task] = current = _Pass(design.trained)
            torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self._end, task, current))
        if design.trained != current.trained or self._trained not in (None, design.trained):
            raise RuntimeError(f"{self.name}: other parameters are trained than in the passes before, within one step")
        current.nodes.append(node)
        current.rows += design.rows
        if self.known == design.trained:
            return
        if current.design is None:
            kind: Any = CollectedEmbedding if isinstance(design, EmbeddingDesign) else CollectedDesign
            current.design = kind(design)
        current.design.add(design)

    def _count(self, task: int) -> None:
        """Take what that pass has brought: now ``.grad`` has its part, too."""
        current = self._passes.pop(task, None)
        if current is None:
            return
        for node in current.nodes:
            node.collected_in = self._era
        self.rows, self._trained = (self.rows or 0) + current.rows, current.trained
        if self.design is None or current.design is None:
            self.design = current.design or self.design
        else:
            _append(self.design, current.design)

    def _end(self, task: int, current: _Pass) -> None:
        """Of a pass that has not failed. ``fully_shard`` accumulates by itself, and no hook sees it."""
        if any(hasattr(parameter, "placements") for parameter in self.parameters):
            self._count(task)

    def _check_gradients(self, trained: Sequence[bool]) -> None:
        """Forget passes whose gradients were zeroed (a step was skipped); refuse to add gradients to a direction."""
        seen = [
            (None if parameter is None else parameter.grad, last)
            for parameter, last in zip(self.parameters, self._accumulated, strict=True)
            if last is not None
        ]
        if any(gradient is None for gradient, _ in seen):
            self.clear()
        if self.holds_direction(trained):
            raise RuntimeError(
                f"{self.name}: .grad still holds the direction of the last step; call optimizer.zero_grad() before the "
                "backward pass"
            )
        # Zeroed, clipped, unscaled or assigned; the test makes the host wait, so it is for those cases alone.
        if seen and all(g is not None and not _is_same(g, last) and not g.any() for g, last in seen):
            self.clear()

    def _see(self, place: int, parameter: Tensor) -> None:
        gradient = parameter.grad
        self._accumulated[place] = None if gradient is None else (weakref.ref(gradient), gradient._version)
        if gradient is not None:
            self._count(torch._C._current_graph_task_id())

    def holds_direction(self, trained: Sequence[bool]) -> bool:
        """Whether a ``.grad`` of those parameters is as ``write`` has left it."""
        for place, (parameter, written, train) in enumerate(zip(self.parameters, self._written, trained, strict=True)):
            gradient = None if parameter is None else parameter.grad
            if written is None or not train:
                continue
            if gradient is not None and _is_same(gradient, written):
                return True
            self._written[place] = None
        return False

    @torch.no_grad()
    def write(self, directions: Sequence[Tensor | None]) -> None:
        """Put directions in place of the gradients, in their memory."""
        for place, (parameter, direction) in enumerate(zip(self.parameters, directions, strict=True)):
            self._written[place] = None
            if direction is not None and parameter is not None and parameter.grad is not None:
                parameter.grad.copy_(direction)
                self._written[place] = weakref.ref(parameter.grad), parameter.grad._version
        self.clear()


def _is_same(gradient: Tensor, seen: _Seen) -> bool:
    """Whether it is the tensor that was seen, with the same numbers."""
    return seen[0]() is gradient and gradient._version == seen[1]


def _append(design: CollectedDesign, other: CollectedDesign) -> None:
    """Add the rows of ``other`` to those of ``design``."""
    rows = design.rows + other.rows
    if design.holds_rows and other.holds_rows and rows <= design.columns:
        design.set_rows(torch.cat([design.matrix(design.dtype), other.matrix(design.dtype)], dim=1))
    else:
        design.set_gram(design.gram() + other.gram(), rows)


def is_zero(gradient: Any) -> bool:
    """Of a sharded one: this process's part."""
    local: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return local.device.type != "meta" and not bool(local.any())
