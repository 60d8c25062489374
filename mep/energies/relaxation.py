"""The settling problem of a coupled net: states that relax towards their neighbours' currents.

``F_beta = sum_i own_i(s_i) - sum_c <rho(s_target), f_c(rho(s_source))> + beta C``. A unit sees the
rest of the net as its current ``I_i``, what all interactions push up and pull down to it, so that
``dF/ds_i`` is the unit's own affair: ``s_i - rho'(s_i) I_i`` for the square potential.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mep.blocks import sample_norm
from mep.energies.costs import Cost
from mep.energies.rounds import are_compiled, compiled_rounds
from mep.energies.states import States
from mep.settling import ALTERNATING, BACKWARD, FORWARD, SYNCHRONOUS, Residual

if TYPE_CHECKING:
    from mep.kernels.rounds import Rounds

__all__ = ["Relaxation"]


# Samples without a nudge settle to this share of their states, times the tolerance.
_UNNUDGED = 1e-4


class Relaxation:
    """``F_beta`` of a coupled net at one batch (a settling ``Problem``).

    Forces are absolute, not per unit of beta: there are some at ``beta = 0``, too.

    Args:
        start: where to start.
        cost: the cost; None where there is no target.
        target: prepared; residuals are relative to the states where there is none.
        beta: nudging strength, 0 for the free phase; complex for holomorphic estimates.
        reference: the nudging strength that residuals are relative to.
    """

    unit = 1.0

    def __init__(
        self,
        start: States,
        cost: Cost | None,
        target: Tensor | None,
        beta: complex,
        reference: float,
    ) -> None:
        self.net = start.net
        self.beta = beta
        self.cost = cost
        self.target = target
        self._start = start
        self._reference = reference
        self._rounds: Rounds | None = None

    def start(self) -> States:
        return self._start.copy()

    def start_residual(self) -> Residual:
        return self.residual(self._start)

    @cached_property
    def _orders(self) -> dict[str, list[list[int]]]:
        """By name, which states relax together, and in what order such groups do."""
        n = len(self.net.units)
        states = list(range(1, n + 1))
        even, odd = states[1::2], states[::2]
        return {
            SYNCHRONOUS: [states],
            ALTERNATING: [group for group in (even, odd) if group],
            FORWARD: [[i] for i in states],
            BACKWARD: [[i] for i in reversed(states)],
        }

    def relax(self, at: States, order: str, omega: float = 1.0) -> States:
        """Lets every unit come to rest under its current; changes and returns ``at``.

        With another ``omega`` than 1 a unit goes that share of its way, as far as it may.
        """
        if order != SYNCHRONOUS and self._compile(at):
            assert self._rounds is not None
            at.relax_in(self._rounds, self._orders[order], omega)
            return at
        for group in self._orders[order]:
            rests = [(i, self._rest(at, i)) for i in group]
            for i, rest in rests:
                if omega != 1 and rest is not at[i]:
                    at.put_near(i, rest, omega)
                elif self._nudged(i):  # where it comes to rest depends on where it is
                    at.put(i, rest)
                else:
                    at.put_to_rest(i, rest)
        return at

    @cached_property
    def _are_compiled(self) -> bool:
        return are_compiled(self.net, self.cost, self.target, self.beta)

    def _compile(self, at: States) -> bool:
        """Returns whether there are compiled rounds for these states; room for them is made."""
        if not self._are_compiled or torch.is_grad_enabled():
            return False
        if not self._has_room(at):
            assert self.target is not None and not isinstance(self.beta, complex)
            known = at.are_activities
            self._rounds = compiled_rounds(at, self.target, self.beta) if known else None
        return self._rounds is not None

    def _has_room(self, at: States) -> bool:
        """Whether these states lie in this problem's own room, not in that of another nudge."""
        return self._rounds is not None and at.rounds is self._rounds

    def _rest(self, at: States, i: int, *, look: bool = False) -> Tensor:
        """Where a unit comes to rest; with a ``look`` at how far it is from there."""
        unit = self.net.units[i - 1]
        if not self._nudged(i):
            known = at.rests[i - 1]
            if known is None:
                currents = at.currents(i)
                if currents[0] is self.net.idle[i]:
                    known = at.rests[i - 1] = currents[0]
                else:
                    known, at.gaps[i - 1] = unit.rest_under(currents, at[i] if look else None)
                    at.rests[i - 1] = known
            return known
        if self.net.readout is not None:
            return unit.rest(self._current(at, i))
        # The output's own s = I - beta dC/ds(s), with the cost's curvature h taken out of dC/ds:
        # solved exactly where the cost is a square.
        assert self.cost is not None
        h = self.beta * self.cost.curvature
        return (self._current(at, i) + h * at[i]) / (1 + h)

    def _nudged(self, i: int) -> bool:
        return self.beta != 0 and i == len(self.net.units)

    def _current(self, at: States, i: int) -> Tensor:
        current = at.current(i)
        return current - self.beta * self._nudge(at) if self._nudged(i) else current

    def _nudge(self, at: States) -> Tensor:
        """``dC/drho(s_n)``: what a nudge of strength 1 takes from the last current."""
        assert self.cost is not None and self.target is not None
        g, readout = self.cost.gradient(at.output, self.target), self.net.readout
        return g if readout is None else readout.pull(at.readout_point, g)

    def move(self, at: States, steps: list[Tensor]) -> States:
        """Returns the configuration with every state moved, and kept where it may be."""
        units = self.net.units
        return at.placed([u.kept(s + d) for u, s, d in zip(units, at.unknowns, steps, strict=True)])

    def first(self) -> States:
        return self.relax(self.start(), ALTERNATING)

    def unknowns(self, at: States) -> list[Tensor]:
        return at.unknowns

    def improved(self, at: States) -> list[Tensor]:
        return self.relax(at.copy(), ALTERNATING).unknowns

    def place(self, unknowns: list[Tensor]) -> States:
        return self._start.placed(unknowns)

    def forces(self, at: States) -> tuple[list[Tensor], Residual]:
        units = enumerate(self.net.units, 1)
        found = [unit.force(at[i], self._current(at, i)) for i, unit in units]
        return found, self.residual(at)

    def residual(self, at: States) -> Residual:
        if self._has_room(at):
            assert self._rounds is not None
            return self._relative_to_nudge(at, self._rounds.force, self._rounds.nudge)
        states = range(1, len(self.net.units) + 1)
        left = [self._gap(at, i) for i in states if not at.resting[i - 1]]
        force = _total(left) if left else at.x.new_zeros(len(at.x))
        if self.target is None:
            return _relative(force, _norm(at.states))
        nudge = self._nudge(at)
        if self.net.readout is not None:
            nudge = self.net.units[-1].slope(at[states[-1]]) * nudge
        return self._relative_to_nudge(at, force, sample_norm(nudge))

    def _relative_to_nudge(self, at: States, force: Tensor, nudge: Tensor) -> Residual:
        size = nudge * self._reference
        if not bool(size.all()):  # nothing to learn there is no reason not to settle
            size = torch.where(size == 0, _UNNUDGED * _norm(at.states), size)
        return _relative(force, size)

    def _gap(self, at: States, i: int) -> Tensor:
        """How far a unit is from its balance, a norm per sample."""
        unit = self.net.units[i - 1]
        if not unit.at_once:
            return sample_norm(unit.imbalance(at[i], self._current(at, i)))
        rest = self._rest(at, i, look=True)  # the next round takes the same rest
        gap = at.gaps[i - 1]
        return sample_norm(at[i] - rest) if gap is None else gap


def _relative(force: Tensor, size: Tensor) -> Residual:
    return Residual((force / size).masked_fill_(force == 0, 0.0), size)


def _norm(tensors: list[Tensor]) -> Tensor:
    """The norm of every sample over all tensors, ``(B,)``."""
    return _total([sample_norm(t) for t in tensors])


def _total(norms: list[Tensor]) -> Tensor:
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm(dim=0)
