"""Steps of a whole model that are right across micro-batches, processes, repeated calls and tied weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from proxprop.collector import Collector, is_zero
from proxprop.design import CollectedDesign, accumulation_dtype
from proxprop.function import no_autocast
from proxprop.layers import ProxPropLayer
from proxprop.modes import ConjugateGradient, Solve, check_together
from proxprop.systems import deferred_system

_NOT_CALLED, _NO_PASS = -1, -2  # in place of a number of rows


def defer(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
    curvature_decay: float = 0.0,
    refresh_every: int = 1,
) -> DeferredStep:
    """Let all ProxProp layers of a model take one step of everything that was accumulated, before the optimizer's.

    During backward passes ``.grad`` holds the ordinary gradient AᵀG, so that accumulation, ``DistributedDataParallel``,
    ``fully_shard``, clipping, loss scaling and tied weights mean what they mean for plain layers. Each layer collects
    AᵀA beside it (or the rows of A, where those are fewer than its columns). Before the optimizer's step AᵀA is summed
    over the processes, each system is solved once, and ``.grad`` becomes D.

    So D is that of the whole batch: of all micro-batches, of all processes, of all calls of a layer. Losses and ranks
    must be weighted so that the gradients sum to that of the whole batch, as with plain layers.

    Args:
        model: A model with ProxProp layers; wrap or shard it first.
        optimizer: Its ``step`` then does it by itself, also ``step(closure)``. Without one, call ``solve()`` of what
            is returned, after the backward passes and before the optimizer's step.
        process_group: Whose gradients are summed or averaged; the default group where there is one. In a process that
            trains a model of its own, a group of that process alone.
        curvature_decay: With c > 0, AᵀA is a running average over steps, S = c·S + (1 - c)·AᵀA (of means over rows
            where ``gram_reduction`` is ``'mean'``), corrected for its start: the curvature of FOOF (Benzing 2022).
        refresh_every: With K > 1, AᵀA is collected in every K-th step alone, and used as it is in those between,
            which then cost little more than plain ones.

    Returns:
        The deferred step: with ``solve()``, ``discard()`` and ``remove()``.

    Example:
        >>> proxprop.defer(model, optimizer)
        >>> for part in batch.split(32):
        ...     (loss_fn(model, part) * len(part) / len(batch)).backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()

    Raises:
        ValueError: if the model has no ProxProp layer; for layers whose step cannot be deferred (of
            ``proxprop_module_generator``, with a weight that is computed, in mode ``'published_cgN'``), are deferred
            already, or share some of their parameters and not all, or share them and multiply with them in different
            ways (an embedding and a linear layer); if the optimizer lacks some of their parameters.
        TypeError: for arguments of other types.

    A forward pass raises a ``TypeError`` where weights have become something else than parameters. The optimizer's step
    raises a ``RuntimeError``, and leaves all gradients as they are, if a layer's gradient came without its forward
    pass (``nn.MultiheadAttention`` does so with ``out_proj``).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"defer takes a torch.nn.Module, got {type(model).__name__}")
    if not (optimizer is None or isinstance(optimizer, Optimizer)):
        raise TypeError(f"defer takes a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not 0 <= curvature_decay < 1:
        raise ValueError(f"defer: curvature_decay must be at least 0 and less than 1, got {curvature_decay!r}")
    if not isinstance(refresh_every, int) or isinstance(refresh_every, bool) or refresh_every < 1:
        raise ValueError(f"defer: refresh_every must be an integer of at least 1, got {refresh_every!r}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ProxPropLayer)}
    if not layers:
        raise ValueError("defer: the model has no ProxProp layer; convert it first")
    for name, layer in layers.items():
        _check_deferrable(name, layer)
    _check_shared(layers)
    if optimizer is not None:
        _check_known(layers, optimizer)
    return DeferredStep(layers, optimizer, process_group, curvature_decay, refresh_every)


def _check_deferrable(name: str, layer: ProxPropLayer) -> None:
    where = f"defer: {name or 'the model itself'}"
    if layer._proximal.collector is not None:
        raise ValueError(f"{where} is deferred already; remove() that first")
    if not layer.matrix_known:
        raise ValueError(f"{where} is a {type(layer).__name__}, of unknown structure; such a step cannot be deferred")
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        raise ValueError(f"{where}: its weight is no parameter (computed, or sharded); such a step cannot be deferred")
    try:
        check_together(layer._proximal.mode, layer.gram_reduction, deferred=True)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_shared(layers: dict[str, ProxPropLayer]) -> None:
    names: dict[int, str] = {}
    for name, layer in layers.items():
        for parameter in layer._parameters.values():
            if parameter is not None:
                other = names.setdefault(id(parameter), name)
                if _key(layers[other]) != _key(layer):
                    raise ValueError(
                        f"defer: {other} and {name} share some of their parameters and not all, or multiply with them "
                        "in different ways; such a step cannot be deferred"
                    )


def _check_known(layers: dict[str, ProxPropLayer], optimizer: Optimizer) -> None:
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, layer in layers.items():
        if any(p.requires_grad and id(p) not in known for p in layer._parameters.values() if p is not None):
            raise ValueError(
                f"defer: the optimizer has not all parameters of {name or 'the model itself'}; defer the part of the "
                "model that it trains"
            )


def _key(layer: ProxPropLayer) -> tuple[int, ...]:
    """Equal for layers that have the same parameters and multiply with them in the same way."""
    parameters = (layer._parameters.get(name) for name in ("weight", "bias"))
    return id(type(layer)._linearised), *map(id, parameters)


@dataclasses.dataclass
class _Solve:
    """One system of a step: layers with the same parameters, and what they have collected."""

    layers: list[ProxPropLayer]
    collector: Collector
    kept: CollectedDesign | None = None
    """What the last step was taken on, where others are to be taken on it, too."""
    steps: int = 0
    """With what is kept."""
    average: Tensor | None = None
    """The running average of AᵀA."""
    weight: float = 0.0
    """What the weights of its steps sum to: to 1, but for the first ones."""

    def state(self) -> int:
        """How many rows there were, or why none."""
        if self.collector.rows is not None:
            return self.collector.rows
        settings = self.layers[0]._proximal
        gradients = [p.grad for p in self.collector.parameters if p is not None and p.grad is not None]
        without = settings.mode.implicit and bool(gradients) and not self.collector.holds_direction((True, True))
        return _NOT_CALLED if not without or all(map(is_zero, gradients)) else _NO_PASS


class DeferredStep:
    """What ``defer`` returns."""

    def __init__(
        self,
        layers: dict[str, ProxPropLayer],
        optimizer: Optimizer | None,
        process_group: dist.ProcessGroup | None,
        curvature_decay: float,
        refresh_every: int,
    ) -> None:
        solves: dict[tuple[int, ...], _Solve] = {}
        for name, layer in layers.items():
            if _key(layer) not in solves:
                parameters = [layer._parameters.get(name) for name in ("weight", "bias")]
                solves[_key(layer)] = _Solve([], Collector(name or "the model itself", parameters))
            solves[_key(layer)].layers.append(layer)
            layer._proximal.collector = solves[_key(layer)].collector
        self._solves = list(solves.values())
        self._group, self._decay, self._every = process_group, curvature_decay, refresh_every
        self._hook = None if optimizer is None else optimizer.register_step_pre_hook(self._before_step)

    def solve(self) -> None:
        """Make directions of the gradients: once, after the backward passes and before the optimizer's step.

        Every process of the group has to call it, as it does with the gradients' own communication.

        Raises:
            RuntimeError: if a layer has a gradient and its forward pass was not seen, if it was on some processes
                only, or if layers with the same parameters have other settings. All gradients are as before then.
        """
        solves = [solve for solve in self._solves if self._is_deferred(solve)]
        with torch.no_grad():
            rows = self._all_rows(solves)
            for solve, counts in zip(solves, rows, strict=True):
                _check_solvable(solve, counts)
            found = [self._direction(solve, counts) for solve, counts in zip(solves, rows, strict=True)]
            for solve, directions in zip(solves, found, strict=True):
                if directions is not None:
                    solve.collector.write(directions)

    def discard(self) -> None:
        """Forget what was collected, where its gradients will not be used."""
        for solve in self._solves:
            solve.collector.clear()

    def remove(self) -> None:
        """Let the layers take their steps at once again."""
        if self._hook is not None:
            self._hook.remove()
        for solve in self._solves:
            solve.collector.close()
            for layer in solve.layers:
                if self._is_deferred(solve):
                    layer._proximal.collector = None

    @staticmethod
    def _is_deferred(solve: _Solve) -> bool:
        """Whether the layers are still ProxProp layers: they may have been reverted."""
        return all(isinstance(layer, ProxPropLayer) for layer in solve.layers)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # The first of the arguments is the optimizer.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self.solve()
            return None
        closed = functools.partial(self._closed, closure)
        return ((args[0], closed, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": closed})

    def _closed(self, closure: Callable[[], Any]) -> Any:
        result = closure()
        self.solve()
        return result

    @property
    def _processes(self) -> int:
        return dist.get_world_size(self._group) if dist.is_available() and dist.is_initialized() else 1

    def _all_rows(self, solves: Sequence[_Solve]) -> list[list[int]]:
        """The states of each system on all processes."""
        states = [solve.state() for solve in solves]
        if self._processes == 1 or not states:
            return [[state] for state in states]
        device = next(p.device for p in solves[0].collector.parameters if p is not None)
        mine = torch.tensor(states, device=device)
        everyones = [torch.empty_like(mine) for _ in range(self._processes)]
        dist.all_gather(everyones, mine, group=self._group)
        rows: list[list[int]] = torch.stack(everyones, dim=1).tolist()
        return rows

    def _direction(self, solve: _Solve, counts: Sequence[int]) -> Sequence[Tensor | None] | None:
        """D, shaped and sharded like the layer's parameters; None where there is nothing to solve."""
        settings = solve.layers[0]._proximal
        if max(counts) < 0 or not isinstance(settings.mode, Solve):
            return None
        design = self._design(solve, counts)
        gradients = [None if p is None else p.grad for p in solve.collector.parameters]
        right = _stacked(design, gradients)
        if right is None:
            return None
        iterated = design.holds_rows and isinstance(settings.mode, ConjugateGradient)
        if not (iterated or design.diagonal):
            right = right.to(accumulation_dtype(right))
        with no_autocast(right.device.type):
            before, after = settings.scales(design.rows, design.dtype)
            system = deferred_system(design, right * before, 1 / settings.step_size(design.rows))
            directions = [d if d is None or after == 1 else d * after for d in settings.mode.solve(system)]
        return [None if g is None or d is None else _like(g, d) for g, d in zip(gradients, directions, strict=True)]

    def _design(self, solve: _Solve, counts: Sequence[int]) -> CollectedDesign:
        """What the step is taken on: of this step, of some steps, or of one before."""
        design, kept = solve.collector.design, solve.kept
        if design is None:
            assert kept is not None
        else:
            if self._processes > 1:
                self._sum(design, counts)
            if self._decay or self._every > 1:
                self._keep(solve, design)
            kept, solve.steps = design, 0
        solve.steps += 1
        solve.collector.known = None if solve.steps % self._every == 0 else kept.trained
        return kept

    def _keep(self, solve: _Solve, design: CollectedDesign) -> None:
        """Have ``design`` hold AᵀA, as a running average, also for steps to come."""
        rows = max(design.rows, 1) if solve.layers[0].gram_reduction == "mean" else 1
        gram, kept = design.gram() / rows, solve.kept
        if kept is None or solve.average is None or kept.trained != design.trained:
            solve.average, solve.weight = torch.zeros_like(gram), 0.0
        solve.average = torch.lerp(gram, solve.average, self._decay)
        solve.weight = self._decay * solve.weight + 1 - self._decay
        design.set_gram(solve.average * (rows / solve.weight), design.rows)
        solve.kept = design

    def _sum(self, design: CollectedDesign, counts: Sequence[int]) -> None:
        """Make ``design`` that of all processes, which have collected so many rows each."""
        if design.diagonal or sum(counts) > design.columns:
            gram = design.gram().contiguous()
            dist.all_reduce(gram, group=self._group)
            design.set_gram(gram, sum(counts))
            return
        matrix = design.matrix(design.dtype)
        mine = torch.nn.functional.pad(matrix, (0, 0, 0, max(counts) - design.rows)).contiguous()
        everyones = [torch.empty_like(mine) for _ in counts]
        dist.all_gather(everyones, mine, group=self._group)
        design.set_rows(torch.cat([rows[:, :count] for rows, count in zip(everyones, counts, strict=True)], dim=1))


def _check_solvable(solve: _Solve, counts: Sequence[int]) -> None:
    name = solve.collector.name
    if _NO_PASS in counts:
        raise RuntimeError(
            f"{name}: it has a gradient, and no backward pass of its own since the last step (is its weight used "
            "without calling it?); its step cannot be taken"
        )
    if _NOT_CALLED in counts and max(counts) > _NOT_CALLED:
        raise RuntimeError(f"{name}: backward passes came to it on some processes and not on others")
    settings = [layer._proximal for layer in solve.layers]
    if any(
        (s.tau, s.mode, s.reduction) != (settings[0].tau, settings[0].mode, settings[0].reduction) for s in settings
    ):
        raise RuntimeError(f"{name}: layers with the same parameters need the same settings to take one step")


def _stacked(design: CollectedDesign, gradients: Sequence[Tensor | None]) -> Tensor | None:
    """AᵀG, ``[g, o, d]``, from the gradients of weight and bias; None where there is none."""
    if not any(g is not None and train for g, train in zip(gradients, design.trained, strict=True)):
        return None
    weight_shape = design.layout(torch.empty(design.weight_shape, device="meta")).shape
    shapes = (weight_shape, design.weight_shape[:1])
    parts: list[Tensor | None] = []
    for gradient, train, shape in zip(gradients, design.trained, shapes, strict=True):
        if gradient is None:  # frozen meanwhile
            gradient = torch.zeros(shape, dtype=design.dtype, device=design.device)
        whole: Tensor = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient  # of a DTensor
        parts.append(whole.to(design.dtype) if train else None)
    return design.stack(tuple(parts))


def _like(gradient: Any, direction: Tensor) -> Tensor:
    """``direction``, which every process has, in the precision of ``gradient`` and sharded as that is."""
    direction = direction.to(gradient.dtype)
    if not hasattr(gradient, "full_tensor"):
        return direction
    from torch.distributed.tensor import DTensor, Replicate  # which takes its time

    mesh = gradient.device_mesh
    replicated = DTensor.from_local(direction, mesh, [Replicate()] * mesh.ndim, run_check=False)
    sharded: Tensor = replicated.redistribute(placements=gradient.placements)
    return sharded
