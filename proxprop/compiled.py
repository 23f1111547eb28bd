"""The step in compiled code: a layer's solve is one operator, which compilers call and do not look into."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from proxprop.design import ConvDesign, ConvGeometry, Design, LinearDesign, working_dtype
from proxprop.function import Settings, no_autocast

Operator = Callable[..., list[Tensor]]
"""An operator below that knows its layer: a function of G, the input, the parameters and the settings."""


class CompiledStep(torch.autograd.Function):
    """``ProximalStep`` for a compiler, which traces both passes when it comes to the forward pass.

    So the settings are those of the forward pass: constants in what is compiled, which is compiled again for others.

    Arguments of ``apply``: the output; the settings; the layer's operator; which parameters are trained; the input; the
    parameters (None for one that does not exist).
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        settings: Settings,
        operator: Operator,
        trained: Sequence[bool],
        input: Tensor,
        *parameters: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(input, *(parameters if settings.mode.needs_parameters else ()))
        ctx.settings, ctx.operator, ctx.trained = settings.text, operator, trained
        ctx.dtypes = [None if p is None else p.dtype for p in parameters]
        return output.clone()  # older compilers do not know mark_dirty; newer ones fuse the copy away

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, *parameters = ctx.saved_tensors
        computed = iter(ctx.operator(gradient, input, parameters, ctx.settings))
        result = [next(computed).to(t) if train else None for t, train in zip(ctx.dtypes, ctx.trained, strict=True)]
        return gradient, None, None, None, None, *result


_GIVEN = "Tensor gradient, Tensor input, Tensor?[] parameters, str settings"
_LAYER = "SymInt[] weight_shape, bool[] trained"


@torch.library.custom_op("proxprop::linear_direction", mutates_args=(), schema=f"({_GIVEN}, {_LAYER}) -> Tensor[]")
def linear_direction(
    gradient: Tensor,
    input: Tensor,
    parameters: Sequence[Tensor | None],
    settings: str,
    weight_shape: Sequence[int],
    trained: Sequence[bool],
) -> list[Tensor]:
    """D of ``torch.nn.Linear``.

    Args:
        gradient: G, shaped like the output.
        input: The layer's input, ``[*, in]``.
        parameters: Weight and bias where the mode needs them, else empty.
        settings: The layer's ``Settings.text``.
        weight_shape: ``(out, in)``.
        trained: Whether the weight and whether the bias is trained.

    Returns:
        D for those that are trained, in the precision of the solve, contiguous.
    """
    sparse = input.layout is not torch.strided
    make_design = functools.partial(LinearDesign, weight_shape=weight_shape, trained=trained, sparse=sparse)
    return _directions(make_design, gradient, input, parameters, settings, trained)


@torch.library.custom_op(
    "proxprop::conv_direction",
    mutates_args=(),
    schema=f"({_GIVEN}, {_LAYER}, int[] stride, int[] dilation, int groups, int[] pad, str pad_mode) -> Tensor[]",
)
def conv_direction(
    gradient: Tensor,
    input: Tensor,
    parameters: Sequence[Tensor | None],
    settings: str,
    weight_shape: Sequence[int],
    trained: Sequence[bool],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad: Sequence[int],
    pad_mode: str,
) -> list[Tensor]:
    """D of ``torch.nn.Conv1d``, ``Conv2d`` and ``Conv3d``: as ``linear_direction``, and a ``ConvGeometry``'s fields."""
    geometry = ConvGeometry(tuple(weight_shape), tuple(stride), tuple(dilation), groups, tuple(pad), pad_mode)
    make_design = functools.partial(ConvDesign, geometry=geometry, trained=trained)
    return _directions(make_design, gradient, input, parameters, settings, trained)


@linear_direction.register_fake
@conv_direction.register_fake
def _shapes(
    gradient: Tensor,
    input: Tensor,
    parameters: Sequence[Tensor | None],
    settings: str,
    weight_shape: Sequence[int],
    trained: Sequence[bool],
    *geometry: object,
) -> list[Tensor]:
    shapes = (weight_shape, weight_shape[:1])
    dtype = working_dtype(input)
    return [gradient.new_empty(shape, dtype=dtype) for shape, train in zip(shapes, trained, strict=True) if train]


def _directions(
    make_design: Callable[[Tensor], Design],
    gradient: Tensor,
    input: Tensor,
    parameters: Sequence[Tensor | None],
    settings: str,
    trained: Sequence[bool],
) -> list[Tensor]:
    start = tuple(p if train else None for p, train in zip(parameters, trained, strict=False))
    with no_autocast(gradient.device.type):
        design = make_design(input)
        result = Settings.parse(settings).direction(design, gradient.to(design.dtype), start)
    # An operator's results share no memory, neither with each other nor with what it was given.
    return [
        d.to(working_dtype(input), copy=True, memory_format=torch.contiguous_format) for d in result if d is not None
    ]
