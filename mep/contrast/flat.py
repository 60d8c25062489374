"""One nudged sweep over a plain net of vectors, without a detour: the fast path of ``contrast``.

Linear first, then blocks of one width and one activation: a multilayer perceptron. Between two
products of a small net there is time for little, and here nothing is built that is not read. The
reference is ``contrast``, which takes every other chain, and this one whenever one sweep has not
been the end of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mep.blocks import Chain, ClosedBlock, DenseRun, Dropout, Layers, Linear, sample_norm
from mep.contrast.estimate import Estimate
from mep.contrast.settings import Settings
from mep.contrast.stencils import one_sided
from mep.contrast.strength import strength_of
from mep.curvature import squares
from mep.energies import PredictionError, Squared, usable_gain
from mep.kernels import rows
from mep.memory import phase
from mep.settling import (
    CONVERGED,
    LIMIT,
    NOT_SETTLED,
    TRANSPOSE,
    Limit,
    Residual,
    Sweep,
    verdict,
)

__all__ = ["Flat", "Swept"]


@dataclass(slots=True)
class Swept:
    """What the gradients of a batch are made of.

    Attributes:
        estimate: the verdict.
        activities: those below all weights, ``(B, in)``.
        errors: those above all weights, ``(B, out)``, per unit of beta.
        finite: whether all gradients are sure to be.
    """

    estimate: Estimate
    activities: list[Tensor]
    errors: list[Tensor]
    finite: bool


class Flat:
    """A chain of a first layer and one dense run.

    Args:
        chain: the chain, one that ``fits``.
        how: the strategy.
    """

    def __init__(self, chain: Chain, how: Settings) -> None:
        first, run = chain.blocks[0], chain.runs[1]
        assert isinstance(first, ClosedBlock) and first.layer is not None
        assert isinstance(run, DenseRun)
        self.chain, self.how, self.layer, self.run = chain, how, first.layer, run

    @staticmethod
    def fits(chain: Any, how: Settings) -> bool:
        """Returns whether a chain is plain enough, and no more is asked than one nudged sweep."""
        settler = how.settler
        once = type(settler) is Limit or (
            type(settler) is Sweep
            and settler.feedback == TRANSPOSE
            and (settler.max_sweeps == 1 or settler.tol is not None)
        )
        return (
            once
            and how.stencil is one_sided
            and type(how.energy) is PredictionError
            and type(how.energy.output) is Squared
            and isinstance(chain, Chain)
            and len(chain.runs) == 2
            and isinstance(chain.runs[1], DenseRun)
            and type(first := chain.blocks[0]) is ClosedBlock
            and type(first.layer) is Linear
            and not any(isinstance(operation, Dropout) for operation in first.operations)
        )

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter | None]]:
        """Returns weights and biases as they are now, in the order of the blocks."""
        first, blocks = self.layer, self.run.blocks
        return [first.weight, *(b.weight for b in blocks)], [first.bias, *(b.bias for b in blocks)]

    @torch.no_grad()
    def sweep(self, x: Tensor, target: Tensor) -> Swept | None:
        """Takes free phase, backward sweep and nudged sweep, inside ``Buffers.lend()``.

        Args:
            x: checked input.
            target: target as the cost takes it.

        Returns:
            None where the reference is asked for: states that are no vectors, loss or errors that
            are not finite, a sweep that has not settled while there may be another one.

        Raises:
            TypeError, ValueError: if input or target do not fit.
        """
        with phase("mep: settle"):
            s, point = self.chain.blocks[0].predict_checked(x, x)
            below = point.values[-1]
            laid = self.run.lay(s) if below.dim() == 2 else None
            return None if laid is None else self._settled(below, *laid, target)

    def _settled(
        self, below: Tensor, layers: Layers, states: list[Tensor], target: Tensor
    ) -> Swept | None:
        cost = self.how.cost
        y = cost.prepare(target, states[-1])
        loss, gradient = cost.both(states[-1], y)
        mean, top = loss.mean(), gradient.neg()
        own = float(torch.linalg.vector_norm(top)) ** 2
        errors, products, others = layers.descend(top)
        size = own + float(others)
        if not math.isfinite(float(mean) + size):
            return None
        gain = usable_gain(size / own if own else math.nan, len(self.chain.blocks))
        beta = strength_of(self.how.beta, lambda: gain)
        if isinstance(self.how.settler, Limit):
            nudge = sample_norm(gradient)
            found = Estimate(mean, Residual(nudge.sign(), nudge), 0, LIMIT, beta)
            return self._swept(found, below, layers.y, [*errors, top], size)
        moved, activities, forces = layers.climb(
            torch.mul(errors[0], beta), errors, top, products, beta, last_only=True
        )
        nudged = cost.both(states[-1] + moved[-1], y)[1]
        last = sample_norm(nudged - gradient)
        balance = Residual.of(torch.addcmul(forces, last, last).sqrt_(), sample_norm(nudged))
        tol, most = self.how.settler.tol, self.how.settler.max_steps
        status = verdict(balance, balance.per_sample.median(), tol)
        if status != CONVERGED and (most > 1 or status != NOT_SETTLED):
            return None
        found = Estimate(mean, balance, 1, status, beta)
        return self._swept(found, below, activities, [*errors, top], size)

    def _swept(
        self, found: Estimate, below: Tensor, above: list[Tensor], errors: list[Tensor], size: float
    ) -> Swept:
        """Gives out what has been found; ``|G| <= |e| |a| / B`` for every gradient.

        What is below a bias is 1 for every sample. ``size`` is the sum of all errors' squares.
        """
        bound = self.run.blocks[0].activation.bound
        if bound < math.inf:
            total = bound**2 * sum(a.numel() for a in above)
        else:
            total = sum(squares(a) for a in rows(above))
        most = math.sqrt(total + squares(below) + len(below)) * math.sqrt(size)
        return Swept(found, [below, *above], errors, most <= torch.finfo(below.dtype).max)
