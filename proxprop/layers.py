"""Layers that take implicit steps: drop-in replacements for layers that are linear in their parameters."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from proxprop.design import ConvDesign, ConvGeometry, Design, LinearDesign
from proxprop.function import ProximalStep
from proxprop.modes import Mode, parse_mode

Linearised = tuple[Tensor, Callable[..., Design], Sequence[Tensor], Sequence[Tensor | None]]
"""An output computed with detached parameters, a function from the inputs to A, the inputs, the parameters."""


class ProxPropLayer(nn.Module):
    """What all ProxProp layers share: a base class's forward pass, with a proximal step in the backward pass.

    In the backward pass the parameters get, in place of their gradient AᵀG, the direction
    ``D = (AᵀA + I/τ)⁻¹ AᵀG`` or N conjugate gradient steps towards it (Frerix et al., *Proximal Backpropagation*,
    ICLR 2018, Section 3), where A is the layer's design matrix at its input and G the gradient of its output. D is
    accumulated into ``.grad``. The gradient of the input is the ordinary one.

    The solve is over the parameters with ``requires_grad``. D is not additive over micro-batches: each backward pass
    takes the step of its own batch.

    Args:
        *args: As for the base class.
        tau_prox: Step size τ > 0 of the proximal step. AᵀA sums over the batch.
        optimization_mode: ``'prox_exact'``; ``'prox_cgN'``, N conjugate gradient steps; ``'gradient'``, plain
            back-propagation; or ``'published_cgN'``, the solver of the paper's published code.
        **kwargs: As for the base class.

    ``tau_prox`` and ``optimization_mode`` may be changed at any time and take effect at the next backward pass.

    Raises:
        ValueError: for a ``tau_prox`` or ``optimization_mode`` that is not allowed, at construction and at assignment.
    """

    matrix_known: ClassVar[bool] = True
    """Whether the design matrix is known by its structure, as ``'prox_exact'`` needs."""

    def __init__(
        self, *args: Any, tau_prox: float = 1.0, optimization_mode: str = "prox_cg1", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.tau_prox = tau_prox
        self.optimization_mode = optimization_mode

    @property
    def tau_prox(self) -> float:
        """Step size τ of the proximal step."""
        return self._tau_prox

    @tau_prox.setter
    def tau_prox(self, value: float) -> None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise ValueError(f"tau_prox must be a positive finite number, got {value!r}")
        self._tau_prox = float(value)

    @property
    def optimization_mode(self) -> str:
        """How the direction is computed."""
        return self._optimization_mode

    @optimization_mode.setter
    def optimization_mode(self, value: str) -> None:
        mode = parse_mode(value)
        if mode.needs_matrix and not self.matrix_known:
            raise ValueError(
                f"optimization_mode {value!r} needs a layer of known structure (Linear, Conv1d, Conv2d, Conv3d); "
                f"{type(self).__name__} can have 'prox_cgN', 'published_cgN' with N >= 1 or 'gradient'"
            )
        self._optimization_mode, self._mode = value, mode

    @property
    def mode(self) -> Mode:
        """``optimization_mode`` as the object that computes the direction."""
        return self._mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not any(p.requires_grad for p in self.parameters()):
            return super().forward(*args, **kwargs)
        output, make_design, inputs, parameters = self._linearised(*args, **kwargs)
        return ProximalStep.apply(output, self, make_design, len(inputs), *inputs, *parameters)

    def _linearised(self, *args: Any, **kwargs: Any) -> Linearised:
        """The base class's forward pass with detached parameters, and what the backward pass needs."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        settings = f"tau_prox={self.tau_prox:g}, optimization_mode={self.optimization_mode!r}"
        return ", ".join(filter(None, (super().extra_repr(), settings)))


class _WeightAndBias(ProxPropLayer):
    """A layer whose parameters are ``weight`` and ``bias``."""

    weight: Tensor
    bias: Tensor | None

    def _parameters_detached(self) -> tuple[Tensor, Tensor | None]:
        return self.weight.detach(), None if self.bias is None else self.bias.detach()

    def _trained(self) -> tuple[bool, bool]:
        return self.weight.requires_grad, self.bias is not None and self.bias.requires_grad


class LinearLayer(_WeightAndBias):
    """The forward pass and design matrix of ``torch.nn.Linear``."""

    def _linearised(self, input: Tensor) -> Linearised:
        output = nn.functional.linear(input, *self._parameters_detached())
        make_design = functools.partial(
            LinearDesign, weight_shape=self.weight.shape, trained=self._trained()
        )
        return output, make_design, (input,), (self.weight, self.bias)


class ConvLayer(_WeightAndBias):
    """The forward pass and design matrix of ``torch.nn.Conv1d``, ``Conv2d`` and ``Conv3d``."""

    def _linearised(self, input: Tensor) -> Linearised:
        output = self._conv_forward(input, *self._parameters_detached())
        geometry = ConvGeometry(
            weight_shape=tuple(self.weight.shape),
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            pad=tuple(self._reversed_padding_repeated_twice),
            pad_mode="constant" if self.padding_mode == "zeros" else self.padding_mode,
        )
        make_design = functools.partial(ConvDesign, geometry=geometry, trained=self._trained())
        return output, make_design, (input,), (self.weight, self.bias)


class ProxPropLinear(LinearLayer, nn.Linear):
    __doc__ = f"``torch.nn.Linear`` with a proximal step.\n\n{ProxPropLayer.__doc__}"


class ProxPropConv1d(ConvLayer, nn.Conv1d):
    __doc__ = f"``torch.nn.Conv1d`` with a proximal step.\n\n{ProxPropLayer.__doc__}"


class ProxPropConv2d(ConvLayer, nn.Conv2d):
    __doc__ = f"``torch.nn.Conv2d`` with a proximal step.\n\n{ProxPropLayer.__doc__}"


class ProxPropConv3d(ConvLayer, nn.Conv3d):
    __doc__ = f"``torch.nn.Conv3d`` with a proximal step.\n\n{ProxPropLayer.__doc__}"
