"""Update rules: gradients in, parameters changed. They know nothing of EP."""

from mep.updates.rule import Rule
from mep.updates.sgd import SGD

__all__ = ["SGD", "Rule"]
