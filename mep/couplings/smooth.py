"""Smooth units: bounded analytic activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mep.blocks.activations import sigmoid_difference, tanh_difference
from mep.couplings.units import CONJUGATE, SQUARE, Relaxing, Unit

__all__ = ["Smooth", "sigmoid", "tanh"]


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


def tanh(potential: str) -> Smooth:
    """Returns the unit of ``nn.Tanh``; its potential is ``"square"`` or ``"conjugate"``."""
    return Smooth(
        "tanh", torch.tanh, _tanh_slope, tanh_difference, lambda y, t: -t * (2 * y + t),
        _log_cosh, potential,
    )  # fmt: skip


def sigmoid(potential: str) -> Smooth:
    """Returns the unit of ``nn.Sigmoid``; its potential is ``"square"`` or ``"conjugate"``."""
    return Smooth(
        "sigmoid", torch.sigmoid, _sigmoid_slope, sigmoid_difference,
        lambda y, t: t * (1 - 2 * y - t), _sigmoid_integral, potential,
    )  # fmt: skip
