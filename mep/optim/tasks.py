"""The end of a task: what the penalty is, and how it comes to remember."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mep.continual import EWC, Penalty
from mep.continual.fisher import Loader, of_task
from mep.contrast import Settings
from mep.contrast.mixed import full

__all__ = ["consolidate", "penalty_of"]


def penalty_of(penalty: Penalty | None, ewc_lambda: float | None) -> Penalty | None:
    """Returns the penalty that two arguments ask for.

    Raises:
        ValueError: if both are given, or the number is out of range.
    """
    if ewc_lambda is None:
        return penalty
    if penalty is not None:
        raise ValueError("`ewc_lambda=` stands for penalty=mep.EWC(lam): give one of the two")
    return EWC(ewc_lambda)


def consolidate(
    penalty: Penalty | None,
    model: nn.Module | None,
    parameters: Sequence[Tensor],
    states: Mapping[Tensor, dict[str, Any]],
    loader: Loader | None,
    how: Settings,
) -> None:
    """Adds a finished task to the memories of the parameters that are trained.

    Raises:
        ValueError: if there is no penalty, no model, or nothing to remember.
    """
    if penalty is None:
        raise ValueError(
            "there is no penalty to consolidate: EPOptimizer(..., penalty=mep.EWC(lam))"
        )
    task = None
    if loader is not None:
        if model is None:
            raise ValueError("`consolidate(loader)` needs EPOptimizer(..., model=model)")
        fisher, samples = getattr(penalty, "fisher", "empirical"), getattr(penalty, "samples", None)
        task = lambda: of_task(model, loader, how, fisher, samples)  # noqa: E731
    own = [p for p in parameters if p.requires_grad]
    with torch.no_grad(), full(parameters[0].device):
        penalty.remember(own, [states[p] for p in own], task)
