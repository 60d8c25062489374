"""Natural gradient: preconditioning by Kronecker factors of the Fisher information."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mep.curvature import Signal, kronecker_factors
from mep.updates.rule import MatrixRule, refuse_nesterov

__all__ = ["Natural"]

FISHERS = ("empirical", "true")

# Mean curvature below this is rounding, not knowledge: the errors of a net that fits its batch.
FLOOR = 1e-10


@dataclass(frozen=True)
class Natural(MatrixRule):
    """``m <- mu m + nu G^-1 g A^-1``; ``theta <- (1 - lr lambda) theta - lr m``.

    ``A`` and ``G`` are running averages of the weight's Kronecker factors, from local signals at
    the free equilibrium. Damping is relative to the mean curvature: ``A + sqrt(d) (tr A / n) I``,
    the same for ``G``; a mean curvature below 1e-10 counts as 1e-10. ``nu <= 1`` keeps the step's
    predicted change of the model's output distribution,
    ``(lr / (1 - mu))^2 nu^2 sum <g, G^-1 g A^-1>``, below a limit, the sum running over the
    matrices of one parameter group (of one block, if updates go block by block). Decay is
    decoupled.

    Group numbers: ``lr``, ``lr_scale``, ``momentum``, ``weight_decay``.

    Args:
        damping: ``d`` >= 0, relative.
        decay: of the running averages, in [0, 1); 0 takes the last batch alone.
        refresh: steps from one look at the signals (and inversion) to the next, >= 1.
        fisher: ``"empirical"``: errors of the given targets, which EP has at no cost; ``"true"``:
            the exact expectation over the model's own targets, one backward sweep per output.
        limit: largest predicted change of a step in one parameter group, > 0; None for no limit.

    Raises:
        ValueError: if an option is out of range.

    >>> Natural(refresh=1).wants_curvature([{}])
    'empirical'

    Source: Amari 1998; Martens & Grosse 2015 (factors, damping); Ba et al. 2017 (limit).
    """

    observes: ClassVar[bool] = True

    damping: float = 0.3
    decay: float = 0.95
    refresh: int = 10
    fisher: str = "empirical"
    limit: float | None = 1e-2

    def __post_init__(self) -> None:
        if not (self.damping >= 0 and math.isfinite(self.damping)):
            raise ValueError(
                f"`Natural(damping=...)` must be a finite number >= 0, got {self.damping}"
            )
        if not 0 <= self.decay < 1:
            raise ValueError(f"`Natural(decay=...)` must be in [0, 1), got {self.decay}")
        if not isinstance(self.refresh, int) or self.refresh < 1:
            raise ValueError(
                f"`Natural(refresh=...)` must be a whole number >= 1, got {self.refresh!r}"
            )
        if self.fisher not in FISHERS:
            raise ValueError(f"`Natural(fisher=...)` must be one of {FISHERS}, got {self.fisher!r}")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"`Natural(limit=...)` must be > 0 or None, got {self.limit}")

    def wants_curvature(self, states: list[dict[str, Any]]) -> str | None:
        due = any(state.get("age", 0) % self.refresh == 0 for state in states)
        return self.fisher if due else None

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        refuse_nesterov(self, group)

    def observe(self, signals: list[Signal], state: dict[str, Any]) -> bool:
        found = kronecker_factors(signals)
        if not all(bool(torch.isfinite(factor).all()) for factor in found):
            return False
        state["curvature"] = 1.0
        for name, factor in zip(("activity", "error"), found, strict=True):
            known = state.get(f"{name}_factor")
            if known is not None:
                factor = known.lerp_(factor.to(known), 1 - self.decay)
            state[f"{name}_factor"] = factor
            size = float(factor.diagonal().mean())
            # Its own size is kept apart: that of a fitted net has no inverse in float32.
            state["curvature"] *= size
            whole = factor / size if size > 0 else factor
            state[f"{name}_inverse"] = _inverse(whole, math.sqrt(self.damping))
        return True

    def step(
        self,
        parameters: list[Tensor],
        gradients: list[Any],
        states: list[dict[str, Any]],
        group: dict[str, Any],
    ) -> None:
        lr = float(group["lr"] * group["lr_scale"])
        steps = [
            torch.linalg.multi_dot(
                (state["error_inverse"], g.flatten(1), state["activity_inverse"])
            ).view_as(g)
            for g, state in zip(gradients, states, strict=True)
        ]
        sizes = self._sizes(lr / (1 - group["momentum"]), gradients, steps, states)
        for parameter, change, size, state in zip(parameters, steps, sizes, states, strict=True):
            state["age"] = state.get("age", 0) + 1
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            momentum = state["momentum_buffer"].mul_(group["momentum"])
            momentum.add_(change, alpha=size)
            parameter.mul_(1 - lr * group["weight_decay"]).add_(momentum, alpha=-lr)

    def _sizes(
        self,
        lr: float,
        gradients: list[Tensor],
        steps: list[Tensor],
        states: list[dict[str, Any]],
    ) -> list[float]:
        """Factors on the steps: the inverse of the curvature's own size, times ``nu``."""
        sizes = [1 / max(state["curvature"], FLOOR) for state in states]
        slopes = [float((g * s).sum()) for g, s in zip(gradients, steps, strict=True)]
        change = lr**2 * sum(s * slope for s, slope in zip(sizes, slopes, strict=True))
        if self.limit is not None and change > self.limit:
            sizes = [size * math.sqrt(self.limit / change) for size in sizes]
        return sizes


def _inverse(factor: Tensor, damping: float) -> Tensor:
    """Inverse of a positive matrix of mean diagonal 1, damped."""
    wide = factor.to(torch.promote_types(factor.dtype, torch.float32))
    lower, failed = torch.linalg.cholesky_ex(wide + damping * torch.eye(len(wide)).to(wide))
    if failed or damping == 0:  # perhaps without full rank: directions never seen stay as they are
        return torch.linalg.pinv(wide, hermitian=True).to(factor)
    return torch.cholesky_inverse(lower).to(factor)
