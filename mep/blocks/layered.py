"""The layers of a dense run at one batch, in buffers: their states lie in memory in a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mep.blocks.buffers import shelf
from mep.blocks.passes import Passes

__all__ = ["Layers"]


@dataclass(slots=True)
class Layers:
    """States of layers of one width, ``(B, n)`` each, inside ``Buffers.lend()``.

    Lists have one entry per block. *Below* is a block's input, *above* its output.

    Attributes:
        passes: the arithmetic.
        s: free states below.
        y: their activities.
    """

    passes: Passes
    s: list[Tensor]
    y: list[Tensor]

    @classmethod
    def free(cls, passes: Passes, s: Tensor) -> tuple[Layers, list[Tensor]]:
        """Runs the free phase from a contiguous state below the first block.

        Returns:
            The layers, and the free states above; the last one may be of another width.
        """
        states, activities = _above(passes, s), _below(passes, s)
        below = [s, *states[:-1]]
        passes.free(below, activities, states)
        return cls(passes, below, activities), states

    @classmethod
    def at(cls, points: Sequence[Any]) -> Layers:
        """Returns the layers that points are of."""
        s, y = [p.values[0] for p in points], [p.values[1] for p in points]
        return cls(points[0].passes, s, y)

    def descend(self, e: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor | float]:
        """As ``Run.descend``: errors and products below, and the sum of the errors' squares."""
        errors, products = _below(self.passes, self.s[0]), _below(self.passes, self.s[0])
        squares = self.passes.descend(self.s, self.y, e.contiguous(), products, errors)
        return errors, products, squares

    def climb(
        self,
        d: Tensor,
        below: list[Tensor],
        top: Tensor,
        products: list[Tensor],
        beta: float,
        *,
        last_only: bool,
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The nudged forward sweep, as ``Run.climb``.

        Args:
            d: displacement below the first block.
            below: errors below, per unit of beta.
            top: the error above the last block.
            products: of the descent.
            beta: nudging strength.
            last_only: that of all displacements only the last one will be read.

        Returns:
            Displacements above, activities of the displaced states below, and per sample the
            squares of all forces below.
        """
        d, spare, norms = d.contiguous(), shelf(d), shelf(d, (len(self.s), d.shape[0]))
        activities, change, norm = _below(self.passes, d), spare.lend(), norms.lend()
        moved = _last_above(self.passes, d) if last_only else _above(self.passes, d)
        self.passes.climb(
            self.s, self.y, d, beta, products, below, change, activities, norms.split(norm), moved
        )
        moved[-1].add_(top, alpha=beta)
        spare.give(change)
        return moved, activities, norm.square().sum(0)


def _below(passes: Passes, like: Tensor) -> list[Tensor]:
    """Returns tensors for something below every block."""
    return shelf(like, (len(passes.blocks), *like.shape)).lend_rows()


def _above(passes: Passes, like: Tensor) -> list[Tensor]:
    """Returns tensors for something above every block; the last may be of another width."""
    last = shelf(like, (like.shape[0], passes.blocks[-1].height)).lend()
    return [*shelf(like, (len(passes.blocks) - 1, *like.shape)).lend_rows(), last]


def _last_above(passes: Passes, like: Tensor) -> list[Tensor]:
    """Returns the same where only the last will be read: the others stay in the cache."""
    last = shelf(like, (like.shape[0], passes.blocks[-1].height)).lend()
    return [*[shelf(like).lend()] * (len(passes.blocks) - 1), last]
