"""The nudging strength: a number, or a share of the chain's gain."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mep.settling import CONVERGED

__all__ = ["AutoBeta", "Easing", "check_beta", "strength_of"]


@dataclass(frozen=True)
class AutoBeta:
    """``beta = c / kappa``: the output moves by about ``c`` times the cost's gradient.

    ``kappa = sum_i ||e_i||^2 / ||e_L||^2`` comes from the first backward sweep of the batch; it is
    the number of layers in an isometric chain.

    Args:
        c: relative nudge, > 0. ``beta="auto"`` is ``AutoBeta(0.05)``.

    Raises:
        ValueError: if ``c`` is not a positive finite number.

    >>> AutoBeta(c=0.5)
    AutoBeta(c=0.5)

    Source: this library's own; the gain follows from the equilibrium equations, see the README.
    """

    c: float = 0.05

    def __post_init__(self) -> None:
        if not (self.c > 0 and math.isfinite(self.c)):
            raise ValueError(f"`AutoBeta(c=...)` must be a finite number > 0, got {self.c}")


def check_beta(beta: float | str | AutoBeta) -> float | AutoBeta:
    """Returns a valid strength: ``"auto"`` becomes ``AutoBeta()``.

    Raises:
        ValueError: if it is another string, zero, negative or not finite.
        TypeError: if it is of another kind.
    """
    if isinstance(beta, AutoBeta):
        return beta
    if beta == "auto":
        return AutoBeta()
    if isinstance(beta, str):
        raise ValueError(f"`beta` must be 'auto', a number > 0 or mep.AutoBeta(c), got {beta!r}")
    if isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise TypeError(f"`beta` must be 'auto', a number or mep.AutoBeta(c), got {beta!r}")
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"`beta` must be a finite number > 0, got {beta}")
    return float(beta)


@dataclass
class Easing:
    """A nudge that gives way where settling is judged only after the update.

    Attributes:
        factor: on the nudging strength; halved after a batch that has not settled, restored by a
            tenth after one that has. In [2^-10, 1].

    >>> easing = Easing()
    >>> easing.learn("not settled")
    >>> easing.eased(AutoBeta(0.05))
    AutoBeta(c=0.025)
    """

    factor: float = 1.0

    def eased(self, beta: float | AutoBeta) -> float | AutoBeta:
        """Returns the strength for the next batch."""
        if isinstance(beta, AutoBeta):
            return AutoBeta(beta.c * self.factor)
        return beta * self.factor

    def learn(self, status: str) -> None:
        """Takes note of how a batch has settled."""
        settled = status == CONVERGED
        self.factor = min(1.0, self.factor * 1.1) if settled else max(2**-10, self.factor / 2)


def strength_of(beta: float | AutoBeta, gain: Callable[[], float]) -> float:
    """Returns the nudging strength for one batch, whose gain ``kappa`` is asked for if needed."""
    return beta.c / gain() if isinstance(beta, AutoBeta) else beta
