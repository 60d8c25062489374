"""Update rules: gradients in, parameters changed. They know nothing of EP."""

from mep.updates.muon import Muon
from mep.updates.newton_schulz import orthogonalise
from mep.updates.route import Route
from mep.updates.rule import Gradient, MatrixRule, Role, Rule, dense
from mep.updates.sgd import SGD

__all__ = [
    "SGD",
    "Gradient",
    "MatrixRule",
    "Muon",
    "Role",
    "Route",
    "Rule",
    "dense",
    "orthogonalise",
]
