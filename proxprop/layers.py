"""Layers that take implicit steps: drop-in replacements for layers that are linear in their parameters."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.nn.modules.conv import _ConvNd

from proxprop.collector import Collector
from proxprop.compiled import CompiledStep, Operator, conv_direction, linear_direction
from proxprop.design import (
    ComputedDesign,
    ConvDesign,
    ConvGeometry,
    Design,
    EmbeddingDesign,
    LinearDesign,
    NoProximalStep,
    SharedProducts,
    TransposedConvDesign,
    TransposedConvGeometry,
    is_linear_now,
    is_moved,
    parameters_behind,
    transposed,
    working_dtype,
)
from proxprop.design.computed import COMPILED
from proxprop.function import NoStep, ProximalStep, Settings
from proxprop.modes import check_together, parse_mode, parse_reduction, parse_tau
from proxprop.rows import is_masking, is_masking_elsewhere, masked_rows

KNOWN = "Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d, Embedding"
"""The layers of known structure, for error messages."""

is_scripting = torch.jit.is_scripting  # type: ignore[attr-defined]  # here, as TorchScript reads comments, too

Used = dict[str, Tensor | None]
"""The tensors that a layer multiplies with, by name: parameters, or what stands in their place, or None for no bias."""

Linearised = tuple[Tensor, Callable[..., Design], Sequence[Tensor]]
"""An output computed with detached parameters, a function from the inputs to A, the inputs."""


class _Signature:
    """The constructor that documentation and editors show: the base class's, plus the keywords."""

    def __get__(self, instance: object, owner: type[ProxPropLayer]) -> inspect.Signature:
        if owner.__init__ is not ProxPropLayer.__init__:
            raise AttributeError("a constructor of its own")  # which is then what is shown
        plain = next(cls for cls in owner.__mro__ if not issubclass(cls, ProxPropLayer))
        parameters = list(inspect.signature(plain).parameters.values())
        keywords = inspect.signature(ProxPropLayer.__init__).parameters
        at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
        parameters[at:at] = [keywords[name] for name in ("tau_prox", "optimization_mode", "gram_reduction")]
        return inspect.Signature(parameters)


class ProxPropLayer(nn.Module):
    """What all ProxProp layers share: a base class's forward pass, with a proximal step in the backward pass.

    In the backward pass the parameters get, in place of their gradient AᵀG, the direction
    ``D = (AᵀA + I/τ)⁻¹ AᵀG`` or N conjugate gradient steps towards it (Frerix et al., *Proximal Backpropagation*,
    ICLR 2018, Section 3), where A is the layer's design matrix at its input and G the gradient of its output. D is
    accumulated into ``.grad``. The gradient of the input is the ordinary one.

    The solve is over the parameters with ``requires_grad``, as it is in the forward pass. For a weight that is computed
    from parameters (a mask, a parametrization) it is over those, with the weight linearised at their current values.
    D is not additive over micro-batches: each backward pass takes the step of its own batch, unless steps are deferred
    (``proxprop.defer``).

    Args:
        *args: As for the base class.
        tau_prox: Step size τ > 0 of the proximal step.
        optimization_mode: ``'prox_exact'``; ``'prox_cgN'``, N conjugate gradient steps; ``'gradient'``, plain
            back-propagation; or ``'published_cgN'``, the solver of the paper's published code.
        gram_reduction: ``'sum'``, the paper's: AᵀA sums over the rows of A, so that τ is tied to their number m (batch
            size, times positions). ``'mean'``: ``D = (τAᵀA/m + I)⁻¹ AᵀG``, which is on the gradient's scale and tends
            to it for small τ. It is m/τ times the paper's D with τ/m. Not for ``'published_cgN'``.
        **kwargs: As for the base class.

    These settings may be changed at any time and take effect at the next backward pass (a ``'published_cgN'`` at the
    next forward pass: a backward pass that comes before it raises a ``RuntimeError``; in compiled code all of them at
    the next forward pass).

    Raises:
        ValueError: for a setting that is not allowed, at construction and at assignment.
        TypeError: in a forward pass in training where no proximal step is known: ``'prox_exact'`` with a weight that
            is computed, nested tensors, tensor parallelism. In evaluation, and under ``torch.func`` transforms, it is a
            ``RuntimeError`` of a backward pass that comes to the parameters.
    """

    matrix_known: ClassVar[bool] = True
    """Whether the design matrix is known by its structure, as ``'prox_exact'`` needs."""

    __signature__ = _Signature()
    __jit_unused_properties__: ClassVar[list[str]] = ["tau_prox", "optimization_mode", "gram_reduction"]
    _linearity_stated = False

    def __init__(
        self,
        *args: Any,
        tau_prox: float = 1.0,
        optimization_mode: str = "prox_cg1",
        gram_reduction: str = "sum",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._proximal = Settings()
        self.tau_prox = tau_prox
        self.optimization_mode = optimization_mode
        self.gram_reduction = gram_reduction
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
                f"optimization_mode {value!r} needs a layer of known structure ({KNOWN}); "
                f"{type(self).__name__} can have 'prox_cgN', 'published_cgN' with N >= 1 or 'gradient'"
            )
        check_together(mode, self._proximal.reduction, self._proximal.collector is not None)
        self._proximal.mode = mode

    @property
    def gram_reduction(self) -> str:
        """How AᵀA is reduced over the rows of A."""
        return self._proximal.reduction

    @gram_reduction.setter
    def gram_reduction(self, value: str) -> None:
        reduction = parse_reduction(value)
        if reduction == "mean" and not self.matrix_known:
            raise ValueError(
                f"gram_reduction 'mean' needs a layer of known structure ({KNOWN}); "
                f"the rows of {type(self).__name__} are not known"
            )
        check_together(self._proximal.mode, reduction, self._proximal.collector is not None)
        self._proximal.reduction = reduction

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._step(*args, **kwargs)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        """The base class's forward pass, with a proximal step behind it where a parameter needs a gradient.

        Whether one does is asked of the tensors that the layer is about to multiply with, here and only here. So it
        does not matter what has put them there (sharding, replicas, masks, functional calls), and ``requires_grad``
        counts as it is now, as in all of autograd.
        """
        for value in (*args, *kwargs.values()):
            if isinstance(value, Proxy):
                return self._traced_call(value.tracer, args, kwargs)
        tracing = torch._C._get_tracing_state() is not None
        if tracing:
            _check_recording(self.training)
        if tracing or (torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()):  # or exporting
            return self._output(_detached(self._used()), *args, **kwargs)
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        used = self._used()
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            # Tensors do not tell here whether one outside of the transform needs a gradient.
            reason = "no proximal step under torch.func transforms (grad, vmap, jvp, ...) or forward-mode derivatives"
            return self._without_step(reason, used, *args, **kwargs)
        trained = [t is not None and t.requires_grad for t in used.values()]
        if not any(trained):
            return self._output(used, *args, **kwargs)
        if torch.compiler.is_compiling() and (self._proximal.collector is not None or is_masking()):
            return self._uncompiled(*args, **kwargs)
        try:
            _check_kinds((*args, *kwargs.values(), *used.values()))
            if getattr(self, "_is_replica", False) and is_masking_elsewhere():  # replicas have threads of their own
                raise NoProximalStep("no row mask under nn.DataParallel")
            computed, parameters = self._stepped(list(used.values()))
            if self._proximal.collector is not None:
                _check_deferred(used, self._proximal.collector)
        except NoProximalStep as error:
            if self.training:
                raise NoProximalStep(f"{type(self).__name__}: {error}") from error
            return self._without_step(str(error), used, *args, **kwargs)
        if torch.compiler.is_compiling():
            return self._compiled(used, trained, *args, **kwargs)
        # Autograd runs last what was made first: a parameter has its direction after the input has its gradient. So a
        # hook that steps the parameter then (an optimizer in the backward pass) does not change what that is made of.
        targets = [None if p is None else p.view_as(p) for p in parameters]
        output, make_design, inputs = self._linearised(_detached(used), trained, *args, **kwargs)
        self._check_real(output)
        if computed:
            make_design = functools.partial(self._computed_design, make_design, len(inputs), parameters, trained)
            inputs = (*inputs, *computed)
        return ProximalStep.apply(output, self._proximal, make_design, len(inputs), *inputs, *targets)

    def _check_real(self, output: Tensor) -> None:
        if output.is_complex():
            raise TypeError(f"{type(self).__name__} works on real numbers, got {output.dtype}")

    def _without_step(self, reason: str, used: Used, *args: Any, **kwargs: Any) -> Any:
        """The base class's forward pass; a backward pass that comes to the parameters raises an error."""
        message = f"{type(self).__name__}: {reason}; freeze the layer's parameters, or use the plain layer"
        guarded = {name: None if t is None else NoStep.apply(t, message) for name, t in used.items()}
        return self._output(guarded, *args, **kwargs)

    def _used(self) -> Used:
        """The tensors that the layer multiplies with, each read once: a parametrization may be random."""
        raise NotImplementedError

    def _output(self, used: Used, *args: Any, **kwargs: Any) -> Any:
        """The base class's forward pass with ``used``."""
        raise NotImplementedError

    def _linearised(self, detached: Used, trained: Sequence[bool], *args: Any, **kwargs: Any) -> Linearised:
        """The base class's forward pass with ``detached``, and what the backward pass needs."""
        raise NotImplementedError

    def _compiled(self, used: Used, trained: Sequence[bool], *args: Any, **kwargs: Any) -> Any:
        """``_step`` from there on, for a compiler that traces the layer."""
        operator = self._operator(used, trained)
        if operator is None:
            return self._uncompiled(*args, **kwargs)
        output = self._output(_detached(used), *args, **kwargs)
        self._check_real(output)
        read = (_read(argument, trained) for argument in args)
        return CompiledStep.apply(output, self._proximal, operator, trained, *read, *used.values())

    def _operator(self, used: Used, trained: Sequence[bool]) -> Operator | None:
        """What computes the direction in compiled code, where the layer's only argument is its input; None for none."""
        return None

    def _uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        """``_step`` as it is, between what is compiled before and after it."""
        from proxprop import uncompiled  # here, as it imports the compiler

        return uncompiled.call(self._step, *args, **kwargs)

    def _stepped(self, used: Sequence[Tensor | None]) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        """The tensors in ``used`` that are computed from parameters (all or none), and what a step is taken on.

        A direction for a masked weight, masked in its turn by the chain rule, could ascend.
        """
        tensors = [t for t in used if t is not None and t.requires_grad]
        if all(t.is_leaf for t in tensors):
            if self._linearity_stated:  # of an earlier mask or parametrization
                self._linearity_stated = False
            return (), used
        if torch.compiler.is_compiling():
            raise NoProximalStep(f"no proximal step for a weight that is computed from parameters {COMPILED}")
        if all(map(is_moved, tensors)):
            return (), used
        self._check_computed_mode()
        parameters = parameters_behind(tensors)
        if not self._linearity_stated and not is_linear_now(tensors, parameters):
            warnings.warn(
                f"{type(self).__name__}: a weight is not linear in the parameters that it is computed from; the "
                "proximal step is that of the layer linearised at their current values",
                stacklevel=6,  # the call of the layer
            )
        self._linearity_stated = True
        return tensors, parameters

    def _computed_design(
        self,
        make_design: Callable[..., Design],
        input_count: int,
        parameters: Sequence[Tensor | None],
        trained: Sequence[bool],
        *saved: Tensor,
    ) -> Design:
        self._check_computed_mode()  # once more: the mode is read in the backward pass
        leaves = [p for p in parameters if p is not None]
        return ComputedDesign(make_design(*saved[:input_count]), saved[input_count:], leaves, trained)

    def _check_computed_mode(self) -> None:
        if self._proximal.mode.needs_matrix:
            raise NoProximalStep(
                "'prox_exact' needs weights that are parameters, and one is computed from others (a mask or "
                "parametrization); use 'prox_cgN', or make the computed weight the parameter "
                "(torch.nn.utils.prune.remove, torch.nn.utils.parametrize.remove_parametrizations)"
            )

    def _traced_call(self, tracer: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """One node in a graph of torch.fx, which keeps the step."""
        owner = next(cls for cls in type(self).__mro__ if "forward" in vars(cls))
        if owner.__module__ != __name__ or tracer.root is self:
            raise TypeError(
                f"{type(self).__name__}: torch.fx traces a model that contains the layer, not the layer itself or a "
                "forward of its own; name it a leaf of the tracer"
            )
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

    def __copy__(self) -> ProxPropLayer:
        """With settings of its own, as a module's attributes are; its step is not deferred."""
        other = self.__class__.__new__(self.__class__)
        vars(other).update(vars(self), _proximal=copy.copy(self._proximal))
        return other

    def extra_repr(self) -> str:
        settings = f"tau_prox={self.tau_prox:g}, optimization_mode={self.optimization_mode!r}"
        if self.gram_reduction != "sum":
            settings += f", gram_reduction={self.gram_reduction!r}"
        return ", ".join(filter(None, (super().extra_repr(), settings)))


def _check_deferred(used: Used, collector: Collector) -> None:
    """Refuse to defer where gradients are not accumulated in the layer's own parameters."""
    if any(t is not None and t.requires_grad and not t.is_leaf for t in used.values()):
        raise NoProximalStep(
            "a deferred step needs a weight and a bias that are parameters (no mask, parametrization or replica)"
        )
    for tensor, known in zip(used.values(), collector.parameters, strict=True):
        is_sharded = hasattr(known, "placements")  # those in use are gathered from its parts
        if tensor is not None and tensor.requires_grad and tensor is not known and not is_sharded:
            raise NoProximalStep(
                "its parameters are others than when its step was deferred (assigned, or of a functional call); "
                "call remove(), and defer again"
            )


def _detached(used: Used) -> Used:
    return {name: None if tensor is None else tensor.detach() for name, tensor in used.items()}


def _read(input: Tensor, trained: Sequence[bool]) -> Tensor:
    """What a step reads of the input: for a bias alone, whose column of A is ones, its shape and not its memory."""
    return input if trained[0] else input.new_zeros((), layout=torch.strided).expand(input.shape)


def _each(value: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """A convolution's argument for every spatial dimension, given as PyTorch takes it."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dimensions if len(values) == 1 else values


def _check_kinds(values: Sequence[Any]) -> None:
    """Refuse arguments and weights of kinds that design matrices know nothing of."""
    for value in values:
        if isinstance(value, Tensor) and value.is_nested:
            raise NoProximalStep("no proximal step for nested tensors")
        if type(value) is not Tensor and type(value) is not nn.Parameter and hasattr(value, "placements"):
            raise NoProximalStep("no proximal step for a DTensor (tensor parallelism)")


def _check_recording(training: bool) -> None:
    """Refuse to be traced or scripted for training: the record would take gradients for directions."""
    if training and torch.is_grad_enabled():
        raise RuntimeError(
            "a ProxProp layer takes no proximal step in a traced or scripted model; call .eval() first, which records "
            "it with frozen parameters"
        )


class LinearLayer(ProxPropLayer):
    """The forward pass and design matrix of ``torch.nn.Linear``."""

    if TYPE_CHECKING:
        weight: Tensor
        bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():  # which compiles this branch alone
            _check_recording(self.training)
            bias = self.bias
            return nn.functional.linear(input, self.weight.detach(), None if bias is None else bias.detach())
        else:
            output: Tensor = self._step(input)
            return output

    def _used(self) -> Used:
        return {"weight": self.weight, "bias": self.bias}

    def _output(self, used: Used, input: Tensor) -> Tensor:
        return nn.functional.linear(input, cast(Tensor, used["weight"]), used["bias"])

    def _linearised(self, detached: Used, trained: Sequence[bool], input: Tensor) -> Linearised:
        shape = cast(Tensor, detached["weight"]).shape
        make_design = functools.partial(
            LinearDesign,
            weight_shape=shape,
            trained=trained,
            shared=SharedProducts.of(input) if trained[0] else None,
            sparse=trained[0] and input.layout is not torch.strided,
            mask=masked_rows(input, input.shape[:-1]),
        )
        return self._output(detached, input), make_design, (_read(input, trained),)

    def _operator(self, used: Used, trained: Sequence[bool]) -> Operator:
        shape = cast(Tensor, used["weight"]).shape
        return functools.partial(linear_direction, weight_shape=shape, trained=trained)


class TransposedLinearLayer(ProxPropLayer):
    """The forward pass and design matrix of linear layers with a weight ``[in, out]``: ``Conv1D`` of transformers."""

    if TYPE_CHECKING:
        weight: Tensor
        bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if is_scripting():
            _check_recording(self.training)
            return nn.functional.linear(x, self.weight.detach().t(), self.bias.detach())
        else:
            output: Tensor = self._step(x)
            return output

    def _used(self) -> Used:
        return {"weight": self.weight, "bias": self.bias}

    def extra_repr(self) -> str:
        inputs, outputs = self.weight.shape
        return f"nf={outputs}, nx={inputs}, {super().extra_repr()}"

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)  # the base class has one of its own, without our settings

    def _output(self, used: Used, x: Tensor) -> Tensor:
        weight, bias = cast(Tensor, used["weight"]), cast(Tensor, used["bias"])
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.shape[1])

    def _linearised(self, detached: Used, trained: Sequence[bool], x: Tensor) -> Linearised:
        make_design = functools.partial(
            LinearDesign,
            weight_shape=cast(Tensor, detached["weight"]).shape[::-1],
            trained=trained,
            shared=SharedProducts.of(x) if trained[0] else None,
            mask=masked_rows(x, x.shape[:-1]),
            layout=transposed,
        )
        return self._output(detached, x), make_design, (_read(x, trained),)


class EmbeddingLayer(ProxPropLayer):
    """The forward pass and design matrix of ``torch.nn.Embedding``."""

    if TYPE_CHECKING:
        weight: Tensor
        padding_idx: int | None

    def _check_constructed(self) -> None:
        check_options(self)

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            _check_recording(self.training)
            return nn.functional.embedding(input, self.weight.detach(), self.padding_idx)
        else:
            output: Tensor = self._step(input)
            return output

    def _used(self) -> Used:
        return {"weight": self.weight, "bias": None}

    def _output(self, used: Used, input: Tensor) -> Tensor:
        return nn.functional.embedding(input, cast(Tensor, used["weight"]), self.padding_idx)

    def _linearised(self, detached: Used, trained: Sequence[bool], input: Tensor) -> Linearised:
        check_options(self)  # once more: they may be set at any time
        weight = cast(Tensor, detached["weight"])
        make_design = functools.partial(
            EmbeddingDesign,
            weight_shape=weight.shape[::-1],
            trained=trained,
            dtype=working_dtype(weight),
            padding=None if self.padding_idx is None else self.padding_idx % len(weight),  # -1 is the last
            mask=masked_rows(input, input.shape),
        )
        return self._output(detached, input), make_design, (input,)


def unknown_option(module: nn.Module) -> str | None:
    """An option of embeddings, as ``name=value``, with which they do more than to multiply."""
    for option in ("max_norm", "sparse", "scale_grad_by_freq"):
        value = getattr(module, option, None)
        if value is not None and value is not False:
            return f"{option}={value}"
    return None


def check_options(module: nn.Module) -> None:
    """Refuse such an option."""
    if option := unknown_option(module):
        raise TypeError(
            f"{type(module).__name__}: {option} changes the parameters or their gradient in a way of its own, for "
            "which a proximal step is not defined"
        )


class ConvLayer(ProxPropLayer):
    """The forward pass and design matrix of ``torch.nn.Conv1d``, ``Conv2d`` and ``Conv3d``."""

    if TYPE_CHECKING:
        weight: Tensor
        bias: Tensor | None

        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            _check_recording(self.training)
            bias = self.bias
            return self._conv_forward(input, self.weight.detach(), None if bias is None else bias.detach())
        else:
            output: Tensor = self._step(input)
            return output

    def _used(self) -> Used:
        return {"weight": self.weight, "bias": self.bias}

    def _output(self, used: Used, input: Tensor) -> Tensor:
        return self._conv_forward(input, cast(Tensor, used["weight"]), used["bias"])

    def _linearised(self, detached: Used, trained: Sequence[bool], input: Tensor) -> Linearised:
        geometry = self._geometry(detached)
        shared = SharedProducts.of(input) if trained[0] else None
        make_design = functools.partial(ConvDesign, geometry=geometry, trained=trained, shared=shared)
        return self._output(detached, input), make_design, (_read(input, trained),)

    def _geometry(self, used: Used) -> ConvGeometry:
        layer = cast(_ConvNd, self)
        weight_shape = tuple(cast(Tensor, used["weight"]).shape)
        spatial = len(weight_shape) - 2
        dilation = _each(layer.dilation, spatial)
        if layer.padding_mode != "zeros":
            pad = tuple(layer._reversed_padding_repeated_twice)  # which the forward pass takes, too
        elif layer.padding == "same":
            both = [step * (taps - 1) for step, taps in zip(dilation, weight_shape[2:], strict=True)]
            pad = tuple(side for size in both[::-1] for side in (size // 2, size - size // 2))
        else:
            sizes = (0,) * spatial if layer.padding == "valid" else _each(cast(Any, layer.padding), spatial)
            pad = tuple(size for size in sizes[::-1] for _ in range(2))
        return ConvGeometry(
            weight_shape=weight_shape,
            stride=_each(layer.stride, spatial),
            dilation=dilation,
            groups=layer.groups,
            pad=pad,
            pad_mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode,
        )

    def _operator(self, used: Used, trained: Sequence[bool]) -> Operator:
        geometry = self._geometry(used)
        return functools.partial(
            conv_direction,
            weight_shape=geometry.weight_shape,
            trained=trained,
            stride=geometry.stride,
            dilation=geometry.dilation,
            groups=geometry.groups,
            pad=geometry.pad,
            pad_mode=geometry.pad_mode,
        )


class ConvTransposeLayer(ProxPropLayer):
    """The forward pass and design matrix of ``torch.nn.ConvTranspose1d``, ``ConvTranspose2d``, ``ConvTranspose3d``."""

    if TYPE_CHECKING:
        weight: Tensor
        bias: Tensor | None
        stride: tuple[int, ...]
        padding: tuple[int, ...]
        kernel_size: tuple[int, ...]
        dilation: tuple[int, ...]
        groups: int
        padding_mode: str

        def _output_padding(self, *args: Any) -> list[int]: ...

        def _conv_transpose(
            self, input: Tensor, weight: Tensor, bias: Tensor | None, output_padding: list[int]
        ) -> Tensor: ...

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if is_scripting():
            _check_recording(self.training)
            bias = self.bias
            output_padding = self._extra(input, output_size)
            return self._conv_transpose(
                input, self.weight.detach(), None if bias is None else bias.detach(), output_padding
            )
        else:
            output: Tensor = self._step(input, output_size)
            return output

    def _extra(self, input: Tensor, output_size: list[int] | None) -> list[int]:
        """The output padding that gives ``output_size``; the ``ValueError`` of the plain layer for a padding mode."""
        if self.padding_mode != "zeros":
            raise ValueError(f"Only `zeros` padding mode is supported for ConvTranspose{len(self.kernel_size)}d")
        return self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation
        )

    def _used(self) -> Used:
        return {"weight": self.weight, "bias": self.bias}

    def _output(self, used: Used, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return self._conv_transpose(input, cast(Tensor, used["weight"]), used["bias"], self._extra(input, output_size))

    def _linearised(
        self, detached: Used, trained: Sequence[bool], input: Tensor, output_size: list[int] | None = None
    ) -> Linearised:
        shape = cast(Tensor, detached["weight"]).shape
        extra = self._extra(input, output_size)
        hops, pads, extras, steps = (
            _each(value, len(shape) - 2) for value in (self.stride, self.padding, extra, self.dilation)
        )
        geometry = TransposedConvGeometry.of(shape, hops, pads, extras, steps, self.groups)
        shared = SharedProducts.of(input) if trained[0] else None
        make_design = functools.partial(TransposedConvDesign, geometry=geometry, trained=trained, shared=shared)
        return self._output(detached, input, output_size), make_design, (_read(input, trained),)


class ProxPropLinear(LinearLayer, nn.Linear):  # type: ignore[misc]  # torch says that there always is a bias
    __doc__ = f"``torch.nn.Linear`` with a proximal step.\n\n{ProxPropLayer.__doc__}"


class ProxPropConv1d(ConvLayer, nn.Conv1d):
    __doc__ = f"``torch.nn.Conv1d`` with a proximal step.\n\n{ProxPropLayer.__doc__}"


class ProxPropConv2d(ConvLayer, nn.Conv2d):
    __doc__ = f"``torch.nn.Conv2d`` with a proximal step.\n\n{ProxPropLayer.__doc__}"


class ProxPropConv3d(ConvLayer, nn.Conv3d):
    __doc__ = f"``torch.nn.Conv3d`` with a proximal step.\n\n{ProxPropLayer.__doc__}"


class ProxPropConvTranspose1d(ConvTransposeLayer, nn.ConvTranspose1d):  # type: ignore[misc]  # padding is no text
    __doc__ = f"``torch.nn.ConvTranspose1d`` with a proximal step.\n\n{ProxPropLayer.__doc__}"

    def _conv_transpose(self, input: Tensor, weight: Tensor, bias: Tensor | None, output_padding: list[int]) -> Tensor:
        return nn.functional.conv_transpose1d(
            input, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )


class ProxPropConvTranspose2d(ConvTransposeLayer, nn.ConvTranspose2d):  # type: ignore[misc]  # padding is no text
    __doc__ = f"``torch.nn.ConvTranspose2d`` with a proximal step.\n\n{ProxPropLayer.__doc__}"

    def _conv_transpose(self, input: Tensor, weight: Tensor, bias: Tensor | None, output_padding: list[int]) -> Tensor:
        return nn.functional.conv_transpose2d(
            input, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )


class ProxPropConvTranspose3d(ConvTransposeLayer, nn.ConvTranspose3d):  # type: ignore[misc]  # padding is no text
    __doc__ = f"``torch.nn.ConvTranspose3d`` with a proximal step.\n\n{ProxPropLayer.__doc__}"

    def _conv_transpose(self, input: Tensor, weight: Tensor, bias: Tensor | None, output_padding: list[int]) -> Tensor:
        return nn.functional.conv_transpose3d(
            input, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )


class ProxPropEmbedding(EmbeddingLayer, nn.Embedding):
    __doc__ = f"``torch.nn.Embedding`` with a proximal step.\n\n{ProxPropLayer.__doc__}"
