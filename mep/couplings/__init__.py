"""Model -> Couplings: units with states, and symmetric interactions between their activities."""

from mep.couplings.kinds import unit_of
from mep.couplings.net import (
    Coupled,
    Couplings,
    Interaction,
    Wiring,
    block_of,
    couplings_of,
    identity,
)
from mep.couplings.ramp import Ramp
from mep.couplings.units import CONJUGATE, SQUARE, Linear, Unit

__all__ = [
    "CONJUGATE",
    "SQUARE",
    "Coupled",
    "Couplings",
    "Interaction",
    "Linear",
    "Ramp",
    "Unit",
    "Wiring",
    "block_of",
    "couplings_of",
    "identity",
    "unit_of",
]
