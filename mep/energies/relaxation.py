"""The settling problem of a coupled net: states that relax towards their neighbours' currents.

``F_beta = sum_i own_i(s_i) - sum_c <rho(s_target), f_c(rho(s_source))> + beta C``. A unit sees the
rest of the net as its current ``I_i``, what all interactions push up and pull down to it, so that
``dF/ds_i`` is the unit's own affair: ``s_i - rho'(s_i) I_i`` for the square potential.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mep.blocks import sample_norm
from mep.couplings import Couplings, Ramp
from mep.energies.costs import Cost
from mep.settling import ALTERNATING, BACKWARD, FORWARD, SYNCHRONOUS, Residual

__all__ = ["Relaxation", "States"]


# Samples without a nudge settle to this share of their states, times the tolerance.
_UNNUDGED = 1e-4


class States:
    """States of a coupled net, and what has been computed from them so far.

    Whatever an interaction has pushed or pulled is kept until a state that it depends on changes:
    the currents behind a residual are those of the next step, and the input pushes only once.

    Attributes:
        rests: by number from 0, where a unit comes to rest under its current; None if not known.
        resting: whether a state is that very rest.

    Args:
        net: the couplings.
        x: input, ``(B, *in)``.
        states: ``s_1 ... s_n``, each ``(B, *units)``; None for those not known yet.
        origin: the free states that nudged ones are displaced from.
    """

    def __init__(
        self,
        net: Couplings,
        x: Tensor,
        states: Sequence[Tensor | None],
        origin: list[Tensor] | None = None,
    ) -> None:
        self.net = net
        self.x = x
        self.origin = origin
        self._states = list(states)
        self._activities: list[Tensor | None] = [x, *(None for _ in states)]
        self._pushed: list[Any] = [None for _ in net.interactions]
        self._pulled: list[Tensor | None] = [None for _ in net.interactions]
        self._currents: list[Tensor | None] = [None for _ in states]
        self.rests: list[Tensor | None] = [None for _ in states]
        self.resting = [False for _ in states]
        self._read: tuple[Tensor, Any] | None = None

    def copy(self) -> States:
        """Returns the same states, to be changed on their own; what is known is shared."""
        twin = States(self.net, self.x, self._states, self.origin)
        twin._activities = list(self._activities)
        twin._pushed, twin._pulled = list(self._pushed), list(self._pulled)
        twin._currents = list(self._currents)
        twin._read = self._read
        return twin

    @property
    def states(self) -> list[Tensor]:
        """``s_1 ... s_n``."""
        return [s for s in self._states if s is not None]

    @property
    def displacements(self) -> list[Tensor]:
        """``s_i`` less its free state; 0 in the free phase."""
        states = self.states
        return [s - s_0 for s, s_0 in zip(states, self.origin or states, strict=True)]

    def __getitem__(self, i: int) -> Tensor:
        """``s_i``, from 1."""
        found = self._states[i - 1]
        assert found is not None
        return found

    def put(self, i: int, s: Tensor, activity: Tensor | None = None) -> None:
        """Changes ``s_i``, from 1; its activity may be known already."""
        interactions = self.net.interactions
        self._states[i - 1] = s
        self._activities[i] = activity
        self.resting[i - 1] = False
        for k in self.net.out_of[i - 1]:
            self._pushed[k] = None
            self._forget(interactions[k].target)
            if not interactions[k].linear:  # what is pulled depends on where it comes to
                self._pulled[k] = None
                self._forget(i)
        for k in self.net.into[i - 1]:
            self._pulled[k] = None
            self._forget(interactions[k].source)
        if i == len(self._states):
            self._read = None

    def _forget(self, i: int) -> None:
        """The current of ``s_i`` has changed."""
        if i > 0:
            self._currents[i - 1] = self.rests[i - 1] = None
            self.resting[i - 1] = False

    def put_to_rest(self, i: int, s: Tensor) -> None:
        """Changes ``s_i`` to the rest under a current, which other changes may have outdated."""
        valid = self._currents[i - 1] is not None
        self.put(i, s, self.net.units[i - 1].activity_at_rest(s))
        self.resting[i - 1] = valid and self._currents[i - 1] is not None

    def activity(self, i: int) -> Tensor:
        """``rho(s_i)``; the input itself for ``i = 0``."""
        known = self._activities[i]
        if known is None:
            known = self._activities[i] = self.net.units[i - 1].activity(self[i])
        return known

    def pushed(self, k: int) -> tuple[Tensor, Any]:
        """What interaction ``k`` pushes into its target, and what it has seen of its source."""
        if self._pushed[k] is None:
            c = self.net.interactions[k]
            self._pushed[k] = c.push(self.activity(c.source))
        return self._pushed[k]

    def pulled(self, k: int) -> Tensor:
        """What interaction ``k`` pulls into its source."""
        known = self._pulled[k]
        if known is None:
            c = self.net.interactions[k]
            known = self._pulled[k] = c.pull(self.pushed(k)[1], self.activity(c.target))
        return known

    def current(self, i: int) -> Tensor:
        """``I_i``, all that the other states send to ``s_i``."""
        known, net = self._currents[i - 1], self.net
        if known is None:
            terms = [(self.pushed(k)[0], net.interactions[k].factor) for k in net.into[i - 1]]
            terms += [(self.pulled(k), net.interactions[k].factor) for k in net.out_of[i - 1]]
            known = self._currents[i - 1] = _sum(terms)
        return known

    def from_below(self, i: int) -> Tensor:
        """The part of ``I_i`` that comes from states below ``i``."""
        net = self.net
        below = [k for k in net.into[i - 1] if net.interactions[k].source < i]
        return _sum([(self.pushed(k)[0], net.interactions[k].factor) for k in below])

    @property
    def output(self) -> Tensor:
        """What the cost looks at: the last state, or what the read-out makes of it."""
        return self[len(self._states)] if self.net.readout is None else self._readout[0]

    @property
    def readout_seen(self) -> Any:
        """What the read-out has seen of the last activity."""
        return self._readout[1]

    @property
    def _readout(self) -> tuple[Tensor, Any]:
        assert self.net.readout is not None
        if self._read is None:
            self._read = self.net.readout.push(self.activity(len(self._states)))
        return self._read


def _sum(terms: list[tuple[Tensor, float]]) -> Tensor:
    (first, factor), *others = terms
    total = first if factor == 1 else first * factor
    for term, factor in others:
        total = torch.add(total, term, alpha=factor)
    return total


class Relaxation:
    """``F_beta`` of a coupled net at one batch (a settling ``Problem``).

    Forces are absolute, not per unit of beta: there are some at ``beta = 0``, too.

    Args:
        start: where to start.
        cost: the cost; None where there is no target.
        target: prepared; residuals are relative to the states where there is none.
        beta: nudging strength, 0 for the free phase; complex for holomorphic estimates.
        reference: the nudging strength that residuals are relative to: how far the free phase has
            to settle depends on the nudge that follows it.
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

    def relax(self, at: States, order: str) -> States:
        """Lets every unit come to rest under its current; changes and returns ``at``."""
        for group in self._orders[order]:
            rests = [(i, self._rest(at, i)) for i in group]
            for i, s in rests:
                if self._nudged(i):  # where it comes to rest depends on where it is
                    at.put(i, s)
                else:
                    at.put_to_rest(i, s)
        return at

    def _rest(self, at: States, i: int) -> Tensor:
        unit = self.net.units[i - 1]
        if not self._nudged(i):
            known = at.rests[i - 1]
            if known is None:
                known = at.rests[i - 1] = unit.rest(at.current(i))
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
        return g if readout is None else readout.pull(at.readout_seen, g)

    def move(self, at: States, steps: list[Tensor]) -> States:
        """Returns the configuration with every state moved, and kept where it may be."""
        units = self.net.units
        moved = [u.kept(s + d) for u, s, d in zip(units, at.states, steps, strict=True)]
        return States(self.net, at.x, moved, at.origin)

    def first(self) -> States:
        return self.relax(self.start(), ALTERNATING)

    def unknowns(self, at: States) -> list[Tensor]:
        return at.states

    def improved(self, at: States) -> list[Tensor]:
        return self.relax(at.copy(), ALTERNATING).states

    def place(self, unknowns: list[Tensor]) -> States:
        return States(self.net, self._start.x, unknowns, self._start.origin)

    def forces(self, at: States) -> tuple[list[Tensor], Residual]:
        units = enumerate(self.net.units, 1)
        found = [unit.force(at[i], self._current(at, i)) for i, unit in units]
        return found, self.residual(at)

    def residual(self, at: States) -> Residual:
        states = range(1, len(self.net.units) + 1)
        left = [self._imbalance(at, i) for i in states if not at.resting[i - 1]]
        force = _norm(left) if left else at.x.new_zeros(len(at.x))
        if self.target is None:
            return _relative(force, _norm(at.states))
        nudge = self._nudge(at)
        if self.net.readout is not None:
            nudge = self.net.units[-1].slope(at[states[-1]]) * nudge
        size = sample_norm(nudge) * self._reference
        if not bool(size.all()):  # nothing to learn there is no reason not to settle
            size = torch.where(size == 0, _UNNUDGED * _norm(at.states), size)
        return _relative(force, size)

    def _imbalance(self, at: States, i: int) -> Tensor:
        unit = self.net.units[i - 1]
        if isinstance(unit, Ramp):
            return at[i] - self._rest(at, i)  # its imbalance, whose rest the next round takes
        return unit.imbalance(at[i], self._current(at, i))


def _relative(force: Tensor, size: Tensor) -> Residual:
    return Residual((force / size).masked_fill_(force == 0, 0.0), size)


def _norm(tensors: list[Tensor]) -> Tensor:
    """The norm of every sample over all tensors, ``(B,)``."""
    norms = [sample_norm(t) for t in tensors]
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm(dim=0)
