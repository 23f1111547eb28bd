"""Watching the directions that a model's layers compute, as they compute them."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from proxprop.design import Design, Parameters
from proxprop.layers import ProxPropLayer
from proxprop.modes import Mode, Solve
from proxprop.systems import System


@dataclasses.dataclass(frozen=True, eq=False)
class Direction:
    """One direction as a layer has just computed it in a backward pass, and what it was computed from.

    Attributes:
        name: The layer's dotted name.
        layer: The layer.
        mode: Its mode.
        design: Its design matrix A at the input.
        gradient: G, shaped like its output; times m/τ where the Gram matrix is a mean over m rows.
        tau: τ, over m then.
        start: Its parameters where the mode needs them.
        parameters: D, shaped like its parameters; None where one is frozen.
        system: What was solved; None for plain back-propagation.
        seconds: How long that took, where it was measured.
    """

    name: str
    layer: ProxPropLayer
    mode: Mode
    design: Design
    gradient: Tensor
    tau: float
    start: Parameters
    parameters: Parameters
    system: System | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Watched:
    """A layer's mode, which also shows each direction that it computes."""

    name: str
    layer: ProxPropLayer
    mode: Mode
    see: Callable[[Direction], object]
    timed: bool

    @property
    def needs_matrix(self) -> bool:
        return self.mode.needs_matrix

    @property
    def needs_parameters(self) -> bool:
        return self.mode.needs_parameters

    @property
    def implicit(self) -> bool:
        return self.mode.implicit

    def __str__(self) -> str:
        return str(self.mode)

    def direction(self, design: Design, gradient: Tensor, tau: float, parameters: Parameters) -> Parameters:
        start = self._clock(gradient)
        system = None
        if isinstance(self.mode, Solve):
            system = self.mode.system(design, gradient, tau, parameters)
            result = self.mode.solve(system)
        else:
            result = self.mode.direction(design, gradient, tau, parameters)
        seconds = self._clock(gradient) - start
        args = (self.name, self.layer, self.mode, design, gradient, tau, parameters, result, system, seconds)
        self.see(Direction(*args))
        return result

    def _clock(self, tensor: Tensor) -> float:
        if self.timed and tensor.device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(tensor.device)
        return time.perf_counter()


@contextlib.contextmanager
def observing(model: nn.Module, see: Callable[[Direction], object], *, timed: bool = False) -> Iterator[None]:
    """Within, ``see`` is called with each direction that a ProxProp layer of ``model`` computes, in a backward pass.

    Nothing is computed twice, and the directions are the same to the bit; steps are not deferred. Both passes of a step
    must be within. What is compiled is not seen: run it within ``torch.compiler.set_stance("force_eager")``.

    Args:
        model: Any module.
        see: Called in the backward pass, without gradients and autocast. It must leave the tensors as they are.
        timed: Wait for the device before and after each direction, so that ``seconds`` means something.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, ProxPropLayer)]
    kept = [(layer._proximal, layer._proximal.mode, layer._proximal.collector) for _, layer in layers]
    for name, layer in layers:
        settings = layer._proximal
        settings.mode, settings.collector = _Watched(name, layer, settings.mode, see, timed), None
    try:
        yield
    finally:
        for settings, mode, collector in kept:
            settings.mode, settings.collector = mode, collector
