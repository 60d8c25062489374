"""One step of a multilayer perceptron, captured: the fast path of ``contrast``.

Between two products of a small net there is time for little, and nothing here comes back to Python
between two layers. The reference is ``contrast``, which takes every other chain, and this one
whenever one sweep has not been the end of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mep.blocks import (
    Block,
    Chain,
    ClosedBlock,
    DenseBlock,
    Linear,
    Reshape,
    SkipBlock,
    sample_norm,
)
from mep.contrast.estimate import Estimate
from mep.contrast.settings import Settings
from mep.contrast.stencils import one_sided
from mep.contrast.strength import strength_of
from mep.energies import CrossEntropy, PredictionError, Squared, SquaredError, usable_gain
from mep.kernels import capture, kernels_of
from mep.memory import phase, show_use
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

if TYPE_CHECKING:
    from mep.kernels.captured import Captured

__all__ = ["Flat", "Swept"]


@dataclass(frozen=True, slots=True)
class Swept:
    """What a step is made of.

    Attributes:
        estimate: the verdict.
        captured: activities and errors, and how to learn from them.
    """

    estimate: Estimate
    captured: Captured


class Flat:
    """A chain of linear layers with activations between them, and skips around some.

    Args:
        chain: the chain, one that ``fits``.
        how: the strategy.
    """

    def __init__(self, chain: Chain, how: Settings) -> None:
        first, others = chain.blocks[0], chain.blocks[1:]
        assert isinstance(first, ClosedBlock) and first.layer is not None
        self.chain, self.how = chain, how
        self._first, self._flattens = first.layer, bool(first.operations)
        self._others = [block for block in map(_dense, others) if block is not None]
        self._skips = [False, *(isinstance(block, SkipBlock) for block in others)]
        self._activations = [block.activation.name for block in self._others]
        self._known: list[Any] = []
        self._captured: Captured | None = None

    @staticmethod
    def fits(chain: Any, how: Settings) -> bool:
        """Returns whether a chain is plain enough, and no more is asked than one nudged sweep."""
        settler, cost = how.settler, how.cost
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
            and (type(cost) is SquaredError or (type(cost) is CrossEntropy and not cost.classes))
            and isinstance(chain, Chain)
            and _is_first(chain.blocks[0])
            and len(chain.blocks) > 1
            and all(_dense(block) is not None for block in chain.blocks[1:])
        )

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter | None]]:
        """Returns weights and biases as they are now, in the order of the blocks."""
        first, blocks = self._first, self._others
        return [first.weight, *(b.weight for b in blocks)], [first.bias, *(b.bias for b in blocks)]

    def sweep(self, x: Tensor, target: Tensor) -> Swept | None:
        """Takes free phase, backward sweep and nudged sweep; nothing here makes a graph.

        Args:
            x: input, ``(B, *in)``.
            target: target as the cost takes it.

        Returns:
            None where the reference is asked for: tensors without kernels, an input that does not
            fit, loss or gradients that may not be finite, a sweep that has not settled while there
            may be another one.

        Raises:
            TypeError, ValueError: if the target does not fit.
        """
        if not isinstance(x, Tensor) or x.dim() < 2 or not x.numel():
            return None
        if x.dim() > 2 and not self._flattens:
            return None
        with phase("mep: settle"):
            a = x.flatten(1).contiguous().resolve_neg()
            captured = self._capture_for(a)
            if captured is None:
                return None
            show_use(captured.tensors, "states")
            return self._settled(captured, a, target)

    def _capture_for(self, a: Tensor) -> Captured | None:
        """Returns the tensors of a step; the last ones, where nothing has become another."""
        if kernels_of(self._activations[0], a) is None:
            return None
        weights, biases = self.parameters()
        known: list[Any] = [a.shape]
        for p in (*weights, *biases):
            known.append(p is not None and (p.data_ptr(), p.shape, p.dtype, p.is_contiguous()))
        if known != self._known:
            squared = type(self.how.cost) is SquaredError
            self._captured = None  # before there are others
            self._captured = capture(self._activations, weights, biases, self._skips, a, squared)
            self._known = known
        return self._captured

    def _settled(self, captured: Captured, a: Tensor, target: Tensor) -> Swept | None:
        y = self.how.cost.prepare(target, captured.output).contiguous().resolve_neg()
        fallen = captured.fall(a, y)
        mean, size = fallen.loss.mean(), fallen.top + fallen.below
        if not math.isfinite(float(mean) + size + fallen.entering):
            return None
        gain = usable_gain(size / fallen.top if fallen.top else math.nan, len(self.chain.blocks))
        beta = strength_of(self.how.beta, lambda: gain)
        if isinstance(self.how.settler, Limit):
            nudge = sample_norm(captured.gradient)
            found = Estimate(mean, Residual(nudge.sign(), nudge), 0, LIMIT, beta)
        else:
            balance = Residual(*captured.rise(beta))
            tol, more = self.how.settler.tol, self.how.settler.max_steps > 1
            status = verdict(balance, float(balance.per_sample.median()), tol)
            if status != CONVERGED and (more or status != NOT_SETTLED):
                return None
            found = Estimate(mean, balance, 1, status, beta)
        # |G| <= |e| |a| / B for every gradient, and what is below a bias is 1 for every sample.
        most = math.sqrt(size * (captured.active() + fallen.entering + len(a)))
        return Swept(found, captured) if most <= torch.finfo(a.dtype).max else None


def _dense(block: Block) -> DenseBlock | None:
    """Returns an activation and its linear layer, also those that a skip leads around."""
    inner = block.branch[0] if isinstance(block, SkipBlock) and len(block.branch) == 1 else block
    return inner if isinstance(inner, DenseBlock) else None


def _is_first(block: Any) -> bool:
    """Returns whether a block is a linear layer, of the input as it is or flattened."""
    if type(block) is not ClosedBlock or type(block.layer) is not Linear:
        return False
    return all(isinstance(op, Reshape) and _flattens(op.module) for op in block.operations)


def _flattens(module: Any) -> bool:
    return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
