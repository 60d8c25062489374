"""What compiled rounds relax: one phase of one batch of a perceptron with symmetric couplings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

__all__ = ["CoupledPhase"]


@dataclass(frozen=True, eq=False)
class CoupledPhase:
    """States ``s_1 ... s_n``, ``(B, n_i)`` each, and all that acts on them.

    Args:
        weights: from below, ``(n_i, n_{i-1})`` each; None for the first state, whose current from
            below does not change.
        biases: ``(n_i,)`` each, or None.
        bounds: of every state, infinite for the output.
        start: the states to start from.
        still: numbers, from 1, of those that exert nothing, being displacements of 0.
        below: what comes from below, as far as it is known; for the first state None stands for
            nothing at all.
        offsets: origins of displacements, and the currents beyond the bounds there; or None.
        target: of the output, as much displaced, ``(B, n_n)``.
        beta: nudging strength.
    """

    weights: Sequence[Tensor | None]
    biases: Sequence[Tensor | None]
    bounds: Sequence[tuple[float, float]]
    start: Sequence[Tensor]
    still: Set[int]
    below: Sequence[Tensor | None]
    offsets: Sequence[tuple[Tensor, Tensor] | None]
    target: Tensor
    beta: float

    def shapes(self) -> Iterator[tuple[Tensor | None, tuple[int, ...]]]:
        """Yields every tensor whose address is taken, with the shape that it must have."""
        widths, batch = [s.shape[-1] for s in self.start], len(self.start[0])
        for weight, (n, m) in zip(self.weights[1:], pairwise(widths), strict=True):
            yield weight, (m, n)
        for bias, s, pair, n in zip(self.biases, self.start, self.offsets, widths, strict=True):
            yield bias, (n,)
            for t in (s, *(pair or ())):
                yield t, (batch, n)
        yield self.target, (batch, widths[-1])
