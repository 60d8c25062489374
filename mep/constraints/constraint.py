"""What a constraint is: something that holds for parameters after every step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

__all__ = ["Constraint"]


class Constraint(ABC):
    """A condition on parameters, restored in place after every update.

    It holds options only; what it keeps of a parameter stands in the parameter's state dictionary.
    """

    @abstractmethod
    def holds_for(self, parameter: Tensor, role: str) -> bool:
        """True if the parameter is constrained.

        Args:
            parameter: any parameter.
            role: ``"hidden"``, ``"first"``, ``"last"``, ``"only"``, ``"embedding"`` or
                ``"vector"``.
        """

    @abstractmethod
    def prepare(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Notes at construction what is needed of one parameter; changes nothing."""

    @abstractmethod
    def apply(self, parameters: list[Tensor], states: list[dict[str, Any]]) -> None:
        """Brings the parameters back, in place, where they have left."""
