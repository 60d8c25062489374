"""What an update rule is: numbers from a parameter group, gradients in, parameters changed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from torch import Tensor

from mep.curvature import Factors, Signal

__all__ = ["Gradient", "MatrixRule", "Role", "Rule", "check_numbers", "refuse_nesterov"]

Gradient = Tensor | Factors

Role = Literal["hidden", "first", "last", "only", "embedding", "vector"]
"""What a parameter is to the model: a matrix or kernel between the first and the last, one of these
two, or both at once, an embedding's table, or anything of less than two dimensions (biases,
normalisations)."""


class Rule(ABC):
    """An update rule. It knows nothing of how gradients were obtained.

    A rule holds options that shape the computation and no state; everything a scheduler may change
    stands in the parameter group, everything kept for a parameter in its state dictionary.

    Attributes:
        observes: True if the rule asks to observe local signals, by ``wants_curvature``.
        takes_factors: True if the rule would always rather have gradients as ``Factors``.
        batches: True if the rule treats parameters of one shape together, which is faster.
    """

    observes: ClassVar[bool] = False
    takes_factors: ClassVar[bool] = False
    batches: ClassVar[bool] = False

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
        gradients: list[Any],
        states: list[dict[str, Any]],
        group: dict[str, Any],
    ) -> None:
        """Changes the parameters in place.

        Args:
            parameters: of one group, those that have a gradient.
            gradients: of the same shapes, not to be changed: they may be the user's own. Tensors,
                or ``Factors`` where the rule takes them and the gradient's source has them.
            states: one dictionary per parameter, kept from step to step.
            group: the numbers: ``lr`` and what else the rule reads.
        """

    def effective_step(self, group: dict[str, Any]) -> float | None:
        """Returns ``eta`` of the step ``-eta g`` that a lasting gradient ends up in.

        None for a rule whose steps are no multiple of the gradient: what else shall move a
        parameter must then go through the rule.
        """
        return None

    def parts(self) -> list[Rule]:
        """Returns the rules that take the steps: this one."""
        return [self]

    def assign(self, parameter: Tensor, role: Role) -> tuple[Rule, float] | None:
        """Returns the rule for one parameter and a factor on its learning rate.

        None if there is no rule for it: the parameter is refused then, by name.
        """
        return self, 1.0

    def folds(self, parameter: Tensor) -> bool:
        """Returns whether ``Factors`` save the rule from forming a parameter's gradient.

        They are sent then, unless something else reads the gradient.
        """
        return self.takes_factors

    def wants_curvature(self, states: list[dict[str, Any]]) -> str | None:
        """Returns which local signals the rule asks to observe before its next step.

        ``"empirical"`` (errors of the given targets), ``"true"`` (expectation over the model's own
        targets) or None.
        """
        return None

    def observe(self, signals: list[Signal], state: dict[str, Any]) -> bool:
        """Takes note of one parameter's signals, those that ``wants_curvature`` asked for.

        Returns whether they could be used: False if something overflowed; nothing is noted then.
        """
        raise AssertionError("a rule that asks for signals must observe them")


class MatrixRule(Rule):
    """A rule for matrices and convolution kernels, which count as matrices ``(out, in)``."""

    def assign(self, parameter: Tensor, role: Role) -> tuple[Rule, float] | None:
        return None if parameter.dim() < 2 else (self, 1.0)

    def check(self, group: dict[str, Any]) -> None:
        check_numbers(group)


def refuse_nesterov(rule: Rule, group: dict[str, Any]) -> None:
    """Refuses Nesterov momentum for a rule that has none.

    Raises:
        ValueError: naming the rule.
    """
    if group["nesterov"]:
        raise ValueError(f"`nesterov` must be False with {type(rule).__name__}")


def check_numbers(group: dict[str, Any]) -> None:
    """Refuses learning rates, decay and momentum that are no such thing.

    Raises:
        TypeError, ValueError: naming the number and its range.
    """
    for name in ("lr", "lr_scale", "weight_decay"):
        if isinstance(group[name], bool) or not isinstance(group[name], (int, float, Tensor)):
            raise TypeError(f"`{name}` must be a number, got {group[name]!r}")
        if not (group[name] >= 0 and math.isfinite(group[name])):
            raise ValueError(f"`{name}` must be a finite number >= 0, got {group[name]}")
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"`momentum` must be in [0, 1), got {group['momentum']}")
