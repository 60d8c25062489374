"""Model -> Couplings: units with states, and symmetric interactions between their activities."""

from mep.couplings.net import (
    Coupled,
    Couplings,
    Interaction,
    Wiring,
    block_of,
    couplings_of,
    identity,
)
from mep.couplings.units import CONJUGATE, SQUARE, Linear, Ramp, Unit, unit_of

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
