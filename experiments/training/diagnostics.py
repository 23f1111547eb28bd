"""What the ProxProp layers do in the steps of an epoch, step by step as training computes it."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from proxprop.layers import ProxPropLayer
from proxprop.modes import ConjugateGradient, PublishedConjugateGradient
from proxprop.observe import Direction, observing


@dataclass(frozen=True)
class LayerRecord:
    """One row of `diagnostics.csv`: a ProxProp layer over the steps of an epoch.

    D is the layer's direction, AᵀG its gradient, θ its parameters before the step. Steps without a gradient (AᵀG is
    zero) count nowhere; numbers that are not finite make NaN of all but the counts.

    Attributes:
        layer: its name in the network.
        steps: how many were observed; fewer than an epoch has where a run went on with another `diagnostics_every`.
        min_cosine: the smallest cosine of D to AᵀG; D is a descent direction where it is positive.
        mean_cosine: the mean.
        not_descent: steps whose cosine was not positive.
        mean_step_ratio: the mean of ‖D‖ / (τ‖AᵀG‖): 1 for an explicit step, small where τ is large beside AᵀA.
        mean_weight_ratio: the mean of ‖D‖ / ‖θ‖.
        failed: steps whose factorisation failed (`prox_exact`), so that a short explicit step was taken.
        stated_cosine: of `published_cgN` and its parts, the mean cosine of D to the direction of `prox_cgN`, of the
            same system; NaN in other modes.
        stated_ratio: the mean of their norms' ratio.
    """

    epoch: int
    layer: str
    steps: int
    min_cosine: float
    mean_cosine: float
    not_descent: int
    mean_step_ratio: float
    mean_weight_ratio: float
    failed: int
    stated_cosine: float = math.nan
    stated_ratio: float = math.nan


class Observer:
    """Sums over the steps it has seen, kept on the model's device: no synchronisation a step."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self._sums: dict[str, Tensor] = {}
        self.reset()

    def reset(self) -> None:
        names = [name for name, module in self._model.named_modules() if isinstance(module, ProxPropLayer)]
        # steps, least cosine, sum of cosines, not descent, sums of both ratios, failed, sums of cosines and ratios to
        # what is stated
        start = torch.tensor([0, torch.inf, 0, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
        self._sums = {name: start.to(self._device) for name in names}

    def watching(self) -> AbstractContextManager[None]:
        """Within, a step's forward and backward pass are seen; what they compute is the same to the bit."""
        return observing(self._model, self._see)

    def records(self, epoch: int) -> list[LayerRecord]:
        """What was seen since the last reset, a record for each layer that a gradient came to."""
        records = []
        for name, sums in self._sums.items():
            steps, least, cosines, not_descent, step_ratios, weight_ratios, failed, *stated = sums.tolist()
            if steps:
                means = (cosines / steps, int(not_descent), step_ratios / steps, weight_ratios / steps)
                beside = [total / steps for total in stated]
                records.append(LayerRecord(epoch, name, int(steps), least, *means, int(failed), *beside))
        return records

    def state_dict(self) -> dict[str, Any]:
        return dict(self._sums)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if any(sums.shape != self._sums[name].shape for name, sums in state.items()):
            raise ValueError("other numbers are recorded of layers")
        self._sums = {name: sums.to(self._device) for name, sums in state.items()}

    def _see(self, direction: Direction) -> None:
        design = direction.design
        d = design.stack(direction.parameters).double()
        gradient = design.stack(design.adjoint(direction.gradient)).double()
        norm, gradient_norm = torch.linalg.vector_norm(d), torch.linalg.vector_norm(gradient)
        weights = [p.detach() for p in direction.layer.parameters() if p.requires_grad]
        weight_norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(p, dtype=torch.float64) for p in weights])
        )
        lengths = norm * gradient_norm
        cosine = (d * gradient).sum() / lengths.masked_fill(lengths == 0, 1)
        failed = direction.system.failed if direction.system is not None else None
        counts = [torch.ones_like(norm), cosine <= 0, norm.new_zeros(()) if failed is None else failed.any()]
        one, not_descent, failures = (count.to(norm) for count in counts)
        ratios = (norm / gradient_norm / direction.tau, norm / weight_norm)
        beside = _beside_stated(direction, d, norm)
        sums = self._sums[direction.name]
        added = sums + torch.stack([one, torch.zeros_like(norm), cosine, not_descent, *ratios, failures, *beside])
        added[1] = torch.minimum(sums[1], cosine)
        self._sums[direction.name] = torch.where(gradient_norm == 0, sums, added)


def _beside_stated(direction: Direction, d: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and ratio of norms of a published solver's D to the direction that is stated; NaN in other modes."""
    if not isinstance(direction.mode, PublishedConjugateGradient):
        return norm.new_full((), torch.nan), norm.new_full((), torch.nan)
    design, stated = direction.design, ConjugateGradient(direction.mode.iterations)
    other = design.stack(stated.direction(design, direction.gradient, direction.tau, ())).double()
    length = torch.linalg.vector_norm(other)
    return (d * other).sum() / (norm * length), norm / length
