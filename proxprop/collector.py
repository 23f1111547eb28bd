"""What the layers' backward passes leave for a deferred step."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from proxprop.design import CollectedDesign, CollectedEmbedding, Design, EmbeddingDesign, MatrixDesign


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
        self._era = object()
        # Of each parameter: the version of its gradient after the last accumulation; the last direction, with its own.
        self._accumulated: list[int | None] = [None for _ in self.parameters]
        self._written: list[tuple[weakref.ref[Tensor], int] | None] = [None for _ in self.parameters]
        self._hooks: dict[int, Any] = {}

    def close(self) -> None:
        """Leave the parameters as they were found."""
        for hook in self._hooks.values():
            hook.remove()
        self.clear()

    def clear(self) -> None:
        """Forget all passes."""
        self.design, self.rows, self._era = None, None, object()
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
        node.collected_in = self._era
        self.rows = (self.rows or 0) + design.rows
        if self.known == design.trained:
            return
        if self.design is None:
            self.design = CollectedEmbedding(design) if isinstance(design, EmbeddingDesign) else CollectedDesign(design)
        if self.design.trained != design.trained or self.rows != self.design.rows + design.rows:
            raise RuntimeError(f"{self.name}: other parameters are trained than in the passes before, within one step")
        self.design.add(design)

    def _check_gradients(self, trained: Sequence[bool]) -> None:
        """Forget passes whose gradients were zeroed (a step was skipped); refuse to add gradients to a direction."""
        seen = [
            (None if parameter is None else parameter.grad, version)
            for parameter, version in zip(self.parameters, self._accumulated, strict=True)
            if version is not None
        ]
        if any(gradient is None for gradient, _ in seen):
            self.clear()
        if self.holds_direction(trained):
            raise RuntimeError(
                f"{self.name}: .grad still holds the direction of the last step; call optimizer.zero_grad() before the "
                "backward pass"
            )
        # Zeroed in place, clipped or unscaled; the test makes the host wait, so it is for those cases alone.
        if seen and all(g is not None and g._version != version and not g.any() for g, version in seen):
            self.clear()

    def _see(self, place: int, parameter: Tensor) -> None:
        self._accumulated[place] = None if parameter.grad is None else parameter.grad._version

    def holds_direction(self, trained: Sequence[bool]) -> bool:
        """Whether a ``.grad`` of those parameters is as ``write`` has left it."""
        for place, (parameter, written, train) in enumerate(zip(self.parameters, self._written, trained, strict=True)):
            gradient = None if parameter is None else parameter.grad
            if written is None or not train:
                continue
            if gradient is not None and written[0]() is gradient and gradient._version == written[1]:
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


def is_zero(gradient: Any) -> bool:
    """Of a sharded one: this process's part."""
    local: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return local.device.type != "meta" and not bool(local.any())
