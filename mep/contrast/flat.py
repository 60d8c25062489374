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

from mep.blocks import Chain, ClosedBlock, DenseRun, Linear, sample_norm
from mep.contrast.estimate import Estimate
from mep.contrast.settings import Settings
from mep.contrast.stencils import one_sided
from mep.contrast.strength import strength_of
from mep.curvature import squares
from mep.energies import FreePhase, PredictionError, Squared
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
    def fits(chain: Chain, how: Settings) -> bool:
        """Returns whether a chain is plain enough, and no more is asked than one nudged sweep."""
        first, settler = chain.blocks[0], how.settler
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
            and len(chain.runs) == 2
            and isinstance(chain.runs[1], DenseRun)
            and type(first) is ClosedBlock
            and type(first.layer) is Linear
        )

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter | None]]:
        """Returns weights and biases as they are now, in the order of the blocks."""
        first, blocks = self.layer, self.run.blocks
        return [first.weight, *(b.weight for b in blocks)], [first.bias, *(b.bias for b in blocks)]

    @torch.no_grad()
    def sweep(self, free: FreePhase) -> Swept | None:
        """Takes the nudged sweep, inside ``Buffers.lend()``.

        Args:
            free: the free phase of a batch, without feedback of its own.

        Returns:
            None where the reference is asked for: states that are no vectors, loss or errors that
            are not finite, a sweep that has not settled while there may be another one.
        """
        points = free.points[1:]
        below = free.points[0].values[-1]
        if not self.run.together(points) or below.dim() != 2 or not free.sound:
            return None
        with phase("mep: settle"):
            errors, products = free.unit.errors, free.unit.products
            assert products is not None, "the backward sweep of the free phase has them"
            beta = strength_of(self.how.beta, lambda: free.gain)
            if isinstance(self.how.settler, Limit):
                nudge = sample_norm(free.cost_gradient)
                found = Estimate(free.mean, Residual(nudge.sign(), nudge), 0, LIMIT, beta)
                return self._swept(found, free, points)
            first = torch.mul(errors[0], beta)
            moved, points, forces = self.run.climb(
                points, first, errors[:-1], errors[1:], products, beta, None, last_only=True
            )
            balance = _balance(free, moved[-1], forces)
            tol, most = self.how.settler.tol, self.how.settler.max_steps
            status = verdict(balance, balance.per_sample.median(), tol)
        if status != CONVERGED and (most > 1 or status != NOT_SETTLED):
            return None
        found = Estimate(free.mean, balance, 1, status, beta)
        return self._swept(found, free, points)

    def _swept(self, found: Estimate, free: FreePhase, points: list[Any]) -> Swept:
        """Gives out what has been found; ``|G| <= |e| |a| / B`` for every gradient.

        What is below a bias is 1 for every sample.
        """
        below, above = free.points[0].values[-1], [point.values[1] for point in points]
        bound = self.run.blocks[0].activation.bound
        if bound < math.inf:
            total = bound**2 * sum(a.numel() for a in above)
        else:
            total = sum(squares(a) for a in rows(above))
        size = math.sqrt(total + squares(below) + len(below)) * math.sqrt(free.squares)
        finite = size <= torch.finfo(below.dtype).max
        return Swept(found, [below, *above], free.unit.errors, finite)


def _balance(free: FreePhase, moved: Tensor, forces: Tensor) -> Residual:
    """Returns the residual, given the output's displacement and the squares of the forces below."""
    gradient = free.cost.both(free.states[-1] + moved, free.target)[1]
    last = sample_norm(gradient - free.cost_gradient)
    return Residual.of(torch.addcmul(forces, last, last).sqrt_(), sample_norm(gradient))
