"""The nudging strength: a number, or a share of the chain's gain."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from mep.settling import CONVERGED

__all__ = ["AutoBeta", "Easing", "check_beta", "strength_of"]

_log = logging.getLogger("mep")


@dataclass(frozen=True)
class AutoBeta:
    """``beta = c / kappa``: the output moves by about ``c`` times the cost's gradient.

    ``kappa = sum_i ||e_i||^2 / ||e_L||^2`` comes from the first backward sweep of the batch; it is
    the number of layers in an isometric chain.

    Args:
        c: relative nudge, > 0. ``beta="auto"`` is ``AutoBeta(0.05)``.
        back_off: whether an optimizer's next nudge gives way where a batch has not settled. What
            sweeps leave unsettled is the share of the curvature in the nudge: a residual above 1
            says that no number of them would do, and half the nudge leaves half of it.

    Raises:
        ValueError: if ``c`` is not a positive finite number.

    >>> AutoBeta(c=0.5)
    AutoBeta(c=0.5, back_off=False)

    Source: this library's own; the gain follows from the equilibrium equations, see the README.
    """

    c: float = 0.05
    back_off: bool = False

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
    """A nudge that gives way, where it was asked to or settling is judged only after the update.

    Attributes:
        factor: on the nudging strength; halved after a batch that has not settled, restored by a
            tenth after one that has. In [2^-10, 1].

    >>> easing = Easing()
    >>> easing.learn("not settled")
    >>> easing.eased(AutoBeta(0.05))
    AutoBeta(c=0.025, back_off=False)
    """

    factor: float = 1.0

    def eased(self, beta: float | AutoBeta) -> float | AutoBeta:
        """Returns the strength for the next batch."""
        if isinstance(beta, AutoBeta):
            return replace(beta, c=beta.c * self.factor)
        return beta * self.factor

    def learn(self, status: str) -> None:
        """Takes note of how a batch has settled."""
        if status == CONVERGED:
            self.factor = min(1.0, self.factor * 1.1)
            return
        self.factor = max(2**-10, self.factor / 2)
        _log.info("%s: the next nudge is eased to %.2g of what it was to be", status, self.factor)


def strength_of(beta: float | AutoBeta, gain: Callable[[], float]) -> float:
    """Returns the nudging strength for one batch, whose gain ``kappa`` is asked for if needed."""
    return beta.c / gain() if isinstance(beta, AutoBeta) else beta
