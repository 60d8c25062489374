"""Runs: what blocks in a row do together. One pass over a chain is one pass over its runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from mep.blocks.block import Block
from mep.blocks.buffers import lending, shelf
from mep.blocks.dense import DenseBlock, DensePoint
from mep.blocks.passes import passes_of
from mep.curvature import Signal, Stack
from mep.kernels import rows

__all__ = ["DenseRun", "Feedback", "Run", "product", "runs_of"]

Feedback = Mapping[int, Tensor] | None
Visit = Callable[[int, Any, Tensor], None]


def product(block: Block, point: Any, e: Tensor, feedback: Feedback) -> Tensor:
    """Returns a block's ``W^T e``, or ``B^T e`` where it has feedback of its own."""
    other = feedback.get(id(block.feedback_weight)) if feedback else None
    return block.product(point, e) if other is None else block.product_through(point, e, other)


class Run:
    """Blocks in a row, taken one by one: the reference of ``DenseRun``.

    Lists have one entry per block. *Below* is a block's input, *above* its output.

    Args:
        blocks: in order.
        start: number of the first one in its chain.
    """

    def __init__(self, blocks: Sequence[Block], start: int) -> None:
        self.blocks = list(blocks)
        self.start = start
        self.span = slice(start, start + len(blocks))

    def free(self, s: Tensor, x: Tensor) -> tuple[list[Tensor], list[Any]]:
        """Runs the free phase.

        Args:
            s: the state below.
            x: the input of the chain, for messages.

        Returns:
            The states above, and the points.

        Raises:
            ValueError: if a block cannot take its input; the message names it.
        """
        states, points = [], []
        for block in self.blocks:
            s, point = block.predict_checked(s, x)
            states.append(s)
            points.append(point)
        return states, points

    def descend(
        self, points: list[Any], e: Tensor, feedback: Feedback
    ) -> tuple[list[Tensor], list[Tensor], Tensor | float]:
        """The backward sweep from the error above the last block.

        Returns:
            Errors below ``e_below = J^T e_above``, products ``W^T e_above``, and the sum of the
            errors' squares.
        """
        errors, products, squares = [], [], []
        for block, point in zip(reversed(self.blocks), reversed(points), strict=True):
            products.append(product(block, point, e, feedback))
            e, square = block.pull_and_square(point, products[-1])
            errors.append(e)
            squares.append(square)
        return errors[::-1], products[::-1], sum(squares)

    def climb(
        self,
        points: list[Any],
        d: Tensor,
        below: list[Tensor],
        above: list[Tensor],
        products: list[Tensor],
        beta: float,
        visit: Visit | None,
        *,
        last_only: bool = False,
    ) -> tuple[list[Tensor], list[Any], Tensor]:
        """The nudged forward sweep, ``d_above = f(s + d) - f(s) + beta e_above``.

        Args:
            points: at the free states.
            d: displacement below the first block.
            below: errors below, per unit of beta.
            above: errors above.
            products: of the backward sweep that made the errors.
            beta: nudging strength.
            visit: called with every block's number in the chain, point and error above, as soon as
                the sweep has no more use for the block.
            last_only: that of all displacements only the last one will be read.

        Returns:
            Displacements above, points at the displaced states, and per sample the squares of all
            forces below.
        """
        displacements, moved, squares = [], [], d.new_zeros(len(d))
        share = 0.0  # of its error, which a displacement gets while it is in the cache
        arguments = zip(self.blocks, points, below, above, products, strict=True)
        for i, (block, before, e_below, e_above, pulled) in enumerate(arguments, self.start):
            d, point, norm = block.advance(before, d, pulled, e_below, share)
            share = beta
            displacements.append(d)
            moved.append(point)
            squares.addcmul_(norm, norm)
            if visit is not None:
                visit(i, point, e_above)
        d.add_(above[-1], alpha=beta)
        return displacements, moved, squares

    def signals(self, points: list[Any], above: list[Tensor], scale: float) -> Iterator[Signal]:
        """Yields the local signals of all blocks, as ``Block.signals`` does."""
        for block, point, e in zip(self.blocks, points, above, strict=True):
            yield from block.signals(point, e, scale)


class DenseRun(Run):
    """Dense blocks of one width and one activation, whose states lie in memory in a row.

    Between two products there is one pass over memory, and the gradients of all blocks are one
    batched product. Where no buffers are lent, or states are no vectors, the reference does it.
    """

    blocks: list[DenseBlock]  # pyright: ignore[reportIncompatibleVariableOverride]

    def free(self, s: Tensor, x: Tensor) -> tuple[list[Tensor], list[Any]]:
        if not lending() or s.dim() != 2 or not self._fits(s):
            return super().free(s, x)
        passes, s = passes_of(self.blocks, s), s.contiguous()
        states, activities = self._above(s), self._below(s)
        below, room = [s, *states[:-1]], [*[shelf(s)] * (len(states) - 1), shelf(states[-1])]
        passes.free(below, activities, states)
        pairs = zip(below, activities, room, strict=True)
        between, inputs = passes.between, shelf(s)
        return states, [DensePoint(s, y, between, inputs, out, passes) for s, y, out in pairs]

    def descend(
        self, points: list[Any], e: Tensor, feedback: Feedback
    ) -> tuple[list[Tensor], list[Tensor], Tensor | float]:
        if feedback or not self.together(points):
            return super().descend(points, e, feedback)
        states, activities = _values(points)
        errors, products = self._below(states[0]), self._below(states[0])
        passes = points[0].passes
        squares = passes.descend(states, activities, e.contiguous(), products, errors)
        return errors, products, squares

    def climb(
        self,
        points: list[Any],
        d: Tensor,
        below: list[Tensor],
        above: list[Tensor],
        products: list[Tensor],
        beta: float,
        visit: Visit | None,
        *,
        last_only: bool = False,
    ) -> tuple[list[Tensor], list[Any], Tensor]:
        if visit is not None or not self.together(points):
            return super().climb(
                points, d, below, above, products, beta, visit, last_only=last_only
            )
        d, spare, norms = d.contiguous(), shelf(d), shelf(d, (len(points), d.shape[0]))
        activities, change, norm = self._below(d), spare.lend(), norms.lend()
        displacements = self._last_above(d) if last_only else self._above(d)
        points[0].passes.climb(
            *_values(points), d, beta, products, below, change, activities, norms.split(norm),
            displacements,
        )  # fmt: skip
        displacements[-1].add_(above[-1], alpha=beta)
        spare.give(change)
        moved = [point.moved(y) for point, y in zip(points, activities, strict=True)]
        return displacements, moved, norm.square().sum(0)

    def signals(self, points: list[Any], above: list[Tensor], scale: float) -> Iterator[Signal]:
        # The last block may be of another shape.
        activities = [*rows([p.values[1] for p in points[:-1]])] if self.together(points) else []
        errors = [*rows(above[:-1])]
        if len(activities) != 1 or len(errors) != 1 or len(points) < 3:
            yield from super().signals(points, above, scale)
            return
        whole = _Gradients(Stack(activities[0], errors[0]), scale)
        for k, block in enumerate(self.blocks[:-1]):
            yield from whole.signals(k, block)
        yield from self.blocks[-1].signals(points[-1], above[-1], scale)

    @staticmethod
    def together(points: list[Any]) -> bool:
        """Returns whether these points are a run's, with buffers that are lent."""
        return lending() and all(isinstance(point, DensePoint) and point.passes for point in points)

    def _fits(self, s: Tensor) -> bool:
        """True if all weights still are what they were when the run was found."""
        square, *others = s.shape[1], *(block.weight.shape for block in self.blocks)
        return (
            all(shape == (square, square) for shape in others[:-1])
            and others[-1][1] == square
            and all(block.weight.dtype == s.dtype for block in self.blocks)
        )

    def _below(self, like: Tensor) -> list[Tensor]:
        """Returns tensors for something below every block."""
        return shelf(like, (len(self.blocks), *like.shape)).lend_rows()

    def _above(self, like: Tensor) -> list[Tensor]:
        """Returns tensors for something above every block; the last may be of another width."""
        last = shelf(like, (like.shape[0], self.blocks[-1].height)).lend()
        return [*shelf(like, (len(self.blocks) - 1, *like.shape)).lend_rows(), last]

    def _last_above(self, like: Tensor) -> list[Tensor]:
        """Returns the same where only the last will be read: the others stay in the cache."""
        last = shelf(like, (like.shape[0], self.blocks[-1].height)).lend()
        return [*[shelf(like).lend()] * (len(self.blocks) - 1), last]


def _values(points: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the inputs of points, and their activities."""
    return [point.values[0] for point in points], [point.values[1] for point in points]


class _Gradients:
    """The gradients of blocks whose activities and errors are rows of one tensor each.

    Args:
        stack: activities and errors.
        scale: of the sums over the batch.
    """

    def __init__(self, stack: Stack, scale: float) -> None:
        self._stack, self._scale = stack, scale
        self._activities, self._errors = stack.activities, stack.errors
        self._given: set[tuple[str, int]] = set()

    def signals(self, k: int, block: DenseBlock) -> Iterator[Signal]:
        """Yields one block's signals."""
        weight, bias, samples = block.weight, block.bias, self._errors.shape[1]
        if weight.requires_grad:
            form, rows = partial(self._weight, k), partial(self._rows, k)
            yield Signal(weight, self._scale, samples, form, rows, stack=(self._stack, k))
        if bias is not None and bias.requires_grad:
            form, rows = partial(self._bias, k), partial(self._bias_rows, k)
            yield Signal(bias, self._scale, samples, form, rows)

    def _rows(self, k: int) -> tuple[Tensor, Tensor]:
        return self._activities[k], self._errors[k]

    def _bias_rows(self, k: int) -> tuple[Tensor, Tensor]:
        e = self._errors[k]
        return torch.ones_like(e[:, :1]), e

    def _weight(self, k: int) -> Tensor:
        if self._first("weight", k):
            return self._weights[k]
        a, e = self._rows(k)
        return (e.t() @ a).mul_(self._scale)

    def _bias(self, k: int) -> Tensor:
        if self._first("bias", k):
            return self._biases[k]
        return self._errors[k].sum(0).mul_(self._scale)

    def _first(self, what: str, k: int) -> bool:
        """A gradient belongs to whom it was given, and may have been changed by a second time."""
        given = (what, k) in self._given
        self._given.add((what, k))
        return not given

    @cached_property
    def _weights(self) -> list[Tensor]:
        e, a = self._errors.transpose(1, 2), self._activities
        room = shelf(a, (a.shape[0], e.shape[1], a.shape[2]))
        out = room.lend()
        torch.baddbmm(out, e, a, beta=0, alpha=self._scale, out=out)
        return room.split(out)

    @cached_property
    def _biases(self) -> list[Tensor]:
        e = self._errors
        room = shelf(e, (e.shape[0], e.shape[2]))
        out = torch.sum(e, 1, out=room.lend()).mul_(self._scale)
        return room.split(out)


def runs_of(blocks: Sequence[Block]) -> list[Run]:
    """Cuts a chain into runs. Its first block is one of its own: nothing is below it.

    >>> from mep import trace
    >>> from mep.models import mlp
    >>> [type(run).__name__ for run in trace(mlp(4, [8, 8], 2, torch.nn.Tanh)).runs]
    ['Run', 'DenseRun']
    """
    groups: list[list[Block]] = [[blocks[0]]]
    kinds = [_kind(block) for block in blocks]
    for block, kind, before in zip(blocks[1:], kinds[1:], [object(), *kinds[1:]], strict=False):
        if kind == before:
            groups[-1].append(block)
        else:
            groups.append([block])
    runs, start = [], 0
    for group in groups:
        made = DenseRun if start > 0 and isinstance(group[0], DenseBlock) else Run
        runs.append(made(group, start))
        start += len(group)
    return runs


def _kind(block: Block) -> tuple[str, int] | None:
    """What blocks of one run have in common."""
    return (block.activation.name, block.width) if isinstance(block, DenseBlock) else None
