"""Energies of a chain, costs at its output, and the nudged problem they pose."""

from mep.energies.costs import Cost, CrossEntropy, SquaredError, Widened, cost_of
from mep.energies.differentiable import differentiable_states
from mep.energies.energy import Energy, Phase
from mep.energies.equilibrium import contraction, forward_start, settled_states
from mep.energies.free import FreePhase, usable_gain
from mep.energies.hopfield import Hopfield
from mep.energies.nudged import Configuration, Nudged
from mep.energies.outputs import KL, OutputEnergy, Squared
from mep.energies.prediction import PredictionError
from mep.energies.relaxation import Relaxation
from mep.energies.states import States, displaced

__all__ = [
    "KL",
    "Configuration",
    "Cost",
    "CrossEntropy",
    "Energy",
    "FreePhase",
    "Hopfield",
    "Nudged",
    "OutputEnergy",
    "Phase",
    "PredictionError",
    "Relaxation",
    "Squared",
    "SquaredError",
    "States",
    "Widened",
    "contraction",
    "cost_of",
    "differentiable_states",
    "displaced",
    "forward_start",
    "settled_states",
    "usable_gain",
]
