"""A layer's settings, parsed once; ``optimization_mode`` becomes an object that computes the direction."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import math
import numbers
import re
import sys
from typing import Protocol

import torch
from torch import Tensor

from proxprop.choice import direct_system, iterative_system
from proxprop.design import ConvDesign, Design, MatrixDesign, Parameters
from proxprop.solvers import CGRules, Rounding, conjugate_gradients
from proxprop.systems import DirectSystem, System, numbers_at_hand

ALLOWED = "'prox_exact', 'prox_cgN' with N >= 1, 'gradient' or 'published_cgN' with N >= 1"


MIN_TAU, MAX_TAU = 1 / sys.float_info.max, sys.float_info.max  # so that 1/τ is finite, too


class Mode(Protocol):
    """How a layer's direction D follows from its design matrix A and the gradient G of its output.

    ``str(mode)`` is the value of ``optimization_mode`` that names it.
    """

    @property
    def needs_matrix(self) -> bool:
        """Whether the structure of A must be known."""

    @property
    def needs_parameters(self) -> bool:
        """Whether D is computed from the layer's parameters, too."""

    @property
    def implicit(self) -> bool:
        """Whether D depends on τ, and is more than AᵀG."""

    def direction(self, design: Design, gradient: Tensor, tau: float, parameters: Parameters) -> Parameters:
        """D, shaped like the layer's parameters; ``parameters`` are those, where the mode needs them."""


@dataclasses.dataclass(frozen=True)
class Gradient:
    """D = AᵀG: back-propagation."""

    needs_matrix = False
    needs_parameters = False
    implicit = False

    def __str__(self) -> str:
        return "gradient"

    def direction(self, design: Design, gradient: Tensor, tau: float, parameters: Parameters) -> Parameters:
        return design.adjoint(gradient)


class Solve(abc.ABC):
    """A mode that makes the layer's linear system in its cheapest form, and then solves it."""

    implicit = True

    @abc.abstractmethod
    def system(self, design: Design, gradient: Tensor, tau: float, parameters: Parameters) -> System:
        """The system; arguments are those of ``direction``."""

    @abc.abstractmethod
    def solve(self, system: System) -> Parameters:
        """D, shaped like the layer's parameters."""

    def direction(self, design: Design, gradient: Tensor, tau: float, parameters: Parameters) -> Parameters:
        return self.solve(self.system(design, gradient, tau, parameters))


@dataclasses.dataclass(frozen=True)
class Exact(Solve):
    """D = (AᵀA + I/τ)⁻¹ AᵀG (paper, equation 12)."""

    needs_matrix = True
    needs_parameters = False

    def __str__(self) -> str:
        return "prox_exact"

    def system(self, design: Design, gradient: Tensor, tau: float, parameters: Parameters) -> DirectSystem:
        assert isinstance(design, MatrixDesign)
        return direct_system(design, gradient, 1 / tau)

    def solve(self, system: System) -> Parameters:
        assert isinstance(system, DirectSystem)
        return system.solve()


@dataclasses.dataclass(frozen=True)
class ConjugateGradient(Solve):
    """``iterations`` textbook conjugate gradient steps towards the exact direction (paper, Section 3.2)."""

    iterations: int
    needs_matrix = False
    needs_parameters = False

    def __str__(self) -> str:
        return f"prox_cg{self.iterations}"

    def system(self, design: Design, gradient: Tensor, tau: float, parameters: Parameters) -> System:
        return iterative_system(design, gradient, 1 / tau, self.iterations)

    def solve(self, system: System) -> Parameters:
        """D; in float64 where rounding had much of it, as far as the numbers are at hand."""
        rounding = Rounding() if system.rough and numbers_at_hand(system.gradient) else None
        direction = conjugate_gradients(system, self.iterations, CGRules(), rounding)
        if rounding is None or rounding.is_tolerable:
            return direction
        assert isinstance(system.design, MatrixDesign)
        design = system.design.in_precision(torch.float64)
        accurate = iterative_system(design, system.gradient.double(), system.beta, self.iterations)
        return conjugate_gradients(accurate, self.iterations, CGRules())


DEVIATIONS = ("conjugacy", "damping", "stop", "step_length", "cancellation")
"""What the authors' published solver does otherwise than a textbook's conjugate gradients (see docs/algorithm.md)."""


@dataclasses.dataclass(frozen=True)
class PublishedConjugateGradient(Solve):
    """The solver of the authors' published code, whose figures the paper shows, or one with some of its deviations.

    With "cancellation" it solves for the new parameters: in float32, D is the difference of two nearly equal tensors.
    Without any it is the textbook's recurrence, whose residuals lose their orthogonality to rounding.
    """

    iterations: int
    deviations: tuple[str, ...] = DEVIATIONS
    needs_matrix = False

    @property
    def needs_parameters(self) -> bool:
        return "cancellation" in self.deviations

    def __str__(self) -> str:
        name, missing = f"published_cg{self.iterations}", [d for d in DEVIATIONS if d not in self.deviations]
        if len(missing) < 2:
            return "-without-".join([name, *missing])
        return f"{name}-only-{self.deviations[0] if self.deviations else 'recurrence'}"

    def system(self, design: Design, gradient: Tensor, tau: float, parameters: Parameters) -> System:
        start = parameters if self.needs_parameters else None
        return iterative_system(design, gradient, 1 / tau, self.iterations, start=start)

    def solve(self, system: System) -> Parameters:
        rules = CGRules(
            orthogonal=False,
            conjugate="conjugacy" not in self.deviations,
            damping=1e-6 if "damping" in self.deviations else 0.0,
            stop_below=1e-2 if "stop" in self.deviations else 0.0,
            one_step_length="step_length" in self.deviations and isinstance(system.design, ConvDesign),
        )
        return conjugate_gradients(system, self.iterations, rules)


def _parse_deviations(text: str) -> tuple[str, ...]:
    """Those of a part of the published solver, as ``'published_cgN-without-stop'`` and ``'-only-stop'`` name one."""
    kind, _, name = text.partition("-")
    if kind == "without" and name in DEVIATIONS:
        return tuple(d for d in DEVIATIONS if d != name)
    if kind == "only" and name in (*DEVIATIONS, "recurrence"):
        return tuple(d for d in DEVIATIONS if d == name)
    names = ", ".join(DEVIATIONS)
    raise ValueError(
        f"optimization_mode of a part of the published solver ends in -without-NAME or -only-NAME, with NAME of {names}"
        f" (or -only-recurrence, for none of them), got {text!r}"
    )


def parse_mode(text: str) -> Mode:
    """The mode that ``text`` names.

    Raises:
        ValueError: if it names none.
    """
    if text == "gradient":
        return Gradient()
    if text == "prox_exact":
        return Exact()
    if isinstance(text, str) and (match := re.fullmatch(r"prox_cg([1-9][0-9]*)", text)):
        return ConjugateGradient(int(match[1]))
    if isinstance(text, str) and (match := re.fullmatch(r"published_cg([1-9][0-9]*)(-.*)?", text)):
        deviations = DEVIATIONS if match[2] is None else _parse_deviations(match[2][1:])
        return PublishedConjugateGradient(int(match[1]), deviations)
    raise ValueError(f"optimization_mode must be {ALLOWED}, got {text!r}")


def parse_reduction(text: str) -> str:
    """``text``, if it says how AᵀA is reduced over the rows of A.

    Raises:
        ValueError: if it does not.
    """
    if text not in ("sum", "mean"):
        raise ValueError(f"gram_reduction must be 'sum' or 'mean', got {text!r}")
    return text


def check_together(mode: Mode, reduction: str, deferred: bool) -> None:
    """Refuse settings that are allowed one by one, and not together.

    Raises:
        ValueError: for the published solver with another Gram matrix than the paper's, or with a deferred step.
    """
    published = isinstance(mode, PublishedConjugateGradient)
    if published and reduction == "mean":
        raise ValueError(f"optimization_mode '{mode}', the solver of the paper's code, has no gram_reduction 'mean'")
    if published and deferred:
        raise ValueError(f"optimization_mode '{mode}', the solver of the paper's code, has no deferred step")


def parse_tau(value: object) -> float:
    """``value`` as a step size τ.

    Raises:
        ValueError: if it is no positive finite number.
    """
    tau = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            tau = float(value)
    if not MIN_TAU <= tau <= MAX_TAU:
        raise ValueError(f"tau_prox must be a positive finite number, got {value!r}")
    return tau
