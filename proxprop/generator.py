"""ProxProp classes of any module that is linear in its parameters, in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from proxprop.design import AutogradDesign, NoProximalStep, working_dtype
from proxprop.layers import (
    Linearised,
    ProxPropConv1d,
    ProxPropConv2d,
    ProxPropConv3d,
    ProxPropConvTranspose1d,
    ProxPropConvTranspose2d,
    ProxPropConvTranspose3d,
    ProxPropEmbedding,
    ProxPropLayer,
    ProxPropLinear,
    TransposedLinearLayer,
    Used,
    check_options,
)
from proxprop.linearity import check_linear

Place = tuple[dict[str, Any], str]
"""Where a module keeps a tensor: a dictionary of a submodule, and a key."""


def _places(module: nn.Module, tensors: Sequence[Tensor]) -> list[list[Place]]:
    """All places where ``module`` keeps each of ``tensors``.

    ``torch.func.functional_call`` goes by names, so it does not see tensors that hide parameters, as
    FullyShardedDataParallel sets them; and it refuses to be traced.
    """
    places: dict[int, list[Place]] = {id(tensor): [] for tensor in tensors}
    for part in module.modules():
        stores: tuple[dict[str, Any], ...] = (part._parameters, part._buffers, vars(part))
        for store in stores:
            for name, value in store.items():
                if isinstance(value, Tensor) and id(value) in places:
                    places[id(value)].append((store, name))
    return [places[id(tensor)] for tensor in tensors]


@contextlib.contextmanager
def _replaced(places: Sequence[Sequence[Place]], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Modules with ``tensors`` in these places."""
    kept = [(store, name, store.get(name, _Hole)) for those in places for store, name in those]
    for those, tensor in zip(places, tensors, strict=True):
        for store, name in those:
            store[name] = tensor
    try:
        yield
    finally:
        for store, name, value in kept:
            if value is _Hole:
                del store[name]
            else:
                store[name] = value


State = list[tuple[dict[str, Any], dict[str, Any]]]
"""What modules have in their dictionaries: each, and what was in it."""


def _state(module: nn.Module) -> State:
    """What ``module`` and its parts are by now: flags, settings, and copies of buffers and other tensors."""
    copies: dict[int, Tensor] = {}
    stores = [store for part in module.modules() for store in (vars(part), part._buffers, part._modules)]
    return [(store, {name: _copy(value, copies) for name, value in store.items()}) for store in stores]


def _copy(value: Any, copies: dict[int, Tensor], dtype: torch.dtype | None = None) -> Any:
    """Of a tensor that is no parameter a copy, one for all its places; anything else as it is."""
    if not isinstance(value, Tensor) or value.requires_grad:
        return value
    if id(value) not in copies:
        copied = value.detach().clone()
        copies[id(value)] = copied if dtype is None else _cast(copied, dtype)
    return copies[id(value)]


@contextlib.contextmanager
def _as_it_was(state: State, dtype: torch.dtype) -> Iterator[None]:
    """Modules in that state, with tensors in precision ``dtype``, which may change."""
    now = [(store, dict(store)) for store, _ in state]
    copies: dict[int, Tensor] = {}
    try:
        for store, then in state:
            _put(store, {name: _copy(value, copies, dtype) for name, value in then.items()})
        yield
    finally:
        for store, values in now:
            _put(store, values)


def _put(store: dict[str, Any], values: dict[str, Any]) -> None:
    for name in store.keys() - values.keys():
        del store[name]
    for name, value in values.items():
        if store.get(name, _Hole) is not value:
            store[name] = value


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of a layer's base class, as a function of the parameters and the tensors among its arguments.

    ``places`` are where the layer has its parameters. ``leaves`` and ``spec`` are the arguments as a tree, and
    ``_Hole`` stands in place of a tensor, which is passed anew.
    """

    layer: GeneratedLayer
    places: Sequence[Sequence[Place]]
    leaves: Sequence[Any]
    spec: TreeSpec

    @classmethod
    def split(cls, layer: GeneratedLayer, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[_Call, list[Tensor]]:
        """The call without its tensors, and the tensors, also those within lists and dictionaries."""
        leaves, spec = tree_flatten((tuple(args), kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        leaves = [_Hole if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        with layer._alone():
            return cls(layer, _places(layer, _tensors(layer._used())), leaves, spec), tensors

    def __call__(self, parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> Any:
        """The output; the base class may update buffers."""
        remaining = iter(tensors)
        leaves = [next(remaining) if leaf is _Hole else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        with self.layer._alone(), _replaced(self.places, parameters):
            return super(ProxPropLayer, self.layer).forward(*args, **kwargs)  # without the layer's hooks

    def pure(self, state: State, parameters: Sequence[Tensor], tensors: Sequence[Tensor], dtype: torch.dtype) -> Any:
        """The output of the layer in that state in precision ``dtype``; the layer stays as it is."""
        with self.layer._alone(), _as_it_was(state, dtype):
            return self(parameters, [_cast(tensor, dtype) for tensor in tensors])


class _Hole:
    """Stands where a call had a tensor."""


def _tensors(used: Used) -> list[Tensor]:
    return [tensor for tensor in used.values() if tensor is not None]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


class _Lock:
    """For one thread at a time, which may take it again. A copy of it is another one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[_Lock], tuple[()]]:
        return _Lock, ()


class _PickledByBase(ProxPropLayer):
    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the base class, so that it does not matter under which name the generated class is kept."""
        reduced = super().__reduce_ex__(protocol)
        base = type(self).__dict__.get("_generated_from")
        return reduced if base is None else (_new_instance, (base,), *reduced[2:])


class GeneratedLayer(_PickledByBase):
    """A ProxProp layer of unknown structure: conjugate gradients treat its parameters as one stacked vector."""

    matrix_known = False

    def _check_constructed(self) -> None:
        self._found_linear: set[tuple[bool, ...]] = set()  # in which of training and evaluation, of all parts
        self._lock = _Lock()
        if next(self.parameters(), None) is None:
            raise TypeError(f"{type(self).__name__}: the module has no parameters to take a step on")
        check_options(self)

    def _alone(self) -> AbstractContextManager[Any]:
        """Keeps other threads out while tensors are read, or others are in their place."""
        return contextlib.nullcontext() if torch.compiler.is_compiling() else self._lock

    def _used(self) -> Used:
        """All parameters, and tensors that need a gradient among the attributes, where wrappers keep theirs."""
        with self._alone():
            used: Used = dict(self.named_parameters())
            for prefix, module in self.named_modules():
                for name, value in vars(module).items():
                    if isinstance(value, Tensor) and value.requires_grad:
                        used[f"{prefix}.{name}" if prefix else name] = value
            return used

    def _output(self, used: Used, *args: Any, **kwargs: Any) -> Any:
        call, tensors = _Call.split(self, args, kwargs)
        return call(_tensors(used), tensors)

    def _linearised(self, detached: Used, trained: Sequence[bool], *args: Any, **kwargs: Any) -> Linearised:
        check_options(self)  # of EmbeddingBag; once more: they may be set at any time
        call, tensors = _Call.split(self, args, kwargs)
        parameters = _tensors(detached)
        dtype = functools.reduce(torch.promote_types, map(working_dtype, parameters))
        with self._alone():
            state = _state(self)  # the backward pass runs the base class again, as it is now
        if self._training_of_all() not in self._found_linear:
            like = [p.to(dtype) for p in parameters]
            self._check_linear(lambda values: call.pure(state, values, tensors, dtype), like, ", ".join(detached))

        def make_design(*inputs: Tensor) -> AutogradDesign:
            return AutogradDesign(lambda values: call.pure(state, values, inputs, dtype), parameters, trained, dtype)

        output = call(parameters, tensors)
        if output._is_view():  # of a parameter or an input, maybe: marking it as changed would change those
            output = output.clone()
        return output, make_design, tensors

    def _check_linear(self, forward: Callable[[Sequence[Tensor]], Any], like: Sequence[Tensor], names: str) -> None:
        with torch.autocast(like[0].device.type, enabled=False):
            try:
                evidence = check_linear(forward, like)
            except NoProximalStep as error:
                raise NoProximalStep(
                    f"{type(self).__name__}: {error} ({names}); a proximal step is not defined for this module"
                ) from None
        if evidence:
            self._found_linear.add(self._training_of_all())

    def _training_of_all(self) -> tuple[bool, ...]:
        return tuple(module.training for module in self.modules())

    def __prepare_scriptable__(self) -> GeneratedLayer:
        raise TypeError(f"{type(self).__name__}: torch.jit.script knows no generated layers; use torch.jit.trace")


def _new_instance(base: type[nn.Module]) -> nn.Module:
    cls: type[nn.Module] = proxprop_module_generator(base)
    return cls.__new__(cls)


_CLASSES: dict[type[nn.Module], type[ProxPropLayer]] = {
    nn.Linear: ProxPropLinear,
    nn.Conv1d: ProxPropConv1d,
    nn.Conv2d: ProxPropConv2d,
    nn.Conv3d: ProxPropConv3d,
    nn.ConvTranspose1d: ProxPropConvTranspose1d,
    nn.ConvTranspose2d: ProxPropConvTranspose2d,
    nn.ConvTranspose3d: ProxPropConvTranspose3d,
    nn.Embedding: ProxPropEmbedding,
}
"""The ProxProp class of each base class: those written out, and those generated so far."""


def is_transposed_linear(cls: type[nn.Module]) -> bool:
    """Whether this is transformers' ``Conv1D``, a linear layer with a weight ``[in, out]``. Nothing is imported."""
    return cls.__name__ == "Conv1D" and cls.__module__ in ("transformers.pytorch_utils", "transformers.modeling_utils")


class _TransposedLinearLayer(_PickledByBase, TransposedLinearLayer):
    """Of a class that is known by its name."""


def proxprop_module_generator(base: type[nn.Module]) -> type[ProxPropLayer]:
    """Make a ProxProp class of a module class whose output is linear in all of its parameters together.

    The class is a subclass of ``base`` with the same constructor plus the keywords ``tau_prox`` and
    ``optimization_mode`` (see ``ProxPropLinear``), and the same ``state_dict``. For ``torch.nn.Linear``,
    ``Conv1d/2d/3d``, ``ConvTranspose1d/2d/3d`` and ``Embedding`` it is the class that this package has under that name.
    The ``Conv1D`` of transformers has a known structure, too. Of any other class it is unknown: it offers the modes
    ``'prox_cgN'``, ``'published_cgN'`` and ``'gradient'``, and its conjugate gradients treat all parameters as one
    stacked vector, with one step length.

    Example:
        >>> ProxPropBilinear = proxprop_module_generator(torch.nn.Bilinear)
        >>> layer = ProxPropBilinear(16, 8, 4, tau_prox=0.5, optimization_mode="prox_cg3")

    Raises:
        TypeError: if ``base`` is no ``torch.nn.Module`` class or a lazy one; at construction if the module has no
            parameters, or an option of embeddings that changes them or their gradient; at the first forward pass with
            gradients if its output is not linear in them, or their gradient not that of the output.
    """
    if not (isinstance(base, type) and issubclass(base, nn.Module)):
        raise TypeError(f"proxprop_module_generator takes a class of torch.nn modules, got {base!r}")
    if issubclass(base, ProxPropLayer):
        return base
    if issubclass(base, LazyModuleMixin):
        raise TypeError(f"lazy modules change their class at first use; generate from {base.cls_to_become} instead")
    if base not in _CLASSES:
        members = {
            "__doc__": f"``{base.__name__}`` with a proximal step.\n\n{ProxPropLayer.__doc__}",
            "__module__": base.__module__,
            "_generated_from": base,
        }
        kind = _TransposedLinearLayer if is_transposed_linear(base) else GeneratedLayer
        _CLASSES[base] = type(f"ProxProp{base.__name__}", (kind, base), members)
    return _CLASSES[base]
