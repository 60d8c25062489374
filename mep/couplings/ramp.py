"""Ramps: units that take any value inside a box, and none outside."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mep.couplings.units import SQUARE, Relaxing, Unit
from mep.kernels import ramps_of

__all__ = ["DisplacedRamp", "Ramp"]


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

    @property
    def box(self) -> tuple[float, float] | None:  # type: ignore[override]
        """The kinks; None of a subclass, which may act otherwise."""
        return (self.low, self.high) if type(self) is Ramp else None

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

    def rest_under(self, terms: list[Tensor], s: Tensor | None) -> tuple[Tensor, Tensor | None]:
        box, fused = self.box, ramps_of(*terms, s)
        if box is None or fused is None:
            return super().rest_under(terms, s)
        return fused.rest(box, terms, s)

    def approach(self, s: Tensor, rest: Tensor, share: float) -> tuple[Tensor, Tensor | None]:
        box, fused = self.box, ramps_of(s, rest)
        if box is None or fused is None:
            return super().approach(s, rest, share)
        return fused.approach(box, s, rest, share)

    def activity_if_kept(self, s: Tensor) -> Tensor:
        return s

    def kept(self, s: Tensor) -> Tensor:
        return s.clamp(self.low, self.high)

    def around(self, s: Tensor, current: Tensor) -> Relaxing:
        rest = self.rest(current)
        beyond = torch.sub(current, rest).masked_fill_(s != rest, 0)
        return DisplacedRamp(self, s, beyond)


@dataclass(frozen=True, eq=False)
class DisplacedRamp(Relaxing):
    """Displacements of a ramp that stay within its box, where both potentials are one.

    Args:
        unit: the ramp.
        origin: its state.
        beyond: how far outside the box the current is, where the unit rests on the rim.
    """

    unit: Ramp
    origin: Tensor
    beyond: Tensor

    at_once = True

    @property
    def box(self) -> tuple[float, float] | None:  # type: ignore[override]
        """The ramp's own kinks."""
        return self.unit.box

    @property
    def offset(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The state, and what is beyond."""
        return self.origin, self.beyond

    @cached_property
    def low(self) -> Tensor:
        """The lower kink, less the state."""
        return self.unit.low - self.origin

    @cached_property
    def high(self) -> Tensor:
        """The upper one."""
        return self.unit.high - self.origin

    def activity(self, s: Tensor) -> Tensor:
        return self.kept(s)

    def slope(self, s: Tensor) -> Tensor:
        return ((s >= self.low) & (s <= self.high)).to(s.dtype)

    def force(self, s: Tensor, current: Tensor) -> Tensor:
        return s - (current + self.beyond)

    def rest(self, current: Tensor) -> Tensor:
        return self.kept(current + self.beyond)

    def rest_under(self, terms: list[Tensor], s: Tensor | None) -> tuple[Tensor, Tensor | None]:
        box, fused = self.box, ramps_of(*terms, s, self.origin, self.beyond)
        if box is None or fused is None:
            return super().rest_under(terms, s)
        return fused.rest(box, terms, s, self.origin, self.beyond)

    def approach(self, s: Tensor, rest: Tensor, share: float) -> tuple[Tensor, Tensor | None]:
        box, fused = self.box, ramps_of(s, rest, self.origin)
        if box is None or fused is None:
            return super().approach(s, rest, share)
        return fused.approach(box, s, rest, share, self.origin)

    def activity_if_kept(self, s: Tensor) -> Tensor:
        return s

    def kept(self, s: Tensor) -> Tensor:
        return torch.clamp(s, self.low, self.high)
