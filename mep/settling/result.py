"""What settling returns: residuals, a verdict, and the configuration it ended in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["CONVERGED", "DIVERGED", "LIMIT", "NOT_SETTLED", "Measured", "Residual", "Settled"]

CONVERGED, NOT_SETTLED, DIVERGED, LIMIT = "converged", "not settled", "diverged", "limit"


@dataclass(frozen=True)
class Residual:
    """How far every sample is from equilibrium: ``||dF/ds|| / ||beta dC/ds_L||``, dimensionless.

    Attributes:
        per_sample: shape ``(B,)``; 0 where the nudge vanishes and nothing else has to settle.
        nudge: the nudge's norm, shape ``(B,)``, in a unit of the problem's own: what samples weigh
            in the aggregate. That of the states where there is no nudge.
    """

    per_sample: Tensor
    nudge: Tensor

    @classmethod
    def of(cls, force: Tensor, nudge: Tensor) -> Residual:
        """Returns the residual of forces and nudges, norms per sample in the same unit."""
        return cls((force / nudge).masked_fill_(nudge == 0, 0.0), nudge)

    @property
    def total(self) -> float:
        """Sum over all samples: not finite if one of them is not."""
        return float(self.per_sample.sum())


class Measured:
    """Mixin of everything that carries a ``balance``: the figures a reader wants of it."""

    balance: Residual

    @property
    def residual(self) -> Tensor:
        """Residual per sample, shape ``(B,)``, dimensionless."""
        return self.balance.per_sample

    @property
    def median(self) -> float:
        """Median residual over the batch: what a tolerance is compared with."""
        return float(self.residual.median())

    @property
    def q95(self) -> float:
        """95 % quantile of the residual over the batch."""
        return float(self.residual.double().quantile(0.95))

    @property
    def aggregate(self) -> float:
        """``sqrt(sum ||r_n||^2 / sum ||beta dC_n||^2)``: samples weigh by their nudge."""
        # By the largest first: squares of small nudges underflow in float32.
        weight = self.balance.nudge.double() / self.balance.nudge.max().clamp(min=1e-300)
        total = weight.square().sum()
        return float(((weight * self.residual).square().sum() / total).sqrt()) if total > 0 else 0.0


@dataclass(frozen=True)
class Settled(Measured):
    """The end of one settling.

    Attributes:
        configuration: the displaced states and errors (what contrast reads).
        balance: residuals at the end.
        steps: steps or sweeps taken.
        status: ``"converged"``, ``"not settled"``, ``"diverged"`` or ``"limit"``.
        history: what the solver measures of the residual, the median usually, before the first
            step (NaN if it has not looked) and after every one.
    """

    configuration: Any
    balance: Residual
    steps: int
    status: str
    history: list[float]

    @property
    def states(self) -> list[Tensor]:
        """The settled states ``s_1 ... s_L``, each ``(B, *units)``."""
        return self.configuration.states

    @property
    def displacements(self) -> list[Tensor]:
        """Displacements from the free states, free of rounding. They may share memory."""
        return self.configuration.displacements

    @property
    def converged(self) -> bool:
        """True if the median residual reached the tolerance."""
        return self.status == CONVERGED
