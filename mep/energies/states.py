"""States of a coupled net, and all that they send each other, computed once and kept."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mep.blocks import Point
from mep.couplings import Couplings, Wiring

if TYPE_CHECKING:
    from mep.kernels.rounds import Rounds

__all__ = ["States", "displaced"]


class States:
    """States of a coupled net, and what has been computed from them so far.

    Whatever an interaction has pushed or pulled is kept until a state that it depends on changes:
    the currents behind a residual are those of the next step, and the input pushes only once.

    A nudged phase has its *unknowns* in displacements from the free states, in a net of changes
    that ``displaced`` makes: nothing is sent then by what has not moved.

    Args:
        net: the wiring.
        x: input, ``(B, *in)``.
        unknowns: states or displacements, each ``(B, *units)``; None for those not known yet.
        free: the free states that these are displaced from; None if these are states themselves.

    Attributes:
        rests: by number from 0, where a unit comes to rest under its current; None if not known.
        gaps: per sample, how far it is from there, ``(B,)``; None if not known.
        resting: whether an unknown is that very rest.
        rounds: where these states relax, if that is in room of their own; a copy has none.
    """

    def __init__(
        self,
        net: Wiring,
        x: Tensor,
        unknowns: Sequence[Tensor | None],
        free: States | None = None,
    ) -> None:
        self.net = net
        self.x = x
        self.free = free
        self._unknowns = list(unknowns)
        self._activities: list[Tensor | None] = [x, *(None for _ in unknowns)]
        self._pushed: list[tuple[Tensor, Point] | None] = [None for _ in net.interactions]
        self._pulled: list[Tensor | None] = [None for _ in net.interactions]
        self._currents: list[Tensor | None] = [None for _ in unknowns]
        self.rests: list[Tensor | None] = [None for _ in unknowns]
        self.gaps: list[Tensor | None] = [None for _ in unknowns]
        self.resting = [False for _ in unknowns]
        self._read: tuple[Tensor, Point] | None = None
        self.rounds: Rounds | None = None

    def copy(self) -> States:
        """Returns the same, to be changed on its own; what is known is shared."""
        twin = copy.copy(self)
        twin._unknowns, twin._activities = list(self._unknowns), list(self._activities)
        twin._pushed, twin._pulled = list(self._pushed), list(self._pulled)
        twin._currents = list(self._currents)
        twin.rests = [None for _ in self.rests]
        twin.gaps = [None for _ in self.gaps]
        twin.resting = [False for _ in self.resting]
        if self.rounds is not None:  # what lies there may change
            states = range(1, len(self._unknowns) + 1)
            nothing = [None for _ in states]
            twin._take([self[i] if self.idle(i) else self[i].clone() for i in states],
                       nothing, nothing)  # fmt: skip
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a file: its room is its own, and addresses mean nothing elsewhere."""
        return self.__dict__ | {"rounds": None}

    def relax_in(self, rounds: Rounds, groups: Sequence[Sequence[int]], omega: float) -> None:
        """Takes a round of relaxation there, where these states are from now on."""
        rounds.relax(groups, omega)
        states = zip(rounds.states, self.unknowns, strict=True)
        known = [idle if s is None else s for s, idle in states]
        self._take(known, rounds.below, rounds.above)
        self.rounds = rounds

    def _take(
        self,
        states: Sequence[Tensor],
        below: Sequence[Tensor | None],
        above: Sequence[Tensor | None],
    ) -> None:
        """Changes all states of a chain of plain weights, and what is known to be sent."""
        self._unknowns[:], self._activities[1:] = states, states
        for k, (pushed, a) in enumerate(zip(below[1:], states, strict=False), 1):
            self._pushed[k] = None if pushed is None else (pushed, Point([a], []))
        for k, pulled in enumerate(above[:-1], 1):
            self._pulled[k] = pulled
        self._currents = [None for _ in states]
        self.rests, self.gaps = [None for _ in states], [None for _ in states]
        self.resting, self._read = [False for _ in states], None

    def placed(self, unknowns: Sequence[Tensor]) -> States:
        """Returns other unknowns of the same net."""
        return States(self.net, self.x, unknowns, self.free)

    @property
    def unknowns(self) -> list[Tensor]:
        """States, or their displacements."""
        return [s for s in self._unknowns if s is not None]

    @property
    def states(self) -> list[Tensor]:
        """``s_1 ... s_n``."""
        if self.free is None:
            return self.unknowns
        return [s + d for s, d in zip(self.free.states, self.unknowns, strict=True)]

    @property
    def displacements(self) -> list[Tensor]:
        """``s_i`` less its free state; 0 in the free phase."""
        return self.unknowns if self.free else [torch.zeros_like(s) for s in self.unknowns]

    def __getitem__(self, i: int) -> Tensor:
        """``s_i``, or its displacement, from 1."""
        found = self._unknowns[i - 1]
        assert found is not None
        return found

    def put(self, i: int, s: Tensor, activity: Tensor | None = None) -> None:
        """Changes ``s_i``, from 1; its activity may be known already."""
        interactions = self.net.interactions
        self.rounds = None
        self._unknowns[i - 1] = s
        self._activities[i] = activity
        self.gaps[i - 1] = None
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
        if i == len(self._unknowns):
            self._read = None

    def _forget(self, i: int) -> None:
        """The current of ``s_i`` has changed."""
        if i > 0:
            self._currents[i - 1] = self.rests[i - 1] = self.gaps[i - 1] = None
            self.resting[i - 1] = False

    def put_to_rest(self, i: int, rest: Tensor) -> None:
        """Changes ``s_i`` to the rest under a current, which other changes may have outdated."""
        self.put(i, rest, self.net.units[i - 1].activity_if_kept(rest))
        self.resting[i - 1] = self.rests[i - 1] is rest

    def put_near(self, i: int, rest: Tensor, share: float) -> None:
        """Changes ``s_i`` by a share of its way there, as far as it may go."""
        unit = self.net.units[i - 1]
        s, gap = unit.approach(self[i], rest, share)
        self.put(i, s, unit.activity_if_kept(s))
        if self.rests[i - 1] is rest:
            self.gaps[i - 1] = gap

    @property
    def are_activities(self) -> bool:
        """Whether every state is known to act as it is, or to exert nothing."""
        states = enumerate(zip(self._unknowns, self._activities[1:], strict=True), 1)
        return all(s is not None and (a is s or self.idle(i)) for i, (s, a) in states)

    @property
    def sent_up(self) -> list[Tensor | None]:
        """What every interaction pushes, as far as it is known, and what the input does.

        None for an input that exerts nothing, too.
        """
        first = None if self.idle(0) else self.pushed(0)[0]
        return [first, *(None if known is None else known[0] for known in self._pushed[1:])]

    def activity(self, i: int) -> Tensor:
        """``rho(s_i)``, or its change; the input itself for ``i = 0``."""
        known = self._activities[i]
        if known is None:
            known = self._activities[i] = self.net.units[i - 1].activity(self[i])
        return known

    def pushed(self, k: int) -> tuple[Tensor, Point]:
        """What interaction ``k`` pushes into its target, and its point."""
        known = self._pushed[k]
        if known is None:
            c = self.net.interactions[k]
            known = self._pushed[k] = c.push(self.activity(c.source))
        return known

    def pulled(self, k: int) -> Tensor:
        """What interaction ``k`` pulls into its source."""
        known = self._pulled[k]
        if known is None:
            c = self.net.interactions[k]
            known = self._pulled[k] = c.pull(self.pushed(k)[1], self.activity(c.target))
        return known

    def current(self, i: int) -> Tensor:
        """``I_i``, all that the other states send to ``s_i``, or its change."""
        known = self._currents[i - 1]
        if known is None:
            terms = self._terms(i)
            known = self._currents[i - 1] = _sum(terms) if terms else self.net.idle[i]
            assert known is not None
        return known

    def currents(self, i: int) -> list[Tensor]:
        """One or two tensors whose sum is ``I_i``."""
        if self._currents[i - 1] is None:
            terms = self._terms(i)
            if len(terms) == 2 and all(factor == 1 for _, factor in terms):
                return [term for term, _ in terms]
        return [self.current(i)]

    def _terms(self, i: int) -> list[tuple[Tensor, float]]:
        net = self.net
        into = [k for k in net.into[i - 1] if not self.idle(net.interactions[k].source)]
        out_of = [k for k in net.out_of[i - 1] if self._returns(k)]
        terms = [(self.pushed(k)[0], net.interactions[k].factor) for k in into]
        return terms + [(self.pulled(k), net.interactions[k].factor) for k in out_of]

    def idle(self, i: int) -> bool:
        """Whether ``s_i`` is known to exert nothing; the input for ``i = 0``."""
        return (self._unknowns[i - 1] if i else self.x) is self.net.idle[i]

    def _returns(self, k: int) -> bool:
        """Whether anything may come back through an interaction."""
        c = self.net.interactions[k]
        return not self.idle(c.target) or not (c.linear or self.idle(c.source))

    def from_below(self, i: int) -> Tensor:
        """The part of ``I_i`` that comes from states below ``i``."""
        net = self.net
        below = [k for k in net.into[i - 1] if net.interactions[k].source < i]
        return _sum([(self.pushed(k)[0], net.interactions[k].factor) for k in below])

    @property
    def output(self) -> Tensor:
        """What the cost looks at: the last state, or what the read-out makes of it."""
        own = self[len(self._unknowns)] if self.net.readout is None else self._readout[0]
        return own if self.free is None else self.free.output + own

    @property
    def readout_point(self) -> Point:
        """The point of the read-out."""
        return self._readout[1]

    @property
    def _readout(self) -> tuple[Tensor, Point]:
        assert self.net.readout is not None
        if self._read is None:
            self._read = self.net.readout.push(self.activity(len(self._unknowns)))
        return self._read


def displaced(free: States) -> States:
    """Returns the displacements from some free states, all 0, in the net of their changes.

    What the free states have left to settle is dropped: they count as at rest.
    """
    net = free.net
    assert isinstance(net, Couplings), "displacements are not displaced once more"
    units = [unit.around(free[i], free.current(i)) for i, unit in enumerate(net.units, 1)]
    interactions = [
        c.around(free.pushed(k)[1], free.activity(c.target)) for k, c in enumerate(net.interactions)
    ]
    readout = None if net.readout is None else net.readout.around(free.readout_point, None)
    nothing = [torch.zeros_like(s) for s in free.states]
    return States(Wiring(units, interactions, readout, [free.x, *nothing]), free.x, nothing, free)


def _sum(terms: list[tuple[Tensor, float]]) -> Tensor:
    (first, factor), *others = terms
    total = first if factor == 1 else first * factor
    for term, factor in others:
        total = torch.add(total, term, alpha=factor)
    return total
