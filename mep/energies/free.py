"""The free phase of one batch, and what follows from it to first order in the nudge."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from mep.blocks import Chain
from mep.energies.costs import Cost
from mep.settling import Messages

__all__ = ["FreePhase"]


class FreePhase:
    """The free equilibrium of a chain at one batch: the forward pass, exactly.

    Args:
        chain: the chain.
        x: input, shape ``(B, *in)``.
        target: target as the cost takes it.
        cost: the cost.

    Raises:
        TypeError, ValueError: if input or target do not fit; nothing has changed then.

    Attributes:
        states: ``s_1 ... s_L``.
        points: every block's point at its free input.
        target: the prepared target.
        loss: cost per sample, shape ``(B,)``.
    """

    def __init__(self, chain: Chain, x: Tensor, target: Tensor, cost: Cost) -> None:
        self.chain = chain
        self.cost = cost
        self.states, self.points = chain.free(x)
        self.target = cost.prepare(target, self.states[-1])
        self.loss = cost.value(self.states[-1], self.target)

    @cached_property
    def cost_gradient(self) -> Tensor:
        """``dC/ds_L`` at the free output."""
        return self.cost.gradient(self.states[-1], self.target)

    @property
    def unit(self) -> Messages:
        """The backward sweep at the free states, per unit of beta: from ``e_L = -dC/ds_L``."""
        return self._swept[0]

    @cached_property
    def _swept(self) -> tuple[Messages, list[Tensor]]:
        """The backward sweep and the norms of its errors, the output's first."""
        e = -self.cost_gradient
        errors, products, norms = [e], [], [torch.linalg.vector_norm(e)]
        for block, point in zip(self.chain.blocks[:0:-1], self.points[:0:-1], strict=True):
            products.append(block.product(point, e))
            e = block.pull(point, products[-1])
            errors.append(e)
            norms.append(torch.linalg.vector_norm(e))  # while it is in the cache
        return Messages(errors[::-1], products[::-1]), norms

    def descend(self, e: Tensor) -> list[Tensor]:
        """Returns the errors ``e_1 ... e_L`` that any error of the output sends down."""
        errors = [e]
        for block, point in zip(self.chain.blocks[:0:-1], self.points[:0:-1], strict=True):
            errors.append(block.pull(point, block.product(point, errors[-1])))
        return errors[::-1]

    @cached_property
    def gain(self) -> float:
        """``kappa = sum_i ||e_i||^2 / ||e_L||^2``: how much every layer's move adds up."""
        norms = torch.stack(self._swept[1])
        gain = float((norms / norms[0]).square_().sum())
        # Nothing to learn from this batch, or an overflow that settling will report: any will do.
        return gain if math.isfinite(gain) and gain > 0 else float(len(norms))

    def commit(self) -> None:
        """Makes the free phase's running statistics permanent: once per step."""
        for block, point in zip(self.chain.blocks, self.points, strict=True):
            block.commit(point)
