"""The free phase of one batch, and what follows from it to first order in the nudge."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mep.blocks import Block, Chain
from mep.energies.costs import Cost
from mep.settling import Messages

__all__ = ["FreePhase", "product", "usable_gain"]


def product(block: Block, point: Any, e: Tensor, feedback: Mapping[int, Tensor] | None) -> Tensor:
    """Returns a block's ``W^T e``, or ``B^T e`` where it has feedback of its own."""
    other = feedback.get(id(block.feedback_weight)) if feedback else None
    return block.product(point, e) if other is None else block.product_through(point, e, other)


def usable_gain(gain: float, blocks: int) -> float:
    """Returns a gain to divide by: that of an isometric chain where the measured one is none.

    There is nothing to learn from such a batch, or an overflow that settling will report.
    """
    return gain if math.isfinite(gain) and gain > 0 else float(blocks)


class FreePhase:
    """The free equilibrium of a chain at one batch: the forward pass, exactly.

    Args:
        chain: the chain.
        x: input, shape ``(B, *in)``.
        target: target as the cost takes it.
        cost: the cost.
        feedback: by the ``id`` of a block's weight, the matrix that carries errors down in its
            place (learning without weight transport); empty for the weights' own transposes.

    Raises:
        TypeError, ValueError: if input or target do not fit; nothing has changed then.

    Attributes:
        states: ``s_1 ... s_L``.
        points: every block's point at its free input.
        target: the prepared target.
        loss: cost per sample, shape ``(B,)``.
    """

    def __init__(
        self,
        chain: Chain,
        x: Tensor,
        target: Tensor,
        cost: Cost,
        feedback: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.chain = chain
        self.cost = cost
        self.feedback = feedback
        self.states, self.points = chain.free(x)
        self.target = cost.prepare(target, self.states[-1])
        self.loss = cost.value(self.states[-1], self.target)

    def product(self, i: int, point: Any, e: Tensor) -> Tensor:
        """Returns block ``i``'s ``W^T e``, or ``B^T e`` where it has feedback of its own."""
        return product(self.chain.blocks[i], point, e, self.feedback)

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
        for i in reversed(range(1, len(self.points))):
            products.append(self.product(i, self.points[i], e))
            e = self.chain.blocks[i].pull(self.points[i], products[-1])
            errors.append(e)
            norms.append(torch.linalg.vector_norm(e))  # while it is in the cache
        return Messages(errors[::-1], products[::-1]), norms

    @property
    def sound(self) -> bool:
        """True if loss and errors are finite."""
        return math.isfinite(float(self.loss.sum() + torch.stack(self._swept[1]).sum()))

    def descend(self, e: Tensor) -> list[Tensor]:
        """Returns the errors ``e_1 ... e_L`` that any error of the output sends down."""
        errors = [e]
        for i in reversed(range(1, len(self.points))):
            product = self.product(i, self.points[i], errors[-1])
            errors.append(self.chain.blocks[i].pull(self.points[i], product))
        return errors[::-1]

    @cached_property
    def gain(self) -> float:
        """``kappa = sum_i ||e_i||^2 / ||e_L||^2``: how much every layer's move adds up."""
        norms = torch.stack(self._swept[1])
        return usable_gain(float((norms / norms[0]).square_().sum()), len(norms))

    def commit(self) -> None:
        """Makes the free phase's running statistics permanent: once per step."""
        for block, point in zip(self.chain.blocks, self.points, strict=True):
            block.commit(point)
