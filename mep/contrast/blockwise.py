"""The estimator that learns on the way: every block's signal goes out during the nudged sweep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mep.blocks import Chain
from mep.contrast.estimate import Estimate, refused, summary
from mep.contrast.settings import Settings
from mep.contrast.strength import strength_of
from mep.curvature import Signal
from mep.energies import FreePhase, PredictionError, Squared
from mep.memory import phase
from mep.settling import Sweep, settle

__all__ = ["check_blockwise", "contrast_blockwise"]


def check_blockwise(how: Settings, chain: Chain, option: str = "`blockwise=True`") -> None:
    """Refuses what cannot be updated block by block during one nudged sweep.

    Args:
        how: the strategy.
        chain: the chain.
        option: what asks for it, for messages.

    Raises:
        ValueError: naming the option and what it must be.
    """
    if not isinstance(how.energy, PredictionError) or not isinstance(how.energy.output, Squared):
        raise ValueError(
            f"{option} needs the squared error in every layer: use "
            f"energy=mep.PredictionError(), not {how.energy}"
        )
    if not isinstance(how.settler, Sweep) or how.settler.max_sweeps != 1:
        raise ValueError(
            f"{option} updates during the nudged sweep, of which there is one: use "
            f"settler=mep.Sweep(1), not {how.settler}"
        )
    if len(how.nodes(1.0)) != 1:
        raise ValueError(
            f"{option} has one nudged phase: use stencil=mep.one_sided, not "
            f"{getattr(how.stencil, '__name__', how.stencil)}"
        )
    seen: set[int] = set()
    for block in chain:
        own = {id(p) for p in block.parameters()}
        if own & seen:
            raise ValueError(
                f"{option}: block `{block.name}` shares a parameter with an earlier one, "
                "which would change before this block has used it; give each its own"
            )
        seen |= own


@torch.no_grad()
def contrast_blockwise(
    free: FreePhase, how: Settings, sink: Callable[[list[Signal]], None]
) -> Estimate:
    """Sends each block's signals as soon as the nudged sweep has passed it.

    The sink may change the block's parameters at once: the sweep does not come back. A loss or
    errors that are not finite are refused before the first signal.

    Args:
        free: the free phase of a batch.
        how: the strategy, which ``check_blockwise`` has passed.
        sink: receives all signals of one block at a time, from input to output.

    Returns:
        The estimate; ``"diverged"`` with infinite residuals if nothing was sent.
    """
    ((beta, weight),) = how.nodes(strength_of(how.beta, lambda: free.gain))
    scale = -weight * beta / len(free.loss)
    if not free.sound:
        return refused(free.loss, beta)

    def visit(i: int, point: Any, e: Tensor) -> None:
        with phase("mep: contrast"):
            sink(list(free.chain.blocks[i].signals(point, e, scale)))

    assert isinstance(how.energy, PredictionError), "checked by check_blockwise"
    problem = how.energy.nudged(free, beta)
    problem.visit = visit
    with phase("mep: settle"):
        settled = settle(problem, how.settler)
    return summary(free, [settled], [(beta, weight)])
