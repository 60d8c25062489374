"""Which unit an activation makes."""

from __future__ import annotations

from torch import nn

from mep.couplings.ramp import Ramp
from mep.couplings.smooth import sigmoid, tanh
from mep.couplings.units import CONJUGATE, SQUARE, Unit

__all__ = ["unit_of"]


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
        return tanh(potential or CONJUGATE)
    if type(module) is nn.Sigmoid:
        return sigmoid(potential or CONJUGATE)
    return None
