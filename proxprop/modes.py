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

from torch import Tensor

from proxprop.choice import direct_system, iterative_system
from proxprop.design import ConvDesign, Design, MatrixDesign, Parameters
from proxprop.solvers import CGRules, conjugate_gradients
from proxprop.systems import DirectSystem, System

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
        return conjugate_gradients(system, self.iterations, CGRules())


@dataclasses.dataclass(frozen=True)
class PublishedConjugateGradient(Solve):
    """The solver of the authors' published code, whose figures the paper shows (see docs/algorithm.md).

    It solves for the new parameters: in float32, D is the difference of two nearly equal tensors.
    """

    iterations: int
    needs_matrix = False
    needs_parameters = True

    def __str__(self) -> str:
        return f"published_cg{self.iterations}"

    def system(self, design: Design, gradient: Tensor, tau: float, parameters: Parameters) -> System:
        return iterative_system(design, gradient, 1 / tau, self.iterations, start=parameters)

    def solve(self, system: System) -> Parameters:
        rules = CGRules(
            orthogonal=False,
            conjugate=False,
            damping=1e-6,
            stop_below=1e-2,
            one_step_length=isinstance(system.design, ConvDesign),
        )
        return conjugate_gradients(system, self.iterations, rules)


def parse_mode(text: str) -> Mode:
    """The mode that ``text`` names.

    Raises:
        ValueError: if it names none.
    """
    if text == "gradient":
        return Gradient()
    if text == "prox_exact":
        return Exact()
    if isinstance(text, str) and (match := re.fullmatch(r"(prox|published)_cg([1-9][0-9]*)", text)):
        kind = ConjugateGradient if match[1] == "prox" else PublishedConjugateGradient
        return kind(int(match[2]))
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
    if mode.needs_parameters and reduction == "mean":
        raise ValueError(f"optimization_mode '{mode}', the solver of the paper's code, has no gram_reduction 'mean'")
    if mode.needs_parameters and deferred:
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
