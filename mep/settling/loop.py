"""The one loop: counting, tolerance, non-finite check, verdict. A solver supplies the step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mep.settling.result import CONVERGED, DIVERGED, NOT_SETTLED, Residual, Settled

__all__ = [
    "DIVERGENCE",
    "TRANSPOSE",
    "Iterate",
    "Messages",
    "Problem",
    "Relaxing",
    "Solver",
    "Sweeping",
    "may_stop",
    "settle",
    "verdict",
]

# Errors descend by the transposes of the weights themselves.
TRANSPOSE = "transpose"
# A result is called converged at this median residual where a solver names no tolerance.
DEFAULT_TOLERANCE = 1e-2
# The nudge itself is 1. Residuals of a few happen where kinks flip to and fro; far beyond it, the
# errors have grown from layer to layer and their contrast is no gradient.
DIVERGENCE = 10.0


@dataclass
class Messages:
    """What a backward sweep sends, per unit of beta.

    Attributes:
        errors: ``e_1 ... e_{L-1}`` and the output's own displacement.
        products: ``W_{i+1}^T e_{i+1}`` for i < L; None if the forward sweep may change the errors.
        inners: for every state, ``J^T e`` up to the ramp that the next block begins with, where
            that ramp is to be solved exactly; None if none is.
    """

    errors: list[Tensor]
    products: list[Tensor] | None
    inners: list[Tensor | None] | None = None


class Problem(Protocol):
    """What any solver may ask. A configuration is the problem's own.

    Attributes:
        unit: what forces are told in: beta where they are per unit of it, 1 where they are not.
    """

    @property
    def unit(self) -> float:
        """See above."""
        ...

    def start(self) -> Any:
        """Returns the configuration to start from."""
        ...

    def start_residual(self) -> Residual:
        """Returns its residual."""
        ...

    def forces(self, at: Any) -> tuple[list[Tensor], Residual]:
        """Returns ``dF/ds_1 ... dF/ds_L`` and the residual."""
        ...

    def residual(self, at: Any) -> Residual:
        """Returns the residual alone."""
        ...

    def move(self, at: Any, steps: list[Tensor]) -> Any:
        """Returns the configuration with every state moved by a step."""
        ...

    def first(self) -> Any:
        """Returns the first configuration of a fixed-point iteration."""
        ...

    def unknowns(self, at: Any) -> list[Tensor]:
        """Returns what a fixed-point iteration improves: errors, or states."""
        ...

    def improved(self, at: Any) -> list[Tensor]:
        """Returns what one round of it makes of them."""
        ...

    def place(self, unknowns: list[Tensor]) -> Any:
        """Returns the configuration that has given unknowns."""
        ...


class Sweeping(Problem, Protocol):
    """A problem around a free equilibrium that is known, in error coordinates."""

    def limit(self) -> Any:
        """Returns the free equilibrium with the errors of one backward sweep."""
        ...

    def sweep(self, at: Any | None) -> Any:
        """One backward and one forward sweep, from a configuration or (None) the free states."""
        ...

    def backward(self, at: Any) -> Messages:
        """The backward sweep alone: the errors that the states of a configuration call for."""
        ...

    def forward(self, messages: Messages) -> Any:
        """The forward sweep alone: the configuration that has the given errors."""
        ...


class Relaxing(Problem, Protocol):
    """A problem whose every state has a closed form, given the others."""

    def relax(self, at: Any, order: str, omega: float) -> Any:
        """Lets the states go a share of their way to rest; changes and returns ``at``."""
        ...


@dataclass
class Iterate:
    """A configuration on its way, its residual, and what the solver carries along.

    The residual is None before the first step of a solver that does not look where it starts, and
    the configuration, too, if that is the free equilibrium, whose residual is 1 by definition.
    """

    configuration: Any
    residual: Any
    memory: Any = field(default=None)


class Solver(ABC):
    """A way to settle: a frozen strategy, without state of its own.

    Attributes:
        max_steps: at most this many steps (or sweeps).
        tol: residual at which to stop, or None to take all steps.
        share: of the samples, that must have come there: a half, unless a solver has a say.
        feedback: what carries errors down: ``"transpose"`` is the gradient of the energy.
    """

    max_steps: int
    tol: float | None
    share: float = 0.5
    final_status: str | None = None
    feedback: str = TRANSPOSE

    @abstractmethod
    def start(self, problem: Problem) -> Iterate:
        """Returns the first iterate, before any step."""

    @abstractmethod
    def step(self, problem: Problem, iterate: Iterate) -> Iterate:
        """Returns the next iterate."""

    def measure(self, residual: Residual) -> Tensor:
        """Returns the residual that ``share`` of the samples have reached: the median, usually."""
        found = residual.per_sample
        if self.share == 0.5:
            return found.median()
        return found.kthvalue(max(1, math.ceil(self.share * len(found)))).values

    def stalled(self, history: list[Any]) -> bool:
        """True if further steps are pointless. Only asked where ``tol`` is set."""
        return False


@torch.no_grad()
def settle(problem: Problem, solver: Solver) -> Settled:
    """Settles a problem with a solver.

    Args:
        problem: the nudged energy around one batch's free equilibrium.
        solver: the strategy.

    Returns:
        The last configuration with its verdict. A divergence is a status, never an exception.

    Source: the loop of Scellier & Bengio 2017, sec. 2, with a measured end instead of a fixed one.
    """
    iterate = solver.start(problem)
    first = iterate.residual
    at_once = 1.0 if iterate.configuration is None else math.nan
    history: list[Any] = [at_once if first is None else solver.measure(first)]
    steps = 0
    # A solver that has not looked yet takes a step even where most samples are not nudged.
    while steps < solver.max_steps and (iterate.residual is None or not may_stop(solver, history)):
        iterate = solver.step(problem, iterate)
        history.append(solver.measure(iterate.residual))
        steps += 1
    status = solver.final_status or verdict(iterate.residual.total, history[-1], solver.tol)
    reached = [float(r) for r in history]
    return Settled(iterate.configuration, iterate.residual, steps, status, reached)


def may_stop(solver: Solver, history: list[Any]) -> bool:
    """Returns whether a solver has come to its end, by what it has measured so far.

    The last entry becomes a float.
    """
    if solver.tol is None:
        return False
    history[-1] = reached = float(history[-1])  # the one read per step
    return reached <= solver.tol or reached != reached or solver.stalled(history)


def verdict(total: float, reached: Tensor | float, tol: float | None) -> str:
    """Returns ``"converged"``, ``"not settled"`` or ``"diverged"``.

    Args:
        total: of all samples' residuals, which is not finite if one of them is not.
        reached: by the share of samples that counts.
        tol: what it is compared with; 1e-2 if None.
    """
    if not math.isfinite(total) or reached > DIVERGENCE:
        return DIVERGED
    return CONVERGED if reached <= (DEFAULT_TOLERANCE if tol is None else tol) else NOT_SETTLED
