"""A whole model: its layers made ProxProp layers and plain ones again, its parameters in two groups."""

from __future__ import annotations

import collections
import dataclasses
import dis
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from proxprop.function import Settings
from proxprop.generator import is_transposed_linear, proxprop_module_generator
from proxprop.layers import KNOWN, ProxPropLayer, unknown_option
from proxprop.modes import check_together, parse_mode, parse_reduction, parse_tau

Selector = str | re.Pattern[str] | Callable[[str, nn.Module], bool]
"""Layers by a regular expression, searched for in the dotted name, or by a function of that name and the module."""

Overrides = Mapping[str, Mapping[str, Any]] | Callable[[str, nn.Module], Mapping[str, Any] | None]
"""Settings of single layers, by the same two."""

_PROXPROP: dict[type[nn.Module], type[ProxPropLayer]] = {
    plain: proxprop_module_generator(plain)
    for plain in (
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    )
}
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {proximal: plain for plain, proximal in _PROXPROP.items()}
_AUTO = "auto"
_OUTPUTS = ("out_features", "out_channels", "nf")
"""Where modules keep how many outputs they have; the last is that of transformers' ``Conv1D``."""
_NO_CLASS = "no ProxProp class"


def _proximal_class(cls: type[nn.Module]) -> type[ProxPropLayer] | None:
    """The ProxProp class of a plain one, if it has one of known structure."""
    return proxprop_module_generator(cls) if is_transposed_linear(cls) else _PROXPROP.get(cls)


def _plain_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The plain class of a ProxProp one, if it is one of those."""
    base: type[nn.Module] | None = vars(cls).get("_generated_from")
    return base if base is not None and is_transposed_linear(base) else _PLAIN.get(cls)


def _known_base(module: nn.Module) -> type[nn.Module] | None:
    """The first of these classes that ``module`` is of."""
    classes: tuple[type[nn.Module], ...] = type(module).__mro__[:-1]
    return next((cls for cls in classes if cls is ProxPropLayer or _proximal_class(cls)), None)


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What ``convert`` did with one module that has parameters.

    Attributes:
        name: Its dotted name; empty for the model itself.
        other_names: Further names of the same module.
        class_name: Its class before.
        tau_prox: Its setting now; None where it was left alone.
        optimization_mode: The same.
        gram_reduction: The same.
        reason: Why it was left alone; None where it was not.
        note: Where it was not: what else to know. When a module reads the weight of its layer in place of calling it,
            the weight gets its ordinary gradient.
    """

    name: str
    other_names: tuple[str, ...]
    class_name: str
    tau_prox: float | None = None
    optimization_mode: str | None = None
    gram_reduction: str | None = None
    reason: str | None = None
    note: str | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class ConversionReport:
    """What ``convert`` did, module by module in the model's order. Prints as a table."""

    layers: tuple[LayerReport, ...]

    @property
    def converted(self) -> tuple[LayerReport, ...]:
        """The ProxProp layers with the settings asked for."""
        return tuple(layer for layer in self.layers if layer.reason is None)

    @property
    def left_alone(self) -> tuple[LayerReport, ...]:
        """What is as it was."""
        return tuple(layer for layer in self.layers if layer.reason is not None)

    def __repr__(self) -> str:
        shown = [layer for layer in self.layers if layer.reason != _NO_CLASS]
        rows = [("layer", "class", "settings")]
        for layer in shown:
            verdict = f"left alone: {layer.reason}"
            if layer.reason is None:
                verdict = f"tau_prox={layer.tau_prox:g}, {layer.optimization_mode}"
                verdict += ", gram_reduction=mean" if layer.gram_reduction == "mean" else ""
                verdict += f"; {layer.note}" if layer.note else ""
            names = (name or "(the model itself)" for name in (layer.name, *layer.other_names))
            rows.append((" = ".join(names), layer.class_name, verdict))
        width = [max(len(row[column]) for row in rows) for column in range(2)]
        lines = [f"{name:{width[0]}}  {kind:{width[1]}}  {verdict}".rstrip() for name, kind, verdict in rows]
        lines.append(f"{len(self.converted)} of {len(shown)} converted{_without_class(self.layers)}")
        if len(shown) > 1 and shown[-1].reason is None:
            lines.append(f"The paper leaves the output layer plain; {shown[-1].name} is the last one here.")
        return "\n".join(lines)


def _without_class(layers: Sequence[LayerReport]) -> str:
    """The modules of other classes, counted: there may be many, and nothing is to be said of each."""
    counts = collections.Counter(layer.class_name for layer in layers if layer.reason == _NO_CLASS)
    text = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"; without a ProxProp class: {text}" if text else ""


def convert(
    model: nn.Module,
    *,
    tau_prox: float = 1.0,
    optimization_mode: str = "prox_cg1",
    gram_reduction: str = "sum",
    gram_budget: float | None = None,
    only: Selector | None = None,
    skip: Selector | None = None,
    overrides: Overrides | None = None,
) -> ConversionReport:
    """Make ProxProp layers of a model's linear layers, convolutions and embeddings, in place.

    These are ``Linear``, ``Conv1d/2d/3d``, ``ConvTranspose1d/2d/3d`` and ``Embedding`` of ``torch.nn``, and the
    ``Conv1D`` of transformers, which is a linear layer.

    Modules and parameters stay the same objects, so optimizers, hooks and ``state_dict`` are as before; ``revert``
    undoes it. The output layer, which the paper leaves plain, is taken like any other: name it in ``skip``. A layer
    converted before gets the new settings.

    Left alone, each with its reason in the report, is what a proximal step would not reach or not fit: layers of a
    subclass (its forward pass may be another one), with a ``forward`` set on the instance, parametrized, pruned,
    sharded, quantised, lazy, complex or frozen ones, those that share a parameter with another module, an adapter's
    ``base_layer``, and those whose parent reads the weight and never calls the layer (as ``nn.MultiheadAttention``).

    Args:
        model: Any module, also a single layer.
        tau_prox: Step size τ, as for ``ProxPropLinear``.
        optimization_mode: As for ``ProxPropLinear``, or ``'auto'``: ``'prox_exact'`` for layers whose Gram matrix AᵀA
            is no larger than ``gram_budget``, ``'prox_cg3'`` for the others, as the report says.
        gram_reduction: As for ``ProxPropLinear``; outside the paper, ``'mean'`` is the one to take.
        gram_budget: Bytes, for ``'auto'``; by default 2²⁷, a matrix of 4096 columns. (A batch of fewer rows needs less,
            but it is not known here.)
        only: Take only these layers: a regular expression, searched for in the dotted name (``re.search``), or a
            function of that name and the module. A module with several names is found by each of them.
        skip: Leave these alone.
        overrides: Other settings for some layers: a mapping from regular expressions to mappings of setting names to
            values, in which the first expression found in a name counts, or a function of the dotted name and the
            module that returns the inner mapping, or None for no other settings.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> convert(model, tau_prox=0.5, optimization_mode="prox_exact", skip="^2$")
        layer  class   settings
        0      Linear  tau_prox=0.5, prox_exact
        2      Linear  left alone: in skip
        1 of 2 converted

    Raises:
        ValueError: if no layer is converted; if a regular expression in ``skip`` or ``overrides`` is found nowhere; for
            a regular expression or a setting that is not allowed. The model is as before then.
        TypeError: for arguments of other types. The same.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes a torch.nn.Module, got {type(model).__name__}")
    settings = {"tau_prox": tau_prox, "optimization_mode": optimization_mode, "gram_reduction": gram_reduction}
    common = _checked(settings, "convert")
    if gram_budget is not None and not gram_budget >= 0:
        raise ValueError(f"convert: gram_budget must be a number of bytes, at least 0, got {gram_budget!r}")
    wanted = None if only is None else _matcher("only", only)
    unwanted = None if skip is None else _matcher("skip", skip)
    override, rules = _overrides(overrides)

    places = _places(model)
    layers, is_budget_read = [], False
    for place in places:
        reason = place.without_class()
        if reason is None and wanted and not wanted(place):
            reason = "not in only"
        if reason is None and unwanted and unwanted(place):
            reason = "in skip"
        reason = reason or place.unfit()
        done = {"reason": reason} if reason else common | override(place) | {"note": place.note()}
        name, *other_names = place.names
        if not reason:
            if done["optimization_mode"] == _AUTO:
                budget, is_budget_read = 2**27 if gram_budget is None else gram_budget, True
                done["optimization_mode"] = "prox_exact" if place.gram_bytes() <= budget else "prox_cg3"
            _check_together(done, place)
        layers.append(LayerReport(name, tuple(other_names), type(place.module).__name__, **done))
    report = ConversionReport(tuple(layers))

    # A name with a typo would leave nothing out and change nothing, without a word.
    if isinstance(skip, str | re.Pattern) and unwanted and not any(map(unwanted, places)):
        raise ValueError(f"convert: skip={skip!r} is found in no layer's name; there are {_first_names(layers)}")
    if not report.converted:
        raise ValueError(f"convert: nothing to convert{_why_nothing(report)}")
    if gram_budget is not None and not is_budget_read:
        raise ValueError("convert: gram_budget counts with optimization_mode='auto' alone, and no layer has that")
    for pattern, found in rules:
        if not any(found(place) for place, layer in zip(places, layers, strict=True) if layer.reason is None):
            names = _first_names(report.converted)
            raise ValueError(
                f"convert: overrides: {pattern!r} is found in no converted layer's name; there are {names}"
            )

    # Nothing below can fail, so a model is converted whole or not at all. The class is assigned, and no new module
    # made: whoever holds the module (a parent under two names, a hook's closure, an optimizer's owner) holds the
    # ProxProp layer then, and hooks, buffers, `training` and what else is in its __dict__ need not be known here.
    for place, layer in zip(places, layers, strict=True):
        if layer.reason is None:
            if proximal := _proximal_class(type(place.module)):
                place.module.__class__ = proximal
                vars(place.module)["_proximal"] = Settings()
            vars(place.module)["_proximal"].reduction = "sum"  # which goes with any mode
            for name in common:
                setattr(place.module, name, getattr(layer, name))
    return report


def revert(model: nn.Module) -> tuple[str, ...]:
    """Make plain layers of all of a model's ProxProp layers, in place: for export, quantisation or plain training.

    Modules and parameters stay the same objects. ProxProp layers that ``convert`` did not make become plain, too.

    Returns:
        The dotted names of the layers that are plain now, in the model's order; empty if there was no ProxProp layer.

    Raises:
        ValueError: for a ProxProp layer whose plain form is not known: of a subclass, parametrized, or with a
            ``forward`` set on the instance. The model is as before then.
        TypeError: if ``model`` is no ``torch.nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"revert takes a torch.nn.Module, got {type(model).__name__}")
    layers: list[tuple[str, nn.Module]] = [(n, m) for n, m in model.named_modules() if isinstance(m, ProxPropLayer)]
    plain: list[type[nn.Module]] = []
    for name, module in layers:
        known = _PLAIN.get(type(module)) or vars(type(module)).get("_generated_from")
        if known is None or "forward" in vars(module):
            what = f"is a {type(module).__name__}" if known is None else "has a forward set on the instance"
            raise ValueError(f"revert: {name or 'the model itself'} {what}; its plain form is not known")
        plain.append(known)
    for (_, module), plain_class in zip(layers, plain, strict=True):
        module.__class__ = plain_class
        for state in (
            "_proximal",
            "_found_linear",
            "_lock",
            "_linearity_stated",
        ):  # what layers.py and generator.py keep
            vars(module).pop(state, None)
    return tuple(name for name, _ in layers)


def param_groups(
    model: nn.Module, *, proximal: Mapping[str, Any] | None = None, plain: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """A model's parameters in two groups for an optimizer: those of its ProxProp layers, and the rest.

    A direction D has another scale than a gradient, so the two want different learning rates. Each parameter is in one
    group, frozen ones too. One that a plain module has as well is in the second: it gets D and a gradient, summed.

    Args:
        model: A model with ProxProp layers.
        proximal: Options of the first group, such as ``{"lr": 1.0}``; what is missing is the optimizer's default.
        plain: Options of the second.

    Example:
        >>> optimizer = torch.optim.SGD(param_groups(model, proximal={"lr": 1.0}, plain={"lr": 0.05}), momentum=0.9)

    Raises:
        ValueError: if no parameter belongs to ProxProp layers alone, or for an option ``'params'``.
    """
    for options in (proximal, plain):
        if options and "params" in options:
            raise ValueError("param_groups: 'params' is no option; the parameters come from the model")
    within = {id(m) for layer in model.modules() if isinstance(layer, ProxPropLayer) for m in layer.modules()}
    outside = {id(p) for m in model.modules() if id(m) not in within for p in m.parameters(recurse=False)}
    groups: list[dict[str, Any]] = [
        {**(options or {}), "params": [p for p in model.parameters() if (id(p) in outside) is is_plain]}
        for options, is_plain in ((proximal, False), (plain, True))
    ]
    if not groups[0]["params"]:
        raise ValueError("param_groups: the model has no ProxProp layer with parameters of its own; convert it first")
    return groups


@dataclasses.dataclass
class _Place:
    """A module with all of its names, and what is around it."""

    module: nn.Module
    names: list[str]
    parents: list[tuple[nn.Module, str]]
    above: tuple[tuple[str, nn.Module], ...]  # what its first name goes through, with names
    partners: dict[str, str]  # names of its parameters, to names of other modules that have them, too

    def without_class(self) -> str | None:
        return None if _known_base(self.module) or not _has_parameters(self.module) else _NO_CLASS

    def unfit(self) -> str | None:
        """Why a proximal step does not reach or does not fit this layer; None where it does."""
        module = self.module
        base = _known_base(module)
        if base is None:
            return "no parameters (quantised?)"
        for name, outer in self.above:
            if isinstance(outer, ProxPropLayer):
                return f"part of a ProxProp layer, {name or 'the model itself'}"
            if type(outer).__name__ == "FullyShardedDataParallel":  # importing it takes longer than all of this
                return "sharded: within FullyShardedDataParallel"
        for parent, attribute in self.parents:
            if _uses(type(parent), attribute) == (True, False):
                return f"{type(parent).__name__} reads its weight and does not call it"
        if any(attribute == "base_layer" for _, attribute in self.parents):
            return "an adapter's base layer"
        if isinstance(module, LazyModuleMixin):
            return "lazy: its shape is known after a first batch"
        if parametrize.is_parametrized(module):
            return "parametrized"
        for name, parameter in module.named_parameters(recurse=False):
            if type(parameter) is not nn.Parameter:
                kind = type(parameter).__name__
                return f"sharded: its {name} is a DTensor" if kind == "DTensor" else f"its {name} is a {kind}"
        if type(module) is not base and _plain_class(type(module)) is None:
            return f"a subclass of {base.__name__}"
        if "forward" in vars(module):
            return "its forward is set on the instance"
        if reason := unknown_option(module) or _unfit_parameters(module):
            return reason
        if self.partners:
            return ", ".join(f"{name} shared with {partner}" for name, partner in self.partners.items())
        if not any(p.requires_grad for p in module.parameters()):
            return "frozen"
        return None

    def gram_bytes(self) -> int:
        """The size of AᵀA in float64; an embedding's is diagonal."""
        module: Any = self.module
        weight: Tensor = module.weight
        if isinstance(module, nn.Embedding):
            return 8 * weight.shape[0]
        outputs = next(value for value in (getattr(module, name, None) for name in _OUTPUTS) if value is not None)
        columns: int = weight.numel() // outputs + int(getattr(module, "bias", None) is not None)
        return 8 * int(getattr(module, "groups", 1)) * columns**2

    def note(self) -> str | None:
        """What may keep a proximal step from being taken although the layer is a ProxProp layer."""
        for parent, attribute in self.parents:
            if _uses(type(parent), attribute)[0]:
                return f"{type(parent).__name__} also reads its weight"
        return None


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _unfit_parameters(module: nn.Module) -> str | None:
    """What is wrong where ``weight`` and ``bias`` are not the layer's own, whole and real."""
    registered = module._parameters
    for name in ("weight",) if isinstance(module, nn.Embedding) else ("weight", "bias"):
        if name not in registered:  # pruned, or normalised by a hook; or taken by a wrapper
            sources = ", ".join(other for other in registered if other.startswith(f"{name}_"))
            return f"its {name} is computed from {sources}" if sources else f"its {name} is no parameter (sharded?)"
    weight = registered["weight"]
    if weight is None or weight.dim() < 2:  # what DeepSpeed leaves in place of it
        return "sharded: its weight is not here"
    return "complex" if weight.is_complex() else None


def _uses(parent: type[nn.Module], child: str) -> tuple[bool, bool]:
    """Whether a method of ``parent`` takes the weight or bias of ``self.child``, and whether one does anything else
    with it, such as calling it. Methods that initialise do not count as taking.

    Read off the bytecode, as the source may not be there. What is done with ``self.child`` by other means (``getattr``,
    a list) is not seen.
    """
    reads = others = False
    for cls in parent.__mro__:
        if cls in (nn.Module, object):
            continue
        for key, member in vars(cls).items():
            function = inspect.unwrap(member) if callable(member) else None
            if not isinstance(function, types.FunctionType):
                continue
            loads = [*_attribute_loads(function.__code__, child), None, None]
            for name, second, third in zip(loads, loads[1:], loads[2:], strict=False):
                if name == child and second not in ("weight", "bias"):
                    others = True
                elif name == child and third not in ("dtype", "device", "shape") and not re.search("init|reset", key):
                    reads = True
    return reads, others


def _attribute_loads(code: types.CodeType, child: str) -> Iterator[str | None]:
    """The attributes that functions with an attribute ``child`` load, in order; None for any other instruction."""
    if child in code.co_names:
        for instruction in dis.get_instructions(code):
            if instruction.opname != "EXTENDED_ARG":
                yield instruction.argval if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") else None
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _attribute_loads(constant, child)


def _places(model: nn.Module) -> list[_Place]:
    """The model's modules that have parameters, or should have some."""
    places: dict[int, _Place] = {}
    owners: dict[int, list[str]] = collections.defaultdict(list)  # of each parameter
    for name, module, above in _walk(model, "", ()):
        if id(module) not in places:
            places[id(module)] = _Place(module, [], [], above, {})
            for parameter in module.parameters(recurse=False):
                owners[id(parameter)].append(name)
        places[id(module)].names.append(name)
        if above:
            places[id(module)].parents.append((above[-1][1], name.rpartition(".")[2]))
    for place in places.values():
        for key, parameter in place.module.named_parameters(recurse=False):
            others = [name for name in owners[id(parameter)] if name != place.names[0]]
            if others:
                place.partners[key] = others[0] or "the model itself"
    return [
        place
        for place in places.values()
        if _has_parameters(place.module)
        or _known_base(place.module)
        or (_had_parameters(place.module) and not any(_had_parameters(module) for _, module in place.above))
    ]


def _had_parameters(module: nn.Module) -> bool:
    """Whether this looks like a layer whose parameters were packed away, by its name, as there is nothing else."""
    return re.search("Linear|Conv", type(module).__name__) is not None and next(module.parameters(), None) is None


def _walk(
    module: nn.Module, name: str, above: tuple[tuple[str, nn.Module], ...]
) -> Iterator[tuple[str, nn.Module, tuple[tuple[str, nn.Module], ...]]]:
    """All modules under all of their names, with what is above them (``named_modules`` does not end on a cycle)."""
    yield name, module, above
    above = (*above, (name, module))
    for key, child in module._modules.items():
        if child is not None and all(child is not m for _, m in above):
            yield from _walk(child, f"{name}.{key}" if name else key, above)


def _matcher(keyword: str, selector: Selector) -> Callable[[_Place], bool]:
    if isinstance(selector, str | re.Pattern):
        try:
            pattern = re.compile(selector)
        except re.error as error:
            raise ValueError(f"convert: {keyword}: {selector!r} is no regular expression: {error}") from None
        return lambda place: any(pattern.search(name) for name in place.names)
    if callable(selector) and not isinstance(selector, type | nn.Module):
        return lambda place: any(selector(name, place.module) for name in place.names)
    raise TypeError(
        f"convert: {keyword} must be a regular expression or a function of name and module, got {selector!r}"
    )


def _overrides(
    overrides: Overrides | None,
) -> tuple[Callable[[_Place], dict[str, Any]], list[tuple[str, Callable[[_Place], bool]]]]:
    """A layer's own settings as a function, and the regular expressions that must be found somewhere."""
    if overrides is None:
        return lambda place: {}, []
    if isinstance(overrides, Mapping):
        rules = [
            (pattern, _matcher("overrides", pattern), _checked(settings, f"convert: overrides[{pattern!r}]"))
            for pattern, settings in overrides.items()
        ]
        return (
            lambda place: next((settings for _, found, settings in rules if found(place)), {}),
            [(pattern, found) for pattern, found, _ in rules],
        )
    if not callable(overrides):
        raise TypeError(f"convert: overrides must be a mapping or a function of name and module, got {overrides!r}")

    def asked(place: _Place) -> dict[str, Any]:
        given = ((name, overrides(name, place.module)) for name in place.names)
        name, settings = next(((n, s) for n, s in given if s is not None), ("", {}))
        return _checked(settings, f"convert: overrides({name!r})")

    return asked, []


def _checked(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``settings`` as they are in a report."""
    if not isinstance(settings, Mapping):
        raise TypeError(f"{where}: settings must be a mapping, got {settings!r}")
    parsers: dict[str, Callable[[Any], object]] = {
        "tau_prox": parse_tau,
        "optimization_mode": lambda value: value if value == _AUTO else str(parse_mode(value)),
        "gram_reduction": parse_reduction,
    }
    if unknown := [key for key in settings if key not in parsers]:
        raise ValueError(f"{where}: unknown setting {unknown[0]!r}; there are {', '.join(parsers)}")
    try:
        return {key: parsers[key](value) for key, value in settings.items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_together(settings: Mapping[str, Any], place: _Place) -> None:
    """Refuse settings that are allowed one by one, and not together or not for this layer."""
    deferred = isinstance(place.module, ProxPropLayer) and place.module._proximal.collector is not None
    try:
        check_together(parse_mode(settings["optimization_mode"]), settings["gram_reduction"], deferred)
    except ValueError as error:
        raise ValueError(f"convert: {place.names[0] or 'the model itself'}: {error}") from None


def _first_names(layers: Sequence[LayerReport]) -> str:
    """Some names, for an error message of one line."""
    names = [layer.name or "(the model itself)" for layer in layers if layer.reason != _NO_CLASS]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"


def _why_nothing(report: ConversionReport) -> str:
    """What there was, by reason."""
    by_reason: dict[str, list[LayerReport]] = collections.defaultdict(list)
    for layer in report.layers:
        if layer.reason and layer.reason != _NO_CLASS:
            by_reason[layer.reason].append(layer)
    reasons = "; ".join(f"{reason}: {_first_names(layers)}" for reason, layers in list(by_reason.items())[:3])
    return (f"; {reasons}" if reasons else f" (no {KNOWN})") + _without_class(report.layers)
