"""What an energy of a chain is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from mep.blocks import Chain
from mep.energies.costs import Cost
from mep.energies.free import FreePhase
from mep.settling import Problem

__all__ = ["Energy"]


class Energy(ABC):
    """An energy ``E(s)`` of a chain's states, per sample; with a cost, ``F_beta = E + beta C``."""

    @abstractmethod
    def value(
        self, chain: Chain, x: Tensor, states: list[Tensor], y: Tensor, cost: Cost, beta: float
    ) -> Tensor:
        """Returns ``F_beta`` per sample, shape ``(B,)``, at any states; differentiable."""

    @abstractmethod
    def forces(
        self, chain: Chain, x: Tensor, states: list[Tensor], y: Tensor, cost: Cost, beta: float
    ) -> list[Tensor]:
        """Returns the complete ``dF/ds_1 ... dF/ds_L`` at any states."""

    @abstractmethod
    def nudged(self, free: FreePhase, beta: float) -> Problem:
        """Returns the settling problem around a free phase at one nudging strength."""
