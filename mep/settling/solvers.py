"""The solvers: gradient descent on the states, sweeps in error coordinates, Anderson, the limit.

Gradient descent moves information one layer per step; a sweep (one pass down, one pass up)
reaches every layer. All end in the same equilibrium.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mep.settling.loop import TRANSPOSE, Iterate, Problem, Relaxing, Solver, Sweeping
from mep.settling.result import LIMIT

__all__ = ["Anderson", "FixedPoint", "GradientDescent", "Limit", "Sweep"]

ALTERNATING, SYNCHRONOUS, FORWARD, BACKWARD = "alternating", "synchronous", "forward", "backward"
ORDERS = (ALTERNATING, SYNCHRONOUS, FORWARD, BACKWARD)
RANDOM, KOLEN_POLLACK = "random", "kolen-pollack"
FEEDBACKS = (TRANSPOSE, RANDOM, KOLEN_POLLACK)


@dataclass(frozen=True)
class GradientDescent(Solver):
    """Explicit descent on the states, the classic dynamics: ``u <- mu u - lr dF/ds; s <- s + u``.

    Args:
        max_steps: number of steps, >= 1.
        lr: step size, > 0. Stable below 2 over the energy's largest curvature.
        momentum: ``mu`` in [0, 1).
        tol: median residual at which to stop; None takes all steps.
        patience: with ``tol`` set, stop too when the median residual has not reached a new low for
            this many steps, >= 1.

    Raises:
        ValueError: if a number is out of range.

    >>> GradientDescent(max_steps=30, tol=1e-3)
    GradientDescent(max_steps=30, lr=0.2, momentum=0.5, tol=0.001, patience=5)

    Source: Scellier & Bengio 2017.
    """

    max_steps: int = 10
    lr: float = 0.2
    momentum: float = 0.5
    tol: float | None = None
    patience: int = 5

    def __post_init__(self) -> None:
        _check(
            self,
            max_steps=_count(self.max_steps),
            lr=(0 < self.lr < math.inf, "a finite number > 0"),
            momentum=(0 <= self.momentum < 1, "in [0, 1)"),
            tol=_tolerance(self.tol),
            patience=_count(self.patience),
        )

    def start(self, problem: Problem) -> Iterate:
        return Iterate(problem.start(), problem.start_residual())

    def step(self, problem: Problem, iterate: Iterate) -> Iterate:
        at = iterate.configuration
        # The forces behind the last residual are those of this step.
        forces, velocity = iterate.memory or (problem.forces(at)[0], None)
        rate = self.lr * problem.unit
        if velocity is None:
            velocity = [-rate * f for f in forces]
        else:
            for u, f in zip(velocity, forces, strict=True):
                u.mul_(self.momentum).sub_(f, alpha=rate)
        moved = problem.move(at, velocity)
        forces, residual = problem.forces(moved)
        return Iterate(moved, residual, (forces, velocity))

    def stalled(self, history: list[Any]) -> bool:
        best = min(range(len(history)), key=history.__getitem__)
        return len(history) - 1 - best >= self.patience


@dataclass(frozen=True)
class Sweep(Solver):
    """Backward sweep ``e_i = J_{i+1}^T e_{i+1}``, nudged forward sweep, until settled.

    With feedback of its own a sweep learns without weight transport: ``e_i = phi'(s_i) B_{i+1}^T
    e_{i+1}`` with matrices ``B`` beside the weights. That is a vector field, and there is no
    energy whose gradient it is; its zero is settled, measured and contrasted all the same. The
    matrices live in the ``EPOptimizer``, as part of its state.

    Args:
        max_sweeps: at most this many, >= 1.
        tol: median residual at which to stop, or None to take all sweeps.
        feedback: ``"transpose"`` (``B = W``, the energy's own gradient), ``"random"`` (fixed) or
            ``"kolen-pollack"`` (``B`` takes the same updates as ``W``; weight decay, which must
            not be 0 then, lets both forget where they started).

    Raises:
        ValueError: if an option is out of range.

    >>> Sweep(max_sweeps=5, tol=1e-4)
    Sweep(max_sweeps=5, tol=0.0001, feedback='transpose')

    Source: the nudged equilibrium equations of Whittington & Bogacz 2017, sec. 2.3, solved by
    Gauss-Seidel passes from the top down and from the bottom up; Lillicrap et al. 2016 (random
    feedback); Akrout et al. 2019, sec. 2 (Kolen-Pollack).
    """

    max_sweeps: int = 3
    tol: float | None = 1e-2
    feedback: str = TRANSPOSE

    def __post_init__(self) -> None:
        _check(
            self,
            max_sweeps=_count(self.max_sweeps),
            tol=_tolerance(self.tol),
            feedback=(self.feedback in FEEDBACKS, f"one of {FEEDBACKS}"),
        )

    @property
    def max_steps(self) -> int:  # type: ignore[override]
        """One step of the loop is one sweep."""
        return self.max_sweeps

    def start(self, problem: Problem) -> Iterate:
        return Iterate(None, None)

    def step(self, problem: Sweeping, iterate: Iterate) -> Iterate:
        at = problem.sweep(iterate.configuration)
        return Iterate(at, problem.residual(at))


@dataclass(frozen=True)
class FixedPoint(Solver):
    """Every unit comes to rest under the current of the others, round after round.

    ``s_i <- rest(I_i(s))``, for coupled nets. Units of one group relax at once, groups one after
    the other, each under what the groups before it have become.

    Args:
        max_steps: at most this many rounds, >= 1.
        tol: residual at which to stop, or None to take all rounds.
        share: of the samples that must have come there, in (0, 1]: 0.5 goes by the median, and lets
            slow samples be late; those are few, but often the ones with most to learn from.
        order: ``"alternating"`` (every second layer, then the others), ``"synchronous"`` (all at
            once), ``"forward"`` or ``"backward"`` (layer by layer, from below or from above).
        omega: how much of its way to rest a unit goes, in (0, 2). With layers that alternate, and
            a round that shrinks errors to the share ``r``, ``2 / (1 + sqrt(1 - r))`` is fastest;
            below 1 nets come to rest that would go to and fro.

    Raises:
        ValueError: if an option is out of range.

    >>> FixedPoint(max_steps=20, tol=1e-3)
    FixedPoint(max_steps=20, tol=0.001, order='alternating', omega=1.0, share=0.5)

    Source: Scellier & Bengio 2017, sec. 2.3; asynchronous orders: Scellier et al. 2023, sec. 3;
    over-relaxation: Young 1954, sec. 4.
    """

    max_steps: int = 50
    tol: float | None = 1e-2
    order: str = ALTERNATING
    omega: float = 1.0
    share: float = 0.5

    def __post_init__(self) -> None:
        _check(
            self,
            max_steps=_count(self.max_steps),
            tol=_tolerance(self.tol),
            order=(self.order in ORDERS, f"one of {ORDERS}"),
            omega=(0 < self.omega < 2, "in (0, 2)"),
            share=(0 < self.share <= 1, "in (0, 1]"),
        )

    def start(self, problem: Problem) -> Iterate:
        # To look at the start takes half a round, and it is not settled.
        return Iterate(problem.start(), None)

    def step(self, problem: Relaxing, iterate: Iterate) -> Iterate:
        at = problem.relax(iterate.configuration, self.order, self.omega)
        return Iterate(at, problem.residual(at))


@dataclass(frozen=True)
class Anderson(Solver):
    """A fixed-point iteration accelerated by Anderson mixing, each sample on its own.

    What is mixed is what the iteration improves: the errors of sweeps, or the states of a coupled
    net. With ``g(e)`` what a round makes of ``e`` and ``r = g(e) - e``, the next are
    ``sum_k alpha_k (e_k + damping r_k)`` with the ``alpha`` (sum 1) that minimise
    ``||sum_k alpha_k r_k||``.

    Args:
        max_steps: at most this many sweeps, >= 1.
        tol: median residual at which to stop, or None to take all sweeps.
        memory: how many past sweeps are mixed, >= 1; 1 is the plain sweep.
        damping: step along the mixed residual, in (0, 1].

    Raises:
        ValueError: if a number is out of range.

    >>> Anderson(memory=3)
    Anderson(max_steps=10, tol=0.01, memory=3, damping=1.0)

    Source: Walker & Ni 2011, eq. 2.1.
    """

    max_steps: int = 10
    tol: float | None = 1e-2
    memory: int = 5
    damping: float = 1.0

    def __post_init__(self) -> None:
        _check(
            self,
            max_steps=_count(self.max_steps),
            tol=_tolerance(self.tol),
            memory=_count(self.memory),
            damping=(0 < self.damping <= 1, "in (0, 1]"),
        )

    def start(self, problem: Problem) -> Iterate:
        return Iterate(None, None, [])

    def step(self, problem: Problem, iterate: Iterate) -> Iterate:
        at = iterate.configuration
        if at is None:
            at = problem.first()
            return Iterate(at, problem.residual(at), [])
        wanted = problem.improved(at)
        past = [*iterate.memory, (_flatten(problem.unknowns(at)), _flatten(wanted))]
        past = past[-self.memory :]
        at = problem.place(_unflatten(self._mix(past), wanted))
        return Iterate(at, problem.residual(at), past)

    def _mix(self, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        points = torch.stack([e for e, _ in past], 1)
        rests = torch.stack([g - e for e, g in past], 1)
        # Scaled by the last rest, so that the ridge means the same for every sample and nudge.
        size = rests[:, -1].norm(dim=1)[:, None, None]
        scaled = rests / torch.where(size > 0, size, torch.ones_like(size))
        if scaled.dtype == torch.bfloat16:
            scaled = scaled.float()  # bfloat16 has no linear solver, nor the digits for one
        gram = scaled.conj() @ scaled.mT
        gram += 10 * torch.finfo(gram.dtype).eps * torch.eye(len(past)).to(gram)
        ones = torch.ones_like(gram[:, :, :1])
        alpha = torch.linalg.solve_ex(gram, ones)[0]
        alpha = (alpha / alpha.sum(1, keepdim=True)).to(rests.dtype)
        return (alpha * (points + self.damping * rests)).sum(1)


@dataclass(frozen=True)
class Limit(Solver):
    """One backward sweep, contrast at the *free* states: algebraically backprop, beta cancels.

    Legitimate and useful, but never to be quoted as a figure of Equilibrium Propagation.

    >>> Limit()
    Limit()

    Source: Scellier & Bengio 2019, "Equivalence of EP and recurrent backpropagation", theorem 3.
    """

    max_steps = 0
    tol = None
    final_status = LIMIT

    def start(self, problem: Sweeping) -> Iterate:
        """Returns the free states with the errors of one backward sweep."""
        return Iterate(problem.limit(), problem.start_residual())

    def step(self, problem: Problem, iterate: Iterate) -> Iterate:
        raise AssertionError("the limit takes no step")


def _flatten(errors: list[Tensor]) -> Tensor:
    return torch.cat([e.flatten(1) for e in errors], 1)


def _unflatten(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    parts = flat.split([e[0].numel() for e in like], 1)
    return [part.view_as(e) for part, e in zip(parts, like, strict=True)]


def _check(solver: Solver, **rules: tuple[bool, str]) -> None:
    for name, (holds, range_) in rules.items():
        if not holds:
            raise ValueError(
                f"`{type(solver).__name__}({name}=...)` must be {range_}, "
                f"got {getattr(solver, name)!r}"
            )


def _count(value: int) -> tuple[bool, str]:
    return isinstance(value, int) and value >= 1, "a whole number >= 1"


def _tolerance(value: float | None) -> tuple[bool, str]:
    return value is None or value > 0, "a number > 0, or None"
