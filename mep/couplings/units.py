"""Units: what one state of a coupled net is on its own, without its neighbours.

A unit has a state ``s``, an activity ``rho(s)``, an energy of its own, and gets a current ``I``
from the others: ``E = own(s) - rho(s) I`` as far as it can see. Two energies of one's own:

``square``: ``1/2 s^2``, so that ``dE/ds = s - rho'(s) I``. A ramp comes to rest at the current,
clipped to its box.
``conjugate``: ``s rho(s) - int_0^s rho``, so that ``dE/ds = rho'(s) (s - I)``. Any unit comes to
rest at ``s = I``, with the activity ``rho(I)``. As a function of the activity ``a`` this is the
integral of ``rho^-1`` from 0 to ``a`` (``artanh`` for tanh).

Around a state at rest, what a unit is displaced by relaxes under the change of its current much
like the unit itself, and no digit of a small displacement is lost to the state: ``Unit.around``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from mep.blocks import sample_norm

__all__ = ["CONJUGATE", "POTENTIALS", "SQUARE", "Linear", "Relaxing", "Unit"]

SQUARE, CONJUGATE = "square", "conjugate"
POTENTIALS = (SQUARE, CONJUGATE)


class Relaxing(ABC):
    """What relaxes under a current, elementwise: the states of units, or their displacements.

    Attributes:
        at_once: whether what is left to settle is the way to the rest, not a force.
        box: the bounds of a unit that rests at its current, clipped, and acts as it is; None for
            other units.
        offset: the state that such a unit is displaced from, if it is, and how far outside the box
            its current is there, where it rests on the rim.
    """

    at_once: ClassVar[bool] = False
    box: tuple[float, float] | None = None
    offset: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def activity(self, s: Tensor) -> Tensor:
        """Returns ``rho(s)``."""

    @abstractmethod
    def slope(self, s: Tensor) -> Tensor:
        """Returns ``rho'(s)``."""

    @abstractmethod
    def force(self, s: Tensor, current: Tensor) -> Tensor:
        """Returns ``dE/ds``."""

    @abstractmethod
    def rest(self, current: Tensor) -> Tensor:
        """Returns the state of lowest energy under a current, if it has a closed form."""

    def rest_under(self, terms: list[Tensor], s: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns the same under one or two currents, and per sample its distance from an ``s``."""
        rest = self.rest(terms[0] if len(terms) == 1 else torch.add(*terms))
        return rest, None if s is None else sample_norm(s - rest)

    def approach(self, s: Tensor, rest: Tensor, share: float) -> tuple[Tensor, Tensor | None]:
        """Returns a state that has gone a share of its way, and per sample what is left of it.

        Only where the way that is left is what counts, ``at_once``.
        """
        moved = self.kept(torch.lerp(s, rest, share))
        return moved, sample_norm(moved - rest) if self.at_once else None

    def imbalance(self, s: Tensor, current: Tensor) -> Tensor:
        """Returns what is left to settle: the force, or what agrees with it near rest."""
        return s - self.rest(current) if self.at_once else self.force(s, current)

    def activity_if_kept(self, s: Tensor) -> Tensor:
        """Returns ``rho(s)`` for a state that ``rest`` or ``kept`` has returned."""
        return self.activity(s)

    def kept(self, s: Tensor) -> Tensor:
        """Returns a state moved back to where it may be."""
        return s


class Unit(Relaxing):
    """One kind of unit.

    Attributes:
        analytic: whether everything here takes complex states.
        has_rest: whether ``rest`` has a closed form.
    """

    analytic: ClassVar[bool] = False
    has_rest: bool = True

    @abstractmethod
    def own(self, s: Tensor) -> Tensor:
        """Returns the unit's own energy; real states only."""

    def start(self, current: Tensor) -> Tensor:
        """Returns a state to start from under a current."""
        return self.rest(current)

    @abstractmethod
    def around(self, s: Tensor, current: Tensor) -> Relaxing:
        """Returns what displacements from ``s`` are like, under changes of the current.

        The state counts as at rest: what is left to settle there is dropped. Activities are changes
        of activities; slopes are the unit's own.
        """


class Linear(Unit):
    """``rho(s) = s``: an output that takes any value. Both potentials are ``1/2 s^2``.

    >>> Linear().force(torch.tensor([3.0]), torch.tensor([1.0]))
    tensor([2.])
    """

    analytic = True

    @property
    def box(self) -> tuple[float, float] | None:  # type: ignore[override]
        """None of a subclass, which may act otherwise."""
        return (-math.inf, math.inf) if type(self) is Linear else None

    def activity(self, s: Tensor) -> Tensor:
        return s

    def slope(self, s: Tensor) -> Tensor:
        return torch.ones_like(s)

    def own(self, s: Tensor) -> Tensor:
        return 0.5 * s.square()

    def force(self, s: Tensor, current: Tensor) -> Tensor:
        return s - current

    def rest(self, current: Tensor) -> Tensor:
        return current

    def around(self, s: Tensor, current: Tensor) -> Relaxing:
        return self
