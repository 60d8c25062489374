"""Routing: matrices to one rule, everything else to another."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mep.updates.rule import Role, Rule
from mep.updates.sgd import SGD

__all__ = ["Route"]


@dataclass(frozen=True)
class Route(Rule):
    """Sends every parameter to the rule that can treat it.

    Hidden matrices and convolution kernels go to the matrix rule; embeddings, biases and
    normalisations to the vector rule, and so do the first and last layer if asked. First and last
    are meant in the order of the parameters; embeddings are known by their module, for which the
    optimizer needs the model.

    Args:
        matrix: rule for matrices and kernels, or a further ``Route`` among them.
        vector: rule for all others.
        first: True sends the first layer's matrix to the vector rule.
        last: True sends the last layer's matrix to the vector rule.
        vector_lr: factor on the learning rate under the vector rule, >= 0.
        at_least: smallest number of entries for which a matrix goes to the matrix rule; smaller
            ones go to the vector rule.

    Raises:
        TypeError, ValueError: if an option does not fit.

    >>> from mep.updates.muon import Muon
    >>> Route(Muon(), last=True).vector
    SGD(decoupled=False)

    Source: Jordan et al. 2024, "which parameters".
    """

    matrix: Rule
    vector: Rule = field(default_factory=SGD)
    first: bool = False
    last: bool = False
    vector_lr: float = 1.0
    at_least: int = 0

    def __post_init__(self) -> None:
        for name in ("matrix", "vector"):
            if not isinstance(getattr(self, name), Rule):
                raise TypeError(
                    f"`Route({name}=...)` must be an update rule such as mep.SGD(), "
                    f"got {getattr(self, name)!r}"
                )
        if not (self.vector_lr >= 0 and math.isfinite(self.vector_lr)):
            raise ValueError(
                f"`Route(vector_lr=...)` must be a finite number >= 0, got {self.vector_lr}"
            )
        if not isinstance(self.at_least, int) or self.at_least < 0:
            raise ValueError(
                f"`Route(at_least=...)` must be a whole number >= 0, got {self.at_least!r}"
            )

    def check(self, group: dict[str, Any]) -> None:
        self.matrix.check(group)
        self.vector.check(group)

    def parts(self) -> list[Rule]:
        """Returns the rules that take the steps, of both sides."""
        return [*self.matrix.parts(), *self.vector.parts()]

    def assign(self, parameter: Tensor, role: Role) -> tuple[Rule, float] | None:
        plain = role in ("vector", "embedding") or parameter.numel() < self.at_least
        ends = {"first": self.first, "last": self.last, "only": self.first or self.last}
        if plain or ends.get(role, False):
            found = self.vector.assign(parameter, role)
            return found and (found[0], found[1] * self.vector_lr)
        return self.matrix.assign(parameter, role)

    def step(
        self,
        parameters: list[Tensor],
        gradients: list[Any],
        states: list[dict[str, Any]],
        group: dict[str, Any],
    ) -> None:
        raise AssertionError("a route assigns rules; it takes no step itself")
