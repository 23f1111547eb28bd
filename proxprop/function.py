"""The one place where autograd is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from proxprop.design import Design
from proxprop.modes import Gradient, Mode


@dataclasses.dataclass
class Settings:
    """What the backward pass reads, at the moment when it runs; a layer's owner may change it at any time."""

    tau: float = 1.0
    mode: Mode = dataclasses.field(default_factory=Gradient)


class ProximalStep(torch.autograd.Function):
    """The identity on a layer's output, whose backward pass gives the layer's parameters their direction D.

    The layer computes its output with detached parameters, so PyTorch itself owns the gradient of the input. This
    function hands the output's gradient on unchanged (the explicit step on the activation) and returns D for the
    parameters (the implicit step).

    Arguments of ``apply``: the output; the layer's settings; a function from the inputs to the design matrix; the
    number of inputs; the input tensors; the parameters (None for one that does not exist).
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        settings: Settings,
        make_design: Callable[..., Design],
        input_count: int,
        *tensors: Tensor | None,
    ) -> Tensor:
        if torch.compiler.is_compiling():
            output = output.clone()  # older compilers do not know mark_dirty; newer ones fuse the copy away
        else:
            ctx.mark_dirty(output)  # no copy is made, and an in-place activation may follow
        ctx.save_for_backward(*(tensors if settings.mode.needs_parameters else tensors[:input_count]))
        ctx.settings, ctx.make_design, ctx.input_count = settings, make_design, input_count
        ctx.dtypes = [None if p is None else p.dtype for p in tensors[input_count:]]
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not gradient.requires_grad:
            # create_graph=True: differentiating again must raise an error, however the gradient came to be.
            gradient = gradient.detach().requires_grad_()
        result: tuple[Tensor | None, ...] = _backward(ctx, gradient)
        return result


@once_differentiable
def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors  # read once, as checkpointing demands
    inputs, saved = tensors[: ctx.input_count], tensors[ctx.input_count :]
    # An empty batch has no system to solve.
    mode = ctx.settings.mode if gradient.numel() else Gradient()
    trained = ctx.needs_input_grad[-len(ctx.dtypes) :]
    parameters = tuple(p if train else None for p, train in zip(saved, trained, strict=False))  # none are saved, mostly
    if mode.needs_parameters and not saved:
        raise RuntimeError(f"optimization_mode became {str(mode)!r} after the forward pass; it must be set before it")
    with _no_autocast(gradient.device.type):
        design = ctx.make_design(*inputs)
        directions = mode.direction(design, gradient.to(design.dtype), ctx.settings.tau, parameters)
        directions = [d if d is None else d.to(t) for d, t in zip(directions, ctx.dtypes, strict=True)]
    return gradient, None, None, None, *(None for _ in inputs), *directions


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    # The meta device has no autocast. (Older releases cannot compile the question which devices have it.)
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)
