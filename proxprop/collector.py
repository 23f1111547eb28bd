"""What the layers' backward passes leave for a deferred step."""

from __future__ import annotations

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
        self._accumulated: int | None = None  # the version of the gradient after its last accumulation
        self._written: tuple[weakref.ref[Tensor], int] | None = None  # the last step's direction, with its version
        tensors = [p for p in self.parameters if p is not None and p.requires_grad]
        self._watched = tensors[0] if tensors else None
        self._hook: Any = None
        if self._watched is not None:
            self._hook = self._watched.register_post_accumulate_grad_hook(self._see)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Leave the parameters as they were found."""
        if self._hook is not None:
            self._hook.remove()
        self.clear()

    def clear(self) -> None:
        """Forget all passes."""
        self.design, self.rows, self._accumulated, self._era = None, None, None, object()

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
        self._check_gradient()
        node.collected_in = self._era
        self.rows = (self.rows or 0) + design.rows
        if self.known == design.trained:
            return
        if self.design is None:
            self.design = CollectedEmbedding(design) if isinstance(design, EmbeddingDesign) else CollectedDesign(design)
        if self.design.trained != design.trained or self.rows != self.design.rows + design.rows:
            raise RuntimeError(f"{self.name}: other parameters are trained than in the passes before, within one step")
        self.design.add(design)

    def _check_gradient(self) -> None:
        """Forget passes whose gradients were zeroed (a step was skipped); refuse to add gradients to a direction."""
        gradient = None if self._watched is None else self._watched.grad
        if gradient is None:
            if self._accumulated is not None:
                self.clear()
            return
        if self.holds_direction():
            raise RuntimeError(
                f"{self.name}: .grad still holds the direction of the last step; call optimizer.zero_grad() before the "
                "backward pass"
            )
        # Zeroed in place, clipped or unscaled; the test makes the host wait, so it is for those cases alone.
        if self._accumulated not in (None, gradient._version) and not gradient.any():
            self.clear()

    def _see(self, parameter: Tensor) -> None:
        self._accumulated = None if parameter.grad is None else parameter.grad._version

    def holds_direction(self) -> bool:
        """Whether ``.grad`` is as ``write`` has left it."""
        if self._written is None or self._watched is None:
            return False
        gradient, version = self._written[0](), self._written[1]
        return gradient is not None and self._watched.grad is gradient and gradient._version == version

    @torch.no_grad()
    def write(self, directions: Sequence[Tensor | None]) -> None:
        """Put directions in place of the gradients, in their memory."""
        for parameter, direction in zip(self.parameters, directions, strict=True):
            if direction is not None and parameter is not None and parameter.grad is not None:
                parameter.grad.copy_(direction)
        self.clear()
        if self._watched is not None and self._watched.grad is not None:
            self._written = weakref.ref(self._watched.grad), self._watched.grad._version
