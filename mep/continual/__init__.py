"""Memories of finished tasks: penalties that keep parameters where a task has left them."""

from mep.continual.ewc import EWC
from mep.continual.fisher import fisher_diagonal
from mep.continual.intelligence import SynapticIntelligence
from mep.continual.penalty import Penalty

__all__ = ["EWC", "Penalty", "SynapticIntelligence", "fisher_diagonal"]
