"""Synaptic intelligence: what a weight has contributed to a task's loss, gathered on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mep.continual import diagonal
from mep.continual.fisher import Sweeps
from mep.continual.penalty import Penalty, memory_of

__all__ = ["SynapticIntelligence"]


class SynapticIntelligence(Penalty):
    """``lam sum Omega (theta - theta*)^2``, ``Omega = sum_t max(0, omega_t) / (Delta_t^2 + xi)``.

    ``omega = -sum g dtheta`` over a task's updates is the part of the loss's fall that a weight
    has brought about, ``Delta`` its way in the task; ``theta*`` is the latest optimum. Gradients
    are those of the loss alone, clipped if the optimizer clips. Needs no data at the end of a task:
    ``opt.consolidate()``.

    Args:
        lam: strength, >= 0.
        xi: damping, > 0: what a weight that has hardly moved is divided by.

    Raises:
        TypeError, ValueError: if a number is out of range.

    >>> SynapticIntelligence(0.1)
    SynapticIntelligence(lam=0.1, xi=0.1)

    Source: Zenke, Poole & Ganguli 2017, eqs. 3-5.
    """

    def __init__(self, lam: float, xi: float = 0.1) -> None:
        super().__init__(lam)
        if not (xi > 0 and math.isfinite(xi)):
            raise ValueError(
                f"`SynapticIntelligence(xi=...)` must be a finite number > 0, got {xi}"
            )
        self.xi = float(xi)

    def __repr__(self) -> str:
        return f"SynapticIntelligence(lam={self.lam}, xi={self.xi})"

    def pull(self, parameter: Tensor, memory: dict[str, Any], step: float) -> None:
        diagonal.pull(parameter, memory, 2 * step * self.lam)

    def gradient(self, parameter: Tensor, memory: dict[str, Any]) -> Tensor:
        return diagonal.gradient(parameter, memory, 2 * self.lam)

    def value(self, parameter: Tensor, memory: dict[str, Any]) -> Tensor:
        return diagonal.value(parameter, memory, 2 * self.lam)

    def watch(self, parameters: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> list[Tensor]:
        for p, state in zip(parameters, states, strict=True):
            known = state.setdefault("penalty", {})
            if "path" not in known:
                known["path"], known["start"] = torch.zeros_like(p), p.detach().clone()
        return [p.detach().clone() for p in parameters]

    def learned(
        self,
        parameters: Sequence[Tensor],
        before: list[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
    ) -> None:
        for p, old, g, state in zip(parameters, before, gradients, states, strict=True):
            state["penalty"]["path"].addcmul_(g, old.sub_(p))

    def remember(
        self,
        parameters: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        task: Callable[[], Iterator[tuple[int, Sweeps]]] | None,
    ) -> None:
        if task is not None:
            raise ValueError(
                "SynapticIntelligence gathers its memory during the updates: consolidate() "
                "without a loader"
            )
        found = []
        for p, state in zip(parameters, states, strict=True):
            known, memory = state.get("penalty") or {}, memory_of(state)
            if "path" not in known:  # never updated
                found.append(known)
                continue
            importance = known["path"].clamp(min=0) / ((p - known["start"]).square_() + self.xi)
            if memory is not None:
                importance += memory["curvature"]
            found.append(diagonal.replace(importance, p.detach()))
        sizes = [memory["curvature"].sum() for memory in found if "curvature" in memory]
        total = float(torch.stack(sizes).sum()) if sizes else 0.0
        if not (total > 0 and math.isfinite(total)):
            raise ValueError(
                f"the updates since the last task have gathered no importance (its sum is {total}),"
                " and so the penalty would stay zero: take steps before consolidate()"
            )
        for state, memory in zip(states, found, strict=True):
            if memory:
                state["penalty"] = memory
