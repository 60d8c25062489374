"""mep: exact Equilibrium Propagation for PyTorch."""

from mep import continual, data, init, memory, models, presets
from mep.blocks import Chain, TraceError, trace
from mep.constraints import SpectralNorm
from mep.continual import EWC, SynapticIntelligence
from mep.contrast import (
    AutoBeta,
    Estimate,
    centered,
    energy,
    estimate,
    five_point,
    free_states,
    holomorphic,
    one_sided,
    random_sign,
    settle,
    state_gradients,
)
from mep.diagnostics import Diagnosis, diagnose
from mep.energies import KL, Hopfield, PredictionError, Squared
from mep.optim import EPOptimizer, param_groups
from mep.presets import local_ep, muon_backprop, natural_ep, sdmep, smep, smep_fast
from mep.settling import Anderson, FixedPoint, GradientDescent, Limit, Sweep
from mep.updates import SGD, Dion, ErrorFeedback, Muon, Natural, Normalised, Route, Sign, TopK

__version__ = "0.1.0"

__all__ = [
    "EWC",
    "KL",
    "SGD",
    "Anderson",
    "AutoBeta",
    "Chain",
    "Diagnosis",
    "Dion",
    "EPOptimizer",
    "ErrorFeedback",
    "Estimate",
    "FixedPoint",
    "GradientDescent",
    "Hopfield",
    "Limit",
    "Muon",
    "Natural",
    "Normalised",
    "PredictionError",
    "Route",
    "Sign",
    "SpectralNorm",
    "Squared",
    "Sweep",
    "SynapticIntelligence",
    "TopK",
    "TraceError",
    "centered",
    "continual",
    "data",
    "diagnose",
    "energy",
    "estimate",
    "five_point",
    "free_states",
    "holomorphic",
    "init",
    "local_ep",
    "memory",
    "models",
    "muon_backprop",
    "natural_ep",
    "one_sided",
    "param_groups",
    "presets",
    "random_sign",
    "sdmep",
    "settle",
    "smep",
    "smep_fast",
    "state_gradients",
    "trace",
]
