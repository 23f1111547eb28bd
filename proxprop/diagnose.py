"""What a model's ProxProp layers do with a batch, in numbers and in words, and a step size to start from."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from proxprop.design import Design, MatrixDesign, Parameters, accumulation_dtype
from proxprop.layers import ProxPropLayer
from proxprop.modes import Gradient, Mode
from proxprop.observe import Direction, observing
from proxprop.systems import System

SAMPLED_OUTPUTS = 8
"""How many outputs of a layer are solved for a second time, in float64."""
ADAM_EPS = 1e-8
"""What Adam adds to its denominator: it takes much shorter steps on entries below."""
_PROBES = 16


@dataclasses.dataclass(frozen=True)
class LayerDiagnosis:
    """One call of one ProxProp layer. Numbers that do not exist there are None.

    Attributes:
        name: The layer's dotted name; empty for the model itself.
        call: Which of its calls in the forward pass, from 1; 0 for a layer whose backward pass did not run.
        tau_prox: Its setting.
        optimization_mode: The same.
        rows: Rows m of the design matrix A: batch elements, times positions. For layers of unknown structure, entries
            of the output.
        columns: Columns d of A: the trained parameters of one output; of unknown structure, all of them.
        outputs: Output units or channels, each a column of the system; 1 of unknown structure.
        form: In which form the system was solved: a class of ``proxprop.systems``.
        seconds: How long the direction took, once (a first time may be slower).
        matrix_bytes: Size of the Gram or kernel matrix.
        step_ratio: ‖D‖ / (τ‖AᵀG‖): 1 for an explicit step, small where τ is large beside AᵀA.
        weight_ratio: ‖D‖ over the norm of the trained parameters.
        cosine: Of D to the gradient AᵀG: D is a descent direction where it is positive.
        residual: ‖(AᵀA + I/τ)D − AᵀG‖ / ‖AᵀG‖: rounding for ``'prox_exact'``, what is left to do for ``'prox_cgN'``.
        digits: How many digits of D are those of the same mode in float64, on a few outputs (for ``'published_cgN'``,
            whose outputs depend on each other, on all). Not known of layers of unknown structure, where float64 has no
            digits left either, and on devices without float64.
        below_adam_eps: Share of D's entries that are not zero but smaller than 1e-8.
        factorisation_failed: Whether the layer fell back to a short explicit step; None where nothing is factorised.
        verdict: All of that in words.
    """

    name: str
    call: int
    tau_prox: float
    optimization_mode: str
    verdict: str
    rows: int | None = None
    columns: int | None = None
    outputs: int | None = None
    form: str | None = None
    seconds: float | None = None
    matrix_bytes: int | None = None
    step_ratio: float | None = None
    weight_ratio: float | None = None
    cosine: float | None = None
    residual: float | None = None
    digits: float | None = None
    below_adam_eps: float | None = None
    factorisation_failed: bool | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Diagnosis:
    """What ``diagnose`` found: a row for each call of a ProxProp layer, in the model's order. Prints as a table."""

    layers: tuple[LayerDiagnosis, ...]

    def __repr__(self) -> str:
        heading = (
            *("layer", "mode", "tau", "rows", "columns", "outputs", "form", "seconds", "MB"),
            *("D/τAᵀG", "D/θ", "cosine", "residual", "digits", "< eps", "verdict"),
        )
        rows = [heading, *map(_cells, self.layers)]
        width = [max(len(row[column]) for row in rows) for column in range(len(heading))]
        return "\n".join(
            "  ".join(
                cell.ljust(size) if heading[i] in ("layer", "mode", "form", "verdict") else cell.rjust(size)
                for i, (cell, size) in enumerate(zip(row, width, strict=True))
            ).rstrip()
            for row in rows
        )


def _cells(row: LayerDiagnosis) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    name = row.name or "(the model itself)"
    return (
        name if row.call <= 1 else f"{name} (call {row.call})",
        row.optimization_mode,
        f"{row.tau_prox:g}",
        *(number(value, "d") for value in (row.rows, row.columns, row.outputs)),
        row.form or "–",
        number(row.seconds, ".2g"),
        number(None if row.matrix_bytes is None else row.matrix_bytes / 1e6, ".3g"),
        number(row.step_ratio, ".2g"),
        number(row.weight_ratio, ".2g"),
        number(row.cosine, ".3f"),
        number(row.residual, ".1e"),
        number(row.digits, ".1f"),
        number(row.below_adam_eps, ".0%"),
        row.verdict,
    )


def diagnose(model: nn.Module, batch: Any, loss_fn: Callable[[Any, Any], Tensor]) -> Diagnosis:
    """What each ProxProp layer does with a batch: sizes, cost, direction and accuracy, with a verdict in words.

    Runs one forward and one backward pass, in the mode (training or evaluation) and under the autocast that are set,
    and solves a part of each system again in float64: some times the cost and memory of a step. Code that is compiled
    runs uncompiled for that. Afterwards the model is as before: parameters, buffers, ``.grad``, training flags; and so
    are PyTorch's random states. What ``loss_fn`` does beside is its own affair; it should not call ``backward``. Of a
    model in a wrapper (``DistributedDataParallel``), hand in the model itself.

    Args:
        model: A model with ProxProp layers.
        batch: What ``loss_fn`` takes; of the size that is trained with, as D depends on it.
        loss_fn: Called once as ``loss_fn(model, batch)``; returns the loss, a tensor of one element, as in training.

    Example:
        >>> print(diagnose(model, (x, y), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])))

    Raises:
        ValueError: for a model without ProxProp layers; for a loss that is no tensor of one element, or that does not
            depend on a parameter.
        TypeError: if ``model`` is no module or ``loss_fn`` no function.
    """
    found: list[LayerDiagnosis] = []
    _run("diagnose", model, batch, loss_fn, lambda direction: found.append(_measured(direction)))
    rows = []
    for name, layer in model.named_modules():
        if isinstance(layer, ProxPropLayer):
            calls = [row for row in reversed(found) if row.name == name]  # backward passes run the other way
            rows += [dataclasses.replace(row, call=call) for call, row in enumerate(calls, start=1)]
            if not calls:
                trained = any(parameter.requires_grad for parameter in layer.parameters())
                verdict = "not reached: no gradient came to it" if trained else "frozen: nothing to train"
                rows.append(LayerDiagnosis(name, 0, layer.tau_prox, layer.optimization_mode, verdict))
    return Diagnosis(tuple(rows))


def suggest_tau(
    model: nn.Module, batch: Any, loss_fn: Callable[[Any, Any], Tensor], *, scale: float = 1.0
) -> dict[str, float]:
    """A step size τ for each ProxProp layer, from the size of its inputs: ``scale · r / trace(AᵀA)``.

    r = min(rows, columns), over all groups, is the most eigenvalues of AᵀA that are not zero, so ``trace(AᵀA) / r`` is
    their mean, and at ``scale=1`` 1/τ is that mean. Along eigenvectors with larger eigenvalues D is then a Newton step
    on the layer's own problem, along the others it is about τ times the gradient. With ``gram_reduction='mean'``, where
    AᵀA is divided by the rows, τ is as many times as large. A τ much smaller makes all of the step explicit, a much
    larger one changes less and less (``diagnose`` says so of both). It takes the batch's size, the inputs' scale and
    the layer's width out of the question, not the question itself: the mean says nothing of how the eigenvalues spread
    (those of images spread over many decades), and nothing of the loss. Try scales a factor of ten apart, at the batch
    size and with the inputs of training.

    Runs one forward and one backward pass; arguments, effects on the model and errors are those of ``diagnose``.

    Args:
        model: A model with ProxProp layers; what their settings are does not matter.
        batch: What ``loss_fn`` takes.
        loss_fn: Called once as ``loss_fn(model, batch)``.
        scale: Multiplies all of them.

    Returns:
        τ by the layer's dotted name. The smallest, for a layer called several times. Layers that no gradient comes to
        are left out, and those whose inputs are all zero or not finite.

    Example:
        >>> for name, tau in suggest_tau(model, batch, loss_fn).items():
        ...     model.get_submodule(name).tau_prox = tau

    Raises:
        ValueError: as ``diagnose``, and for a ``scale`` that is not positive and finite.
        TypeError: as ``diagnose``.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"suggest_tau: scale must be a positive finite number, got {scale!r}")
    taus: dict[str, float] = {}

    def see(direction: Direction) -> None:
        mean = _mean_eigenvalue(direction.design, direction.gradient)
        rows = direction.design.rows if direction.layer.gram_reduction == "mean" else 1
        if 0 < mean < math.inf:
            taus[direction.name] = min(taus.get(direction.name, math.inf), rows * scale / mean)

    _run("suggest_tau", model, batch, loss_fn, see)
    return {name: taus[name] for name, _ in model.named_modules() if name in taus}


def _run(
    caller: str,
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    see: Callable[[Direction], object],
) -> None:
    """One forward and backward pass whose directions are seen; the model is left as it is."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller} takes a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss_fn):
        raise TypeError(f"{caller}: loss_fn must be a function of model and batch, got {loss_fn!r}")
    if not any(isinstance(module, ProxPropLayer) for module in model.modules()):
        raise ValueError(f"{caller}: the model has no ProxProp layer; convert it first")
    with _as_before(model), _uncompiled(), observing(model, see, timed=True), torch.enable_grad():
        loss = loss_fn(model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(type(loss).__name__)
            raise ValueError(f"{caller}: loss_fn must return a tensor of one element, got {got}")
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained or not loss.requires_grad:
            raise ValueError(f"{caller}: the loss depends on no parameter of the model that is trained")
        # Not `backward`, which would fill .grad and run what hangs on that (DDP's reducer, optimizers in hooks).
        torch.autograd.grad(loss.sum(), trained, allow_unused=True)


@contextlib.contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Undo what happens within to parameters, buffers, training flags and random states."""
    training = [(module, module.training) for module in model.modules()]
    tensors = [
        (store, name, tensor, tensor.detach().clone(), tensor._version)
        for module in model.modules()
        for store in (module._parameters, module._buffers)
        for name, tensor in store.items()
        if tensor is not None
    ]
    devices = {tensor.device for _, _, tensor, _, _ in tensors if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, flag in training:
                module.training = flag
            for store, name, tensor, value, version in tensors:
                store[name] = tensor  # type: ignore[assignment]  # each in the store that it comes from
                if tensor._version != version or _changed_unseen(tensor, value):
                    with torch.no_grad():
                        tensor.copy_(value)


def _changed_unseen(tensor: Tensor, before: Tensor) -> bool:
    """Kernels may write into a buffer and not say so, as that of batch norm does."""
    is_dense = tensor.layout is torch.strided and tensor.device.type != "meta" and tensor.is_contiguous()
    return is_dense and not tensor.requires_grad and not torch.equal(tensor, before)


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Within, compiled code runs as it is written; nothing is imported where nothing is compiled."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _measured(direction: Direction) -> LayerDiagnosis:
    design, tau, system = direction.design, direction.tau, direction.system
    matrix = None if system is None else system.matrix
    failed = None if system is None or system.failed is None else bool(system.failed.any())
    known = LayerDiagnosis(
        name=direction.name,
        call=0,
        tau_prox=direction.layer.tau_prox,
        optimization_mode=str(direction.mode),
        verdict="",
        rows=_rows(design, direction.gradient),
        columns=design.columns,
        outputs=design.groups * design.outputs,
        form=None if system is None else type(system).__name__,
        seconds=direction.seconds,
        matrix_bytes=0 if matrix is None else matrix.numel() * matrix.element_size(),
        factorisation_failed=failed,
    )
    precise, gradient = _precise(design, range(design.outputs), direction.gradient)
    d = design.stack(_as_stored(direction)).to(precise.dtype)
    right = precise.right_hand_side(gradient).to(precise.dtype)
    norm, right_norm = float(_norm(d)), float(_norm(right))
    if not (math.isfinite(norm) and math.isfinite(right_norm)):
        return dataclasses.replace(known, verdict="not finite: NaN or infinity in the input or in the gradient")
    if right_norm == 0:
        return dataclasses.replace(known, verdict="no gradient: it is zero")
    weight_norm = math.hypot(*(float(_norm(p.detach())) for p in direction.layer.parameters() if p.requires_grad))
    nonzero = d[d != 0].abs()
    known = dataclasses.replace(
        known,
        weight_ratio=norm / weight_norm if weight_norm else None,
        cosine=float((d * right).sum()) / (norm * right_norm) if norm else 0.0,
        below_adam_eps=float((nonzero < ADAM_EPS).float().mean()) if nonzero.numel() else 0.0,
    )
    if isinstance(direction.mode, Gradient):
        return dataclasses.replace(known, verdict=_verdict(known, None))
    product = precise.right_hand_side(precise.apply(precise.unstack(d))).to(d.dtype)
    known = dataclasses.replace(
        known,
        step_ratio=norm / right_norm / tau,
        residual=float(_norm(torch.add(product, d, alpha=1 / tau) - right)) / right_norm,
    )
    if failed is False and _is_lost(system, tau):
        return dataclasses.replace(known, verdict="ill-conditioned: 1/τ is lost in the rounding of AᵀA; τ is too large")
    slack = None
    if not failed:
        sample = _Sample.of(direction)
        known = dataclasses.replace(known, digits=sample.digits())
        slack = sample.slack(known.step_ratio or 0.0)
    return dataclasses.replace(known, verdict=_verdict(known, slack))


def _is_lost(system: System | None, tau: float) -> bool:
    """Whether 1/τ is below the rounding of the matrix that it is added to: without it, D may be anything."""
    assert system is not None
    assert system.matrix is not None
    largest = system.matrix.diagonal(dim1=-2, dim2=-1).sum(-1).max()
    return float(largest) * tau * torch.finfo(system.matrix.dtype).eps > 1


def _verdict(row: LayerDiagnosis, slack: int | None) -> str:
    assert row.cosine is not None
    assert row.below_adam_eps is not None
    if row.factorisation_failed:
        words = "factorisation failed: the short explicit step AᵀG/(trace(AᵀA) + 1/τ) was taken; τ is too large"
    elif row.cosine <= 0:
        words = "no descent direction: its cosine to the gradient is not positive"
    elif row.digits is not None and row.digits < 2:
        words = f"inaccurate: rounding leaves {row.digits:.1f} digits"
    elif row.step_ratio is None or row.residual is None:
        words = "plain gradient"
    elif row.factorisation_failed is False and row.residual > 0.1:
        words = f"ill-conditioned: rounding leaves a residual of {row.residual:.1g}; τ is too large"
    elif slack is not None:
        words = f"saturated: τ could be {slack} times smaller without a change"
    elif row.step_ratio > 0.95:
        words = "explicit: D is τ times the gradient"
    else:
        words = "ok"
    if row.below_adam_eps > 0.1:
        words += f"; {row.below_adam_eps:.0%} of D's entries are below Adam's eps"
    return words


@dataclasses.dataclass(frozen=True)
class _Sample:
    """Some outputs of a layer, to solve for once more: in float64 where the structure of A is known."""

    mode: Mode
    design: Design
    gradient: Tensor
    tau: float
    start: Parameters
    actual: Tensor  # D as the layer has it, [g, o, d]
    precise: bool

    @classmethod
    def of(cls, direction: Direction) -> _Sample:
        design = direction.design
        outputs: Sequence[int] = range(design.outputs)
        if isinstance(design, MatrixDesign) and not direction.mode.needs_parameters:
            norms = design.to_rows(direction.gradient).norm(dim=-1).sum(0)  # of each output, over groups
            order = norms.argsort(descending=True)[: max(1, int((norms > 0).sum()))]
            places = torch.linspace(0, len(order) - 1, min(SAMPLED_OUTPUTS, len(order))).long()
            outputs = order[places.to(order.device)].tolist()
        part, gradient = _precise(design, outputs, direction.gradient)
        start = tuple(None if p is None else p.to(part.dtype) for p in direction.start)
        actual = design.stack(_as_stored(direction))[:, list(outputs)].to(part.dtype)
        return cls(direction.mode, part, gradient, direction.tau, start, actual, part is not design)

    def digits(self) -> float | None:
        """Of D, against the same mode in float64."""
        if not self.precise:
            return None
        error = self._difference(self.actual, self._solved(self.tau))
        return None if math.isnan(error) else min(max(-math.log10(error), 0.0), 16.0) if error else 16.0

    def slack(self, step_ratio: float) -> int | None:
        """By what factor τ could be smaller while D stays the same to 1 %: 10, 100 or 1000, None for less."""
        factors = [factor for factor in (1000, 100, 10) if step_ratio <= 1.02 / factor]  # others cannot be
        if not factors:
            return None
        now = self._solved(self.tau)
        return next((f for f in factors if self._difference(self._solved(self.tau / f), now) < 0.01), None)

    def _solved(self, tau: float) -> Tensor:
        return self.design.stack(self.mode.direction(self.design, self.gradient, tau, self.start))

    @staticmethod
    def _difference(one: Tensor, other: Tensor) -> float:
        return float(_norm(one - other) / _norm(other))


def _precise(design: Design, outputs: Sequence[int], gradient: Tensor) -> tuple[Design, Tensor]:
    """``design`` with these of its outputs in float64, and their part of ``gradient``.

    Both as they are where A has no known structure or the device has no float64.
    """
    if not isinstance(design, MatrixDesign) or accumulation_dtype(gradient) != torch.float64:
        return design, gradient
    part = design.of_outputs(outputs, torch.float64)
    return part, part.from_rows(design.to_rows(gradient)[:, list(outputs)].double())


def _as_stored(direction: Direction) -> Parameters:
    """D, rounded to the precision of the layer's parameters."""
    dtype = next((p.dtype for p in direction.layer.parameters() if p.requires_grad), direction.design.dtype)
    return tuple(None if p is None else p.to(dtype) for p in direction.parameters)


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=accumulation_dtype(tensor))
    return norm


def _rows(design: Design, gradient: Tensor) -> int:
    return design.rows if isinstance(design, MatrixDesign) else gradient.numel()


def _mean_eigenvalue(design: Design, gradient: Tensor) -> float:
    """trace(AᵀA) over the most eigenvalues that are not zero; where A has no known structure, a random estimate."""
    rank = design.groups * min(_rows(design, gradient), design.columns)
    if isinstance(design, MatrixDesign):
        return float(design.trace()) / rank
    generator = torch.Generator("cpu").manual_seed(0)
    total = 0.0
    for _ in range(_PROBES):  # E‖Av‖² = trace(AᵀA) for entries ±1
        signs = 2 * torch.randint(2, (1, 1, design.columns), generator=generator, device="cpu") - 1
        total += float(_norm(design.apply(design.unstack(signs.to(design.device, design.dtype)))) ** 2)
    return total / _PROBES / rank
