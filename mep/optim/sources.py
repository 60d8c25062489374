"""Where a batch's gradients come from: a contrast, or torch's own backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mep.contrast import Estimate, Settings, contrast, free_phase
from mep.contrast.mixed import full
from mep.contrast.phases import check_input
from mep.energies import FreePhase
from mep.optim.gradients import Gradients
from mep.settling import DIVERGED

__all__ = ["Batch", "by_backprop", "by_contrast"]


@dataclass
class Batch:
    """What one batch has given.

    Attributes:
        loss: batch mean of the cost, a scalar tensor.
        gradients: of all parameters.
        usable: whether an update may be made.
        keep_statistics: to be told whether one was made: running statistics move only then.
        free: the free phase, where there is one.
        estimate: what EP found, None for backprop.
    """

    loss: Tensor
    gradients: Gradients
    usable: bool
    keep_statistics: Callable[[bool], None]
    free: FreePhase | None
    estimate: Estimate | None = None


def by_contrast(free: FreePhase, how: Settings, gradients: Gradients) -> Batch:
    """Settles and contrasts; the gradients are collected."""
    found = contrast(free, how, gradients.collect)
    keep = lambda taken: free.commit() if taken else None  # noqa: E731
    return Batch(found.loss, gradients, found.status != DIVERGED, keep, free, found)


def by_backprop(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    how: Settings,
    owned: Sequence[Tensor],
    *,
    with_free: bool,
) -> Batch:
    """Runs the model and torch's backward; ``with_free`` adds a free phase for local signals."""
    check_input(model, x)
    buffers = [(b, b.clone()) for b in model.buffers()]

    def keep_statistics(taken: bool) -> None:
        """Neither bad input nor a skipped update moves a running statistic."""
        for buffer, before in buffers if not taken else ():
            buffer.data.copy_(before)

    wanted = [p for p in owned if p.requires_grad]
    try:
        with full(x.device):
            free = free_phase(model, x, target, how) if with_free else None
        with torch.enable_grad():
            loss = how.cost.mean(model(x), target)
            found = torch.autograd.grad(loss, wanted, allow_unused=True) if wanted else ()
    except Exception:
        keep_statistics(False)
        raise
    gradients = Gradients()
    for p, g in zip(wanted, found, strict=True):
        if g is not None:
            gradients.put(p, g)
    return Batch(loss.detach(), gradients, math.isfinite(loss.item()), keep_statistics, free)
