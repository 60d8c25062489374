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
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mep.blocks.activations import sigmoid_difference, tanh_difference

__all__ = ["CONJUGATE", "POTENTIALS", "SQUARE", "Linear", "Ramp", "Smooth", "Unit", "unit_of"]

SQUARE, CONJUGATE = "square", "conjugate"
POTENTIALS = (SQUARE, CONJUGATE)


class Relaxing(ABC):
    """What relaxes under a current, elementwise: the states of units, or their displacements.

    Attributes:
        at_once: whether what is left to settle is the way to the rest, not a force.
    """

    at_once: ClassVar[bool] = False

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


@dataclass(frozen=True)
class Ramp(Unit):
    """``rho(s) = clip(s, low, high)`` with ``low <= 0 <= high``.

    Args:
        low, high: the kinks.
        potential: ``"square"`` or ``"conjugate"``.

    >>> unit = Ramp(0.0, 1.0, "square")
    >>> unit.rest(torch.tensor([-1.0, 0.5, 2.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """

    low: float
    high: float
    potential: str

    at_once = True  # the least force, where a kink allows several

    def activity(self, s: Tensor) -> Tensor:
        return s.clamp(self.low, self.high)

    def slope(self, s: Tensor) -> Tensor:
        # 1 at the rims, as for clamp: a unit at rest there must be able to leave.
        return ((s >= self.low) & (s <= self.high)).to(s.dtype)

    def own(self, s: Tensor) -> Tensor:
        if self.potential == SQUARE:
            return 0.5 * s.square()
        a = self.activity(s)
        # s a - int_0^s rho is a^2 / 2 inside the box, and stays at its rim's value outside.
        return 0.5 * a.square()

    def force(self, s: Tensor, current: Tensor) -> Tensor:
        if self.potential == SQUARE:
            return s - self.slope(s) * current
        return self.slope(s) * (s - current)

    def rest(self, current: Tensor) -> Tensor:
        # A conjugate unit has no force outside its box: it may as well stay at the rim.
        return current.clamp(self.low, self.high)

    def activity_if_kept(self, s: Tensor) -> Tensor:
        return s

    def kept(self, s: Tensor) -> Tensor:
        return s.clamp(self.low, self.high)

    def around(self, s: Tensor, current: Tensor) -> Relaxing:
        rest = self.rest(current)
        beyond = torch.sub(current, rest).masked_fill_(s != rest, 0)
        return _DisplacedRamp(self.low - s, self.high - s, beyond)


@dataclass(frozen=True, eq=False)
class _DisplacedRamp(Relaxing):
    """Displacements of a ramp that stay within its box, where both potentials are one.

    Args:
        low, high: the kinks, less the state.
        beyond: how far outside the box the current is, where the unit rests on the rim.
    """

    low: Tensor
    high: Tensor
    beyond: Tensor

    at_once = True

    def activity(self, s: Tensor) -> Tensor:
        return self.kept(s)

    def slope(self, s: Tensor) -> Tensor:
        return ((s >= self.low) & (s <= self.high)).to(s.dtype)

    def force(self, s: Tensor, current: Tensor) -> Tensor:
        return s - (current + self.beyond)

    def rest(self, current: Tensor) -> Tensor:
        return self.kept(current + self.beyond)

    def activity_if_kept(self, s: Tensor) -> Tensor:
        return s

    def kept(self, s: Tensor) -> Tensor:
        return torch.clamp(s, self.low, self.high)


@dataclass(frozen=True)
class Smooth(Unit):
    """A bounded analytic activation.

    Args:
        name: of the activation.
        value: ``rho``.
        derivative: ``rho(s) -> rho'(s)``.
        difference: ``rho(s), rho(s + d), d -> rho(s + d) - rho(s)``, free of cancellation.
        bend: ``rho(s), rho(s + d) - rho(s) -> rho'(s + d) - rho'(s)``, free of it too.
        integral: ``s -> int_0^s rho``, for real states.
        potential: ``"square"`` or ``"conjugate"``.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    difference: Callable[[Tensor, Tensor, Tensor], Tensor]
    bend: Callable[[Tensor, Tensor], Tensor]
    integral: Callable[[Tensor], Tensor]
    potential: str

    analytic = True

    @property
    def has_rest(self) -> bool:  # type: ignore[override]
        """A square unit's rest solves ``s = rho'(s) I``, which has no closed form."""
        return self.potential == CONJUGATE

    def activity(self, s: Tensor) -> Tensor:
        return self.value(s)

    def slope(self, s: Tensor) -> Tensor:
        return self.derivative(self.value(s))

    def own(self, s: Tensor) -> Tensor:
        if self.potential == SQUARE:
            return 0.5 * s.square()
        return s * self.value(s) - self.integral(s)

    def force(self, s: Tensor, current: Tensor) -> Tensor:
        if self.potential == SQUARE:
            return s - self.slope(s) * current
        return self.slope(s) * (s - current)

    def rest(self, current: Tensor) -> Tensor:
        assert self.has_rest, "smooth units of the square potential have no rest in closed form"
        return current

    def start(self, current: Tensor) -> Tensor:
        return current

    def imbalance(self, s: Tensor, current: Tensor) -> Tensor:
        if self.potential == SQUARE:
            return self.force(s, current)
        # In activities: rho'(s) (s - I) to first order, and not 0 because s is saturated.
        return self.value(s) - self.value(current)

    def around(self, s: Tensor, current: Tensor) -> Relaxing:
        return _DisplacedSmooth(self, s, self.value(s), current)


@dataclass(frozen=True, eq=False)
class _DisplacedSmooth(Relaxing):
    """Displacements of a smooth unit.

    Args:
        unit: the unit.
        origin: its state.
        value: its activity there.
        current: its current there.
    """

    unit: Smooth
    origin: Tensor
    value: Tensor
    current: Tensor

    def activity(self, s: Tensor) -> Tensor:
        return self.unit.difference(self.value, self.unit.value(self.origin + s), s)

    def slope(self, s: Tensor) -> Tensor:
        return self.unit.slope(self.origin + s)

    def force(self, s: Tensor, current: Tensor) -> Tensor:
        if self.unit.potential == SQUARE:
            bend = self.unit.bend(self.value, self.activity(s))
            return s - bend * self.current - self.slope(s) * current
        return self.slope(s) * (s - current)

    def rest(self, current: Tensor) -> Tensor:
        return self.unit.rest(current)

    def imbalance(self, s: Tensor, current: Tensor) -> Tensor:
        if self.unit.potential == SQUARE:
            return self.force(s, current)
        return self.activity(s) - self.activity(current)


def _tanh_slope(y: Tensor) -> Tensor:
    return 1 - y * y


def _sigmoid_slope(y: Tensor) -> Tensor:
    return y * (1 - y)


def _log_cosh(s: Tensor) -> Tensor:
    """``int_0^s tanh``, without overflow."""
    return s.abs() + torch.log1p(torch.exp(-2 * s.abs())) - math.log(2)


def _sigmoid_integral(s: Tensor) -> Tensor:
    return torch.logaddexp(s, torch.zeros_like(s)) - math.log(2)


def unit_of(module: nn.Module, potential: str | None = None) -> Unit | None:
    """Returns the unit that has an activation, or None if it is not bounded or not known.

    Args:
        module: ``nn.Tanh``, ``nn.Sigmoid``, or ``nn.Hardtanh`` with 0 in its box.
        potential: ``"square"`` or ``"conjugate"``; by default the one with a rest in closed form,
            square for ramps and conjugate for smooth units.

    >>> unit_of(nn.Hardtanh(0, 1), "square")
    Ramp(low=0.0, high=1.0, potential='square')
    >>> unit_of(nn.ReLU(), "square") is None
    True
    """
    if type(module) is nn.Hardtanh and module.min_val <= 0 <= module.max_val:
        return Ramp(float(module.min_val), float(module.max_val), potential or SQUARE)
    if type(module) is nn.Tanh:
        return Smooth(
            "tanh", torch.tanh, _tanh_slope, tanh_difference, lambda y, t: -t * (2 * y + t),
            _log_cosh, potential or CONJUGATE,
        )  # fmt: skip
    if type(module) is nn.Sigmoid:
        return Smooth(
            "sigmoid", torch.sigmoid, _sigmoid_slope, sigmoid_difference,
            lambda y, t: t * (1 - 2 * y - t), _sigmoid_integral, potential or CONJUGATE,
        )  # fmt: skip
    return None
