"""Energies of a chain, costs at its output, and the nudged problem they pose."""

from mep.energies.costs import Cost, CrossEntropy, SquaredError, cost_of
from mep.energies.energy import Energy
from mep.energies.free import FreePhase, usable_gain
from mep.energies.nudged import Configuration, Nudged
from mep.energies.outputs import KL, OutputEnergy, Squared
from mep.energies.prediction import PredictionError

__all__ = [
    "KL",
    "Configuration",
    "Cost",
    "CrossEntropy",
    "Energy",
    "FreePhase",
    "Nudged",
    "OutputEnergy",
    "PredictionError",
    "Squared",
    "SquaredError",
    "cost_of",
    "usable_gain",
]
