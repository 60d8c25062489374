"""Where estimating and updating meet: the optimizer."""

from mep.optim.groups import param_groups
from mep.optim.optimizer import EPOptimizer

__all__ = ["EPOptimizer", "param_groups"]
