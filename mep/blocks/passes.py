"""Passes over dense blocks of one width and one activation: product after product, into tensors.

Lists have one entry per block. All tensors are contiguous, all states vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mep.blocks.dense import DenseBlock
from mep.blocks.elementwise import Elementwise, elementwise_of
from mep.kernels import loops_of

if TYPE_CHECKING:
    from mep.kernels.gpu import GpuLoops
    from mep.kernels.loops import Loops

__all__ = ["Passes", "passes_of"]


class Passes:
    """The passes by torch, the reference.

    Args:
        blocks: in order.
        between: what lies between two products.
    """

    def __init__(self, blocks: Sequence[DenseBlock], between: Elementwise) -> None:
        self.blocks, self.between = blocks, between

    def free(self, s: list[Tensor], y: list[Tensor], f: list[Tensor]) -> None:
        """``y <- phi(s)``, ``f <- W y + b``; each ``f`` is the next ``s``."""
        bias = None
        for block, below, activity, above in zip(self.blocks, s, y, f, strict=True):
            self.between.activate(below, bias, activity)
            torch.mm(activity, block.transpose, out=above)
            bias = block.bias
        if bias is not None:
            f[-1].add_(bias)

    def descend(
        self, s: list[Tensor], y: list[Tensor], above: Tensor, p: list[Tensor], e: list[Tensor]
    ) -> Tensor | float:
        """``p <- W^T e_above``, ``e <- phi'(s) p``; returns the sum of all ``||e||^2``."""
        squares: Tensor | float = 0.0
        for k in reversed(range(len(self.blocks))):
            torch.mm(above, self.blocks[k].weight, out=p[k])
            squares += self.between.pull_and_square(s[k], y[k], p[k], e[k])
            above = e[k]
        return squares

    def climb(
        self,
        s: list[Tensor],
        y: list[Tensor],
        d: Tensor,
        beta: float,
        p: list[Tensor],
        e: list[Tensor],
        change: Tensor,
        y_new: list[Tensor],
        norm: list[Tensor],
        above: list[Tensor],
    ) -> None:
        """``d_above <- W (phi(s + d) - phi(s))``, below all but the first ``d <- d + beta e``.

        Args:
            s: free states.
            y: their activities.
            d: displacement below the first block.
            beta: nudging strength.
            p: products of the descent.
            e: its errors.
            change: room for one layer's change of activity.
            y_new: for the activities of the displaced states.
            norm: for the norms of the forces, ``(B,)`` each.
            above: for the displacements above; all but the last may be the same tensor.
        """
        share = 0.0
        for k, block in enumerate(self.blocks):
            self.between.nudge(s[k], y[k], d, share, p[k], e[k], change, y_new[k], norm[k])
            d = torch.mm(change, block.transpose, out=above[k])
            share = beta  # from here on, the next one adds what is still missing of d


class _Compiled(Passes):
    """The same by compiled loops."""

    def __init__(
        self, blocks: Sequence[DenseBlock], between: Elementwise, loops: Loops | GpuLoops
    ) -> None:
        super().__init__(blocks, between)
        self.climb, self._loops = loops.climb, loops

    def free(self, s: list[Tensor], y: list[Tensor], f: list[Tensor]) -> None:
        self._loops.free(s, y, f, [block.bias for block in self.blocks])

    def descend(
        self, s: list[Tensor], y: list[Tensor], above: Tensor, p: list[Tensor], e: list[Tensor]
    ) -> Tensor | float:
        return self._loops.descend(y, above, p, e)


def passes_of(blocks: Sequence[DenseBlock], s: Tensor) -> Passes:
    """Returns the passes over blocks whose weights fit each other, for states like this one."""
    activation = blocks[0].activation
    between, loops = elementwise_of(activation, s), None
    if all(_is_plain(block.bias, block.height, s) for block in blocks):
        loops = loops_of(activation.name, [block.weight for block in blocks])
    return Passes(blocks, between) if loops is None else _Compiled(blocks, between, loops)


def _is_plain(bias: Tensor | None, height: int, s: Tensor) -> bool:
    if bias is None:
        return True
    return bias.is_contiguous() and bias.dtype == s.dtype and bias.shape == (height,)
