"""Layers that take implicit steps: drop-in replacements for layers that are linear in their parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from proxprop.design import ConvDesign, ConvGeometry, Design, LinearDesign, SharedProducts
from proxprop.function import ProximalStep, Settings
from proxprop.modes import parse_mode, parse_tau

Linearised = tuple[Tensor, Callable[..., Design], Sequence[Tensor], Sequence[Tensor | None]]
"""An output computed with detached parameters, a function from the inputs to A, the inputs, the parameters."""


class _Signature:
    """The constructor that documentation and editors show: the base class's, plus the two keywords."""

    def __get__(self, instance: object, owner: type[ProxPropLayer]) -> inspect.Signature:
        if owner.__init__ is not ProxPropLayer.__init__:
            raise AttributeError("a constructor of its own")  # which is then what is shown
        plain = next(cls for cls in owner.__mro__ if not issubclass(cls, ProxPropLayer))
        parameters = list(inspect.signature(plain).parameters.values())
        keywords = inspect.signature(ProxPropLayer.__init__).parameters
        at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
        parameters[at:at] = [keywords["tau_prox"], keywords["optimization_mode"]]
        return inspect.Signature(parameters)


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

    ``tau_prox`` and ``optimization_mode`` may be changed at any time and take effect at the next backward pass (a
    ``'published_cgN'`` at the next forward pass: a backward pass that comes before it raises a ``RuntimeError``).

    Raises:
        ValueError: for a ``tau_prox`` or ``optimization_mode`` that is not allowed, at construction and at assignment.
    """

    matrix_known: ClassVar[bool] = True
    """Whether the design matrix is known by its structure, as ``'prox_exact'`` needs."""

    __signature__ = _Signature()

    def __init__(self, *args: Any, tau_prox: float = 1.0, optimization_mode: str = "prox_cg1", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._proximal = Settings()
        self.tau_prox = tau_prox
        self.optimization_mode = optimization_mode
        self._check_constructed()

    def _check_constructed(self) -> None:
        """Refuse a base class or arguments that no proximal step can be taken for."""

    @property
    def tau_prox(self) -> float:
        """Step size τ of the proximal step."""
        return self._proximal.tau

    @tau_prox.setter
    def tau_prox(self, value: float) -> None:
        self._proximal.tau = parse_tau(value)

    @property
    def optimization_mode(self) -> str:
        """How the direction is computed."""
        return str(self._proximal.mode)

    @optimization_mode.setter
    def optimization_mode(self, value: str) -> None:
        mode = parse_mode(value)
        if mode.needs_matrix and not self.matrix_known:
            raise ValueError(
                f"optimization_mode {value!r} needs a layer of known structure (Linear, Conv1d, Conv2d, Conv3d); "
                f"{type(self).__name__} can have 'prox_cgN', 'published_cgN' with N >= 1 or 'gradient'"
            )
        self._proximal.mode = mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not any(p.requires_grad for p in self.parameters()):
            return super().forward(*args, **kwargs)
        output, make_design, inputs, parameters = self._linearised(*args, **kwargs)
        if output.is_complex():
            raise TypeError(f"{type(self).__name__} works on real numbers, got {output.dtype}")
        return ProximalStep.apply(output, self._proximal, make_design, len(inputs), *inputs, *parameters)

    def _linearised(self, *args: Any, **kwargs: Any) -> Linearised:
        """The base class's forward pass with detached parameters, and what the backward pass needs."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        settings = f"tau_prox={self.tau_prox:g}, optimization_mode={self.optimization_mode!r}"
        return ", ".join(filter(None, (super().extra_repr(), settings)))


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def _trained(weight: Tensor, bias: Tensor | None) -> tuple[bool, bool]:
    return weight.requires_grad, bias is not None and bias.requires_grad


class LinearLayer(ProxPropLayer):
    """The forward pass and design matrix of ``torch.nn.Linear``."""

    def _linearised(self, input: Tensor) -> Linearised:
        layer = cast(nn.Linear, self)
        weight, bias = layer.weight, layer.bias  # read once: a parametrization may be random
        output = nn.functional.linear(input, weight.detach(), _detached(bias))
        make_design = functools.partial(
            LinearDesign,
            weight_shape=weight.shape,
            trained=_trained(weight, bias),
            shared=SharedProducts.of(input),
        )
        return output, make_design, (input,), (weight, bias)


class ConvLayer(ProxPropLayer):
    """The forward pass and design matrix of ``torch.nn.Conv1d``, ``Conv2d`` and ``Conv3d``."""

    def _linearised(self, input: Tensor) -> Linearised:
        layer = cast(_ConvNd, self)
        weight, bias = layer.weight, layer.bias
        output = layer._conv_forward(input, weight.detach(), _detached(bias))
        geometry = ConvGeometry(
            weight_shape=tuple(weight.shape),
            stride=layer.stride,
            dilation=layer.dilation,
            groups=layer.groups,
            pad=tuple(layer._reversed_padding_repeated_twice),
            pad_mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode,
        )
        make_design = functools.partial(
            ConvDesign, geometry=geometry, trained=_trained(weight, bias), shared=SharedProducts.of(input)
        )
        return output, make_design, (input,), (weight, bias)


class ProxPropLinear(LinearLayer, nn.Linear):
    __doc__ = f"``torch.nn.Linear`` with a proximal step.\n\n{ProxPropLayer.__doc__}"


class ProxPropConv1d(ConvLayer, nn.Conv1d):
    __doc__ = f"``torch.nn.Conv1d`` with a proximal step.\n\n{ProxPropLayer.__doc__}"


class ProxPropConv2d(ConvLayer, nn.Conv2d):
    __doc__ = f"``torch.nn.Conv2d`` with a proximal step.\n\n{ProxPropLayer.__doc__}"


class ProxPropConv3d(ConvLayer, nn.Conv3d):
    __doc__ = f"``torch.nn.Conv3d`` with a proximal step.\n\n{ProxPropLayer.__doc__}"
