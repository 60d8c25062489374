"""The layered Hopfield energy: symmetric couplings, Hebbian contrast."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mep.blocks import Feedback, TraceError
from mep.couplings import Coupled, Couplings, Interaction
from mep.curvature import Signal
from mep.energies.costs import Cost
from mep.energies.differentiable import differentiable_states
from mep.energies.energy import Energy, Phase
from mep.energies.equilibrium import (
    Equilibrium,
    contraction,
    fixed_point,
    forward_start,
    settled_states,
)
from mep.energies.relaxation import Relaxation
from mep.energies.states import States
from mep.settling import (
    CONVERGED,
    DIVERGED,
    SYNCHRONOUS,
    FixedPoint,
    GradientDescent,
    Limit,
    Settled,
    Solver,
    Sweep,
)

__all__ = ["Hopfield"]

# Relative to the states, and a few roundings of float32.
_CLOSELY = FixedPoint(max_steps=500, tol=1e-6, share=1.0)


@dataclass(frozen=True)
class Hopfield(Energy):
    """``E(s) = sum_i own(s_i) - sum_i <rho(s_i), W_i rho(s_{i-1}) + b_i>``, ``rho(s_0) = x``.

    Per sample, for the couplings of ``mep.models.EquilibriumNet``, ``LoopedMLP`` or any model with
    a method ``couplings()``. ``own`` is ``1/2 ||s||^2``, or ``s rho(s) - int rho`` for couplings of
    the conjugate potential; other interactions (lateral, skip, pooled) add terms of the same form.
    The gradient is Hebbian, ``dE/dW_i = -rho(s_i) rho(s_{i-1})^T``, and a contrast of two settled
    phases; a read-out, which is no part of ``E``, gets ``beta dC/dW`` of every phase.

    >>> Hopfield()
    Hopfield()

    Source: Scellier & Bengio 2017, eq. 1; Laborieux et al. 2021, sec. 2 (read-out, convolutions);
    Hopfield 1984, eq. 6 (the conjugate potential).
    """

    default_solver: ClassVar[Solver] = FixedPoint()
    foreign: ClassVar[tuple[type[Solver], ...]] = (Sweep, Limit)
    contrasts_free: ClassVar[bool] = True
    takes_complex: ClassVar[bool] = True

    def read(self, model: nn.Module, gradient_method: str) -> Couplings:
        if not isinstance(model, Coupled):
            raise TraceError(
                f"{type(model).__name__} has no `couplings()`: wrap a plain net in "
                "mep.models.EquilibriumNet(net), whose output is the settled one"
            )
        net = copy.copy(model.couplings())
        net.by_autograd = gradient_method == "autograd"
        return net

    def check(self, chain: Couplings, solver: Solver) -> None:
        super().check(chain, solver)
        if not isinstance(solver, GradientDescent) and not all(u.has_rest for u in chain.units):
            raise ValueError(
                "smooth units of the square potential have no rest in closed form: use "
                "potential='conjugate', nn.Hardtanh(0, 1), or settler=mep.GradientDescent(...)"
            )

    def free_states(self, chain: Couplings, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return settled_states(chain, x, _CLOSELY).states

    @torch.no_grad()
    def shapes(self, chain: Couplings, x: Tensor) -> list[tuple[int, ...]]:
        return [tuple(s.shape) for s in forward_start(chain, x).states]

    def free_output(self, chain: Couplings, x: Tensor) -> Tensor:
        return differentiable_states(chain, x, _CLOSELY, "recurrent").output

    def result(self, chain: Couplings, x: Tensor, states: list[Tensor]) -> Tensor:
        return States(chain, x, states).output

    def free(
        self,
        chain: Couplings,
        x: Tensor,
        target: Tensor,
        cost: Cost,
        solver: Solver,
        beta: float,
        feedback: Feedback = None,
    ) -> Equilibrium:
        return Equilibrium(chain, x, target, cost, solver, beta)  # no sweep, no feedback

    def value(
        self, chain: Couplings, x: Tensor, states: list[Tensor], y: Tensor, cost: Cost, beta: float
    ) -> Tensor:
        """Returns ``F_beta`` per sample, shape ``(B,)``, at any states.

        Differentiable in the states and the parameters when gradients are enabled.
        """
        at = States(chain, x, states)
        total = beta * cost.value(at.output, y)
        for i, (unit, s) in enumerate(zip(chain.units, states, strict=True), 1):
            total = total + unit.own(s).flatten(1).sum(1)
            for k in chain.into[i - 1]:
                product = at.activity(i) * at.pushed(k)[0]
                total = total - chain.interactions[k].factor * product.flatten(1).sum(1)
        return total

    @torch.no_grad()
    def forces(
        self, chain: Couplings, x: Tensor, states: list[Tensor], y: Tensor, cost: Cost, beta: float
    ) -> list[Tensor]:
        """Returns ``dF/ds_1 ... dF/ds_n`` at any states.

        ``s_i - rho'(s_i) I_i`` for ``own`` a square, ``rho'(s_i) (s_i - I_i)`` for the conjugate
        potential.
        """
        at = States(chain, x, states)
        return Relaxation(at, cost, y, beta, 1.0).forces(at)[0]

    def nudged(self, free: Equilibrium, beta: complex) -> Relaxation:
        """Returns the settling problem at one nudging strength."""
        return free.nudged(beta)

    def signals(self, free: Equilibrium, phases: Sequence[Phase], scale: float) -> Iterator[Signal]:
        net = free.chain
        if net.by_autograd:
            yield from _by_autograd(self, free, phases, scale)
            return
        ends = [_End(free.settled.configuration, p.settled.configuration, p.weight) for p in phases]
        for k, interaction in enumerate(net.interactions):
            yield from _hebbian(k, interaction, ends, scale)
        if net.readout is None:
            return
        for end, (_, beta, weight) in zip(ends, phases, strict=True):
            if beta != 0:
                error = free.cost.gradient(end.at.output, free.target) * (weight * beta)
                yield from net.readout.signals(end.seen_by_readout(net.readout), error, scale)

    def advice(self, free: Equilibrium, solver: Solver, nudged: Settled, status: str) -> str | None:
        if status == CONVERGED or free.chain.advised:
            return None
        free.chain.advised = True  # once is enough, and takes as long as a step
        known = (
            f"the net has not settled (residual {nudged.history[-1]:.2g} after {nudged.steps} "
            f"steps, free phase {free.settled.history[-1]:.2g})"
        )
        if status == DIVERGED and free.settled.converged:
            return f"{known}: the nudge is too strong for it, lower `beta`"
        if isinstance(solver, GradientDescent):
            return f"{known}: lower the `lr` of {solver}, or give it more steps"
        problem = free.unnudged
        order = solver.order if isinstance(solver, FixedPoint) else SYNCHRONOUS
        radius = contraction(problem, fixed_point(problem, order), order)
        known += f"; a round of relaxation has the spectral radius {radius:.3g} at its fixed point"
        if radius < 1:
            return f"{known}: it contracts, give it more than {solver.max_steps} steps"
        return (
            f"{known}, and nothing attracts from 1 on: bound the weights "
            "(constraint=mep.SpectralNorm(0.9, ends=False)), start them smaller, or use "
            "settler=mep.Anderson() or mep.GradientDescent(...)"
        )


class _End(NamedTuple):
    """Where a phase has ended, as changes of the free one's activities."""

    free: States
    at: States
    weight: complex

    def change(self, i: int) -> Tensor:
        """Of an activity."""
        if i == 0 or self.at is self.free:
            return torch.zeros_like(self.free.activity(i))
        return self.at.activity(i)

    def seen_change(self, k: int, interaction: Interaction) -> Tensor:
        """Of what an interaction sees of it."""
        return interaction.change(self.free.pushed(k)[1], self.change(interaction.source))

    def seen_by_readout(self, readout: Interaction) -> Tensor:
        """What the read-out sees of the last activity."""
        point = self.free.readout_point
        return point.values[-1] + readout.change(point, self.change(readout.source))


def _hebbian(
    k: int, interaction: Interaction, ends: Sequence[_End], scale: float
) -> Iterator[Signal]:
    """The contrast of ``-factor rho(s_target) rho(s_source)^T``, from changes alone.

    As the weights add up to 0, ``sum_k w_k e_k a_k^T = sum_k w_k (e_k - e_0) a_k^T + e_0 (sum_k
    w_k (a_k - a_0))^T``, as many products as phases, none of which cancels another.
    """
    base, *others = ends
    source, target = interaction.source, interaction.target
    seen = base.free.pushed(k)[1].values[-1]
    errors = [(end.change(target) - base.change(target)) * end.weight for end in others]
    if source == 0:  # the input is the same in all phases: one product for all
        yield from interaction.signals(seen, _sum(errors), scale)
        return
    first = base.seen_change(k, interaction)
    changes = [end.seen_change(k, interaction) for end in others]
    for error, change in zip(errors, changes, strict=True):
        yield from interaction.signals(seen + change, error, scale)
    moved = _sum([(c - first) * end.weight for end, c in zip(others, changes, strict=True)])
    error = base.free.activity(target) + base.change(target)
    yield from interaction.signals(moved, error, scale, bias=False)


def _sum(terms: list[Tensor]) -> Tensor:
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)


def _by_autograd(
    energy: Hopfield, free: Equilibrium, phases: Sequence[Phase], scale: float
) -> Iterator[Signal]:
    """The contrast as the gradient of an energy difference: the reference of the Hebbian one."""
    net, samples = free.chain, len(free.loss)
    wanted = [p for p in net.parameters() if p.requires_grad]
    if not wanted:
        return
    x = free.x
    with torch.enable_grad():
        total = torch.zeros((), dtype=x.dtype, device=x.device)
        for settled, beta, weight in phases:
            states = settled.configuration.states
            value = energy.value(net, x, states, free.target, free.cost, beta.real)
            total = total + weight.real * scale * value.sum()
        found = torch.autograd.grad(total, wanted, allow_unused=True)
    for parameter, gradient in zip(wanted, found, strict=True):
        if gradient is not None:
            yield Signal(parameter, scale, samples, lambda g=gradient: g, formed=True)
