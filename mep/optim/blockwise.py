"""Updates on the way: every block steps as soon as the nudged sweep has passed it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from torch import Tensor

from mep.contrast import Easing, Estimate, Settings, contrast_blockwise
from mep.curvature import Signal
from mep.energies import FreePhase
from mep.optim.gradients import Gradients

__all__ = ["by_block"]


def by_block(
    free: FreePhase,
    how: Settings,
    easing: Easing,
    factored: Collection[int],
    update: Callable[[Gradients, list[Tensor]], None],
) -> tuple[Estimate, bool]:
    """Hands every block's gradients to ``update``, and gives their memory back.

    Args:
        free: the free phase of a batch.
        how: the strategy.
        easing: what earlier batches say of the nudge; learns from this one.
        factored: ids of parameters whose gradients stay factors.
        update: takes the gradients of one block and its parameters; not called for a block of
            which some are not finite.

    Returns:
        The estimate, and whether every block was updated.
    """
    finite: list[bool] = []

    def take_step(signals: list[Signal]) -> None:
        gradients = Gradients(factored)
        for signal in signals:
            gradients.collect(signal)
        finite.append(gradients.finite())
        if finite[-1]:
            update(gradients, list(dict.fromkeys(signal.parameter for signal in signals)))
        gradients.release()

    found = contrast_blockwise(free, replace(how, beta=easing.eased(how.beta)), take_step)
    easing.learn(found.status)
    if any(finite):
        free.commit()
    return found, bool(finite) and all(finite)
