"""Local signals at the free equilibrium, where they are exact: what curvature is made of."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from mep.contrast.mixed import owned
from mep.curvature import Signal
from mep.energies import FreePhase

__all__ = ["free_signals", "free_sweeps"]


@torch.no_grad()
def free_signals(
    free: FreePhase, targets: str, samples: int | None = None
) -> dict[int, list[Signal]]:
    """Returns every parameter's signals whose squares, summed, are its Fisher information.

    Those of all ``free_sweeps``, by the ``id`` of the parameter: one signal per direction and place
    in the model.
    """
    found: dict[int, list[Signal]] = defaultdict(list)
    for sweep in free_sweeps(free, targets, samples):
        for key, signals in sweep.items():
            found[key] += signals
    return found


@torch.no_grad()
def free_sweeps(
    free: FreePhase, targets: str, samples: int | None = None
) -> Iterator[dict[int, list[Signal]]]:
    """Yields, direction by direction, the signals whose squares make up the Fisher information.

    ``F_i = E_n sum_k g_nk g_nk^T`` with ``g_nk`` the gradient of sample ``n`` along direction
    ``k`` of the cost's gradient. With ``"empirical"`` there is one direction, that of the given
    targets, and the signals are those of the backward sweep that EP takes anyway. With ``"true"``
    there is one per output: the exact expectation over targets that the model itself draws; or
    one per drawn target, if ``samples`` says how many to draw.

    Args:
        free: the free phase of a batch.
        targets: ``"empirical"`` or ``"true"``.
        samples: targets to draw for every input, >= 1; None for the exact expectation.

    Yields:
        By the ``id`` of the parameter, one signal per place in the model. The sign of a direction
        is arbitrary; only squares are meant to be taken.

    Raises:
        ValueError: if ``targets`` is another word, or the exact expectation does not exist for the
            cost and the shape of the output.

    Source: Martens 2020, sec. 5; Kunstner et al. 2019 (the two are not the same).
    """
    for errors in _sweeps(free, targets, samples):
        found: dict[int, list[Signal]] = defaultdict(list)
        for block, point, e in zip(free.chain, free.points, errors, strict=True):
            for signal in block.signals(point, e, 1 / len(free.loss)):
                own = owned(free, signal)
                found[id(own.parameter)].append(own)
        yield found


def _sweeps(free: FreePhase, targets: str, samples: int | None) -> Iterator[list[Tensor]]:
    if targets not in ("empirical", "true"):
        raise ValueError(f"`targets` must be 'empirical' or 'true', got {targets!r}")
    if not isinstance(free, FreePhase):
        raise ValueError(
            "curvature is read off the backward sweep of mep.PredictionError(), which an energy of "
            "symmetric couplings does not have: use a penalty or rule that takes none"
        )
    if targets == "empirical":
        yield free.unit.errors
        return
    output = free.states[-1]
    if samples is None:
        directions = free.cost.directions(output)
    else:
        directions = (free.cost.drawn(output) / math.sqrt(samples) for _ in range(samples))
    for direction in directions:
        yield free.descend(direction)
