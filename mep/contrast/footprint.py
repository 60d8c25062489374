"""What the blocks of a chain take in memory, measured on a batch's shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mep.blocks import Block, Chain, random_state, replayed
from mep.curvature import Signal
from mep.memory import Footprint, Update, track

__all__ = ["footprints", "standing"]

Measure = Callable[[track, Block, Callable[[], list[Signal]]], Update]


@torch.no_grad()
def footprints(chain: Chain, x: Tensor, measure: Measure) -> list[Footprint]:
    """Measures the blocks of a chain, once per kind and shape, on zeros but for the input.

    Parameters, buffers and torch's random state are as they were.

    Args:
        chain: the chain.
        x: a checked input, ``(B, *in)``.
        measure: a tracker, a block and a function that returns its signals -> what the block's
            update takes.

    Raises:
        ValueError: if the input does not fit.
    """
    known: dict[Any, tuple[Footprint, Tensor]] = {}
    found, s = [], x
    with replayed(random_state(x.device), x.device):
        for block in chain:
            key = _kind(block), tuple(s.shape), s.dtype
            if key not in known:
                known[key] = _measured(chain, block, s, x, measure)
            footprint, s = known[key]
            found.append(footprint)
    return found


def standing(x: Tensor, target: Tensor, output: int) -> int:
    """Returns the bytes that a step takes all the time: the batch, and what it says of the output.

    Args:
        x: input.
        target: target.
        output: bytes of the last state; there are its error, its displacement and two gradients.
    """
    return x.nbytes + target.nbytes + 5 * output + 8 * 4 * len(x)


def _kind(block: Block) -> tuple:
    """What blocks of one memory have in common."""
    parameters = tuple((tuple(p.shape), p.requires_grad) for p in block.parameters())
    modes = tuple(m.training for top in block.modules for m in top.modules())
    return type(block), repr(block.modules), parameters, modes


def _measured(
    chain: Chain, block: Block, s: Tensor, x: Tensor, measure: Measure
) -> tuple[Footprint, Tensor]:
    tracker = track()
    with tracker:
        for known in (s, *block.parameters()):
            tracker.label(known, "parameters")
        f, point = block.predict_checked(s, x)
        kept, work = tracker.live, tracker.most - tracker.live
        state = f.nbytes if kept else 0
        e = torch.zeros_like(f)
        product, pull = 0, work
        if s is not x:  # the first is neither pulled through nor advanced
            d, below = torch.zeros_like(s), torch.zeros_like(s)
            before = tracker.reset()
            down = block.product(point, e)
            product = tracker.live - before
            block.pull(point, down)
            work = max(work, tracker.most - before - product)
            pull = work
            before = tracker.reset()
            block.advance(point, d, down, below)
            work = max(work, tracker.most - before + d.nbytes)
        update = measure(tracker, block, lambda: list(block.signals(point, e, 1.0)))
    norms = 2 * (len(x) + 1) * f.element_size()  # as a list, and stacked
    footprint = Footprint(state, max(0, kept - state), product, work, norms, update, pull)
    return footprint, torch.zeros_like(f)
