"""The one place where autograd is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from proxprop.additive import accumulating, warn_where_added
from proxprop.collector import Collector
from proxprop.design import Design, Parameters
from proxprop.modes import Gradient, Mode, parse_mode


@dataclasses.dataclass
class Settings:
    """What the backward pass reads, at the moment when it runs; a layer's owner may change it at any time."""

    tau: float = 1.0
    mode: Mode = dataclasses.field(default_factory=Gradient)
    reduction: str = "sum"
    """Of AᵀA over the rows of A."""
    collector: Collector | None = None
    """Of a layer whose step is deferred."""
    text: str = dataclasses.field(init=False, repr=False, compare=False)
    """All of it but the collector, for compilers: a text is a constant to them, where a number may become a symbol."""

    def __setattr__(self, name: str, value: object) -> None:
        state = vars(self)
        state[name] = value
        state["text"] = f"{state.get('mode')} {state.get('tau')!r} {state.get('reduction')}"

    @classmethod
    def parse(cls, text: str) -> Settings:
        """The settings with this ``text``."""
        mode, tau, reduction = text.split()
        return cls(float(tau), parse_mode(mode), reduction)

    def step_size(self, rows: int) -> float:
        """τ for the sum over so many rows of A."""
        return self.tau / max(rows, 1) if self.reduction == "mean" else self.tau

    def scales(self, rows: int, dtype: torch.dtype) -> tuple[float, float]:
        """What G is multiplied with before a solve, and D after it: for a tiny τ all at once may be beyond ``dtype``.

        The two together end where that does, as the system's 1/τ.
        """
        scale = min(1 / self.step_size(rows), torch.finfo(dtype).max) if self.reduction == "mean" else 1.0
        before = min(scale, 2.0**60)
        return before, scale / before

    def direction(self, design: Design, gradient: Tensor, parameters: Parameters) -> Parameters:
        """D, shaped like the layer's parameters."""
        # An empty batch, one of padding alone, or a layer with no parameters has no system to solve.
        is_empty = gradient.numel() == 0 or 0 in (getattr(design, "rows", None), getattr(design, "columns", None))
        mode = Gradient() if is_empty else self.mode
        if not mode.implicit or self.reduction == "sum":
            return mode.direction(design, gradient, self.tau, parameters)
        before, after = self.scales(design.rows, design.dtype)
        directions = mode.direction(design, gradient * before, self.step_size(design.rows), parameters)
        return directions if after == 1 else tuple(d if d is None else d * after for d in directions)

    def __getstate__(self) -> dict[str, Any]:
        """A copy takes its steps at once: it is no part of what the original's deferred step was made for."""
        return {**vars(self), "collector": None}


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
    tensors = ctx.saved_tensors  # read once, as activation checkpointing asks
    inputs, saved = tensors[: ctx.input_count], tensors[ctx.input_count :]
    settings, mode = ctx.settings, ctx.settings.mode
    asked, added, leaves = accumulating(ctx, sum(dtype is not None for dtype in ctx.dtypes))
    if not asked:  # of the parameters' directions: torch.autograd.grad with respect to an input
        return gradient, None, None, None, *(None for _ in inputs), *(None for _ in ctx.dtypes)
    if mode.implicit and _is_batched(gradient):
        raise RuntimeError(
            "no proximal step of several gradients at a time (is_grads_batched, vmap over a backward pass); take them "
            "one by one"
        )
    if mode.implicit and settings.collector is None:
        warn_where_added(leaves)
    trained = ctx.needs_input_grad[-len(ctx.dtypes) :]
    parameters = tuple(p if train else None for p, train in zip(saved, trained, strict=False))  # none are saved, mostly
    if mode.needs_parameters and not saved and gradient.numel():
        raise RuntimeError(f"optimization_mode became {str(mode)!r} after the forward pass; it must be set before it")
    with no_autocast(gradient.device.type):
        design = ctx.make_design(*inputs)
        if settings.collector is not None and mode.implicit:
            if added:  # and not torch.autograd.grad, whose gradients no step is taken with
                settings.collector.add(ctx, design)
            computed = design.adjoint(gradient.to(design.dtype))
        else:
            computed = settings.direction(design, gradient.to(design.dtype), parameters)
        result = [d if d is None else d.to(t) for d, t in zip(computed, ctx.dtypes, strict=True)]
    return gradient, None, None, None, *(None for _ in inputs), *result


def _is_batched(tensor: Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    # The meta device has no autocast.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


class NoStep(torch.autograd.Function):
    """The identity on a parameter where no step can be taken for it, and where its gradient must not pass for one.

    Arguments of ``apply``: the parameter; the error of a backward pass that asks for its direction.
    """

    @staticmethod
    def forward(parameter: Tensor, message: str) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.message = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(ctx.message)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, message: None) -> Tensor:
        return tangent.view_as(tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], parameter: Tensor, message: str) -> tuple[Tensor, int | None]:
        return NoStep.apply(parameter, message), in_dims[0]
