"""The free phase of one batch, and what follows from it to first order in the nudge."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mep.blocks import Chain, Feedback, product
from mep.energies.costs import Cost
from mep.settling import Messages, Settled

__all__ = ["FreePhase", "usable_gain"]


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
        cost_gradient: ``dC/ds_L`` at the free output.
        twin: of the model whose phase it is, in another type; None if it is that of the model.
    """

    twin: Any = None

    def __init__(
        self,
        chain: Chain,
        x: Tensor,
        target: Tensor,
        cost: Cost,
        feedback: Feedback = None,
    ) -> None:
        self.chain = chain
        self.cost = cost
        self.feedback = feedback
        self.states, self.points = chain.free(x)
        self.target = cost.prepare(target, self.states[-1])
        self.loss, self.cost_gradient = cost.both(self.states[-1], self.target)

    def product(self, i: int, point: Any, e: Tensor) -> Tensor:
        """Returns block ``i``'s ``W^T e``, or ``B^T e`` where it has feedback of its own."""
        return product(self.chain.blocks[i], point, e, self.feedback)

    @property
    def unit(self) -> Messages:
        """The backward sweep at the free states, per unit of beta: from ``e_L = -dC/ds_L``."""
        return self._swept[0]

    @property
    def squares(self) -> float:
        """The sum of the squares of the backward sweep's errors."""
        return self._swept[1]

    @cached_property
    def _swept(self) -> tuple[Messages, float, float]:
        """The backward sweep, the squares of its errors, and those of the output's alone."""
        return self._descend(-self.cost_gradient)

    def _descend(self, e: Tensor) -> tuple[Messages, float, float]:
        own = squares = float(torch.linalg.vector_norm(e)) ** 2
        errors, products = [e], []
        for run in reversed(self.chain.runs[1:]):
            below, pulled, square = run.descend(self.points[run.span], errors[0], self.feedback)
            errors, products = below + errors, pulled + products
            squares += float(square)
        return Messages(errors, products), squares, own

    @cached_property
    def mean(self) -> Tensor:
        """The batch mean of the cost, a scalar tensor."""
        return self.loss.mean()

    @property
    def sound(self) -> bool:
        """True if loss and errors are finite."""
        return math.isfinite(float(self.mean) + self.squares)

    def descend(self, e: Tensor) -> list[Tensor]:
        """Returns the errors ``e_1 ... e_L`` that any error of the output sends down."""
        return self._descend(e)[0].errors

    @cached_property
    def gain(self) -> float:
        """``kappa = sum_i ||e_i||^2 / ||e_L||^2``: how much every layer's move adds up."""
        _, squares, own = self._swept
        return usable_gain(squares / own if own else math.nan, len(self.points))

    @property
    def settlings(self) -> list[Settled]:
        """What had to be settled: nothing, the forward pass is the equilibrium."""
        return []

    def learn(self, beta: float, settled: Settled) -> None:
        """The next nudged phase starts at the free states again, whatever one has found."""

    def commit(self) -> None:
        """Makes the free phase's running statistics permanent: once per step."""
        for block, point in zip(self.chain.blocks, self.points, strict=True):
            block.commit(point)
        if self.twin is not None:
            self.twin.commit()
