"""Update rules: gradients in, parameters changed. They know nothing of EP."""

from mep.updates.compress import Compressing, ErrorFeedback, Sign, TopK
from mep.updates.dion import Dion
from mep.updates.muon import Muon
from mep.updates.natural import Natural
from mep.updates.newton_schulz import orthogonalise
from mep.updates.normalised import Normalised
from mep.updates.route import Route
from mep.updates.rule import Gradient, MatrixRule, Role, Rule
from mep.updates.sgd import SGD

__all__ = [
    "SGD",
    "Compressing",
    "Dion",
    "ErrorFeedback",
    "Gradient",
    "MatrixRule",
    "Muon",
    "Natural",
    "Normalised",
    "Role",
    "Route",
    "Rule",
    "Sign",
    "TopK",
    "orthogonalise",
]
