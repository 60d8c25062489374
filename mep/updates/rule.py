"""What an update rule is: numbers from a parameter group, gradients in, parameters changed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

__all__ = ["Rule"]


class Rule(ABC):
    """An update rule. It knows nothing of how gradients were obtained.

    A rule holds no numbers: everything a scheduler may change stands in the parameter group.
    """

    @abstractmethod
    def check(self, group: dict[str, Any]) -> None:
        """Refuses a group with nonsense in it.

        Raises:
            TypeError, ValueError: naming the number and its range.
        """

    @abstractmethod
    def step(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        states: list[dict[str, Any]],
        group: dict[str, Any],
    ) -> None:
        """Changes the parameters in place.

        Args:
            parameters: of one group, those that have a gradient.
            gradients: of the same shapes; may be overwritten.
            states: one dictionary per parameter, kept from step to step.
            group: the numbers: ``lr`` and what else the rule reads.
        """
