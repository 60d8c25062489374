"""What a walk within a memory budget does inside one segment of a chain."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mep.blocks import Chain, product, replayed, sample_norm
from mep.blocks.run import Feedback
from mep.curvature import Signal
from mep.memory import phase

__all__ = ["BlockSegments", "Mark", "Segments", "Span"]

Span = tuple[int, int]


class Mark(NamedTuple):
    """Where a span can be walked again from: its input, and what its blocks draw from."""

    state: Tensor
    random: Tensor | None


class Segments(ABC):
    """The passes over a segment, for one batch.

    Attributes:
        draws: whether they may draw random numbers.
        moved: displacement of the state that the nudged sweep has reached; None before it.
        squares: of the forces below it, summed, per sample, ``(B,)``.
    """

    draws = True
    moved: Tensor | None = None
    squares: Tensor

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of blocks of the chain."""

    @abstractmethod
    def forward(self, span: Span, s: Tensor, x: Tensor | None) -> Tensor:
        """Runs the free phase, and keeps nothing.

        Args:
            span: the segment.
            s: its input.
            x: the input of the chain, for messages; None where it has been checked.

        Returns:
            The state above.
        """

    @abstractmethod
    def descend(
        self, span: Span, mark: Mark, e: Tensor, *, measure: bool
    ) -> tuple[Tensor, Tensor | float]:
        """Runs the free phase again, and the backward sweep.

        Args:
            span: the segment.
            mark: its input.
            e: the error above.
            measure: whether the squares will be read.

        Returns:
            The error below (at the foot of the chain, that of the first state), and the sum of the
            squares of all errors below the one given.
        """

    @abstractmethod
    def climb(self, span: Span, mark: Mark, e: Tensor, beta: float, scale: float) -> None:
        """Runs both again, takes the nudged sweep, and sends the signals on.

        Args:
            span: the segment.
            mark: its input.
            e: the error above, per unit of ``beta``.
            beta: nudging strength.
            scale: of the signals.
        """


class BlockSegments(Segments):
    """Block by block: the reference, which takes every chain.

    Args:
        chain: the chain.
        sink: receives all signals of one block at a time, from input to output. It may change the
            block's parameters at once.
        done: called after every block, and with True after every segment: signals that have been
            held back must not be held any longer.
        feedback: as for ``free_phase``.
    """

    def __init__(
        self,
        chain: Chain,
        sink: Callable[[list[Signal]], None],
        done: Callable[[bool], None],
        feedback: Feedback = None,
    ) -> None:
        self.blocks = chain.blocks
        self._sink, self._done, self._feedback = sink, done, feedback
        self._below = torch.zeros(())

    def __len__(self) -> int:
        return len(self.blocks)

    def forward(self, span: Span, s: Tensor, x: Tensor | None) -> Tensor:
        for block in self.blocks[slice(*span)]:
            s = (block.predict(s) if x is None else block.predict_checked(s, x))[0]
        return s

    def descend(
        self, span: Span, mark: Mark, e: Tensor, *, measure: bool
    ) -> tuple[Tensor, Tensor | float]:
        squares: Tensor | float = 0.0
        for i, point in zip(_downwards(span), self._points(span, mark), strict=False):
            product = self._product(i, point, e)
            if measure:
                e, square = self.blocks[i].pull_and_square(point, product)
                squares = squares + square
            else:
                e = self.blocks[i].pull(point, product)
        return e, squares

    def climb(self, span: Span, mark: Mark, e: Tensor, beta: float, scale: float) -> None:
        points, errors, products = self._points(span, mark), [e], []
        for i, point in zip(_downwards(span), points, strict=False):
            products.append(self._product(i, point, errors[-1]))
            if i > span[0]:  # below the first lies an error that is known
                errors.append(self.blocks[i].pull(point, products[-1]))
        for i in range(*span):
            e, free = errors.pop(), points.pop()
            if self.moved is None:
                moved, self.moved = free, e * beta
                self.squares = sample_norm(e).zero_()
            else:
                delta, moved, force = self.blocks[i].advance(
                    free, self.moved, products.pop(), self._below
                )
                self.moved = delta.add_(e, alpha=beta)
                self.squares.addcmul_(force, force)
            with phase("mep: contrast"):
                self._sink(list(self.blocks[i].signals(moved, e, scale)))
            self._done(False)
            self.blocks[i].commit(free)
            self._below = e
        self._done(True)

    def _points(self, span: Span, mark: Mark) -> list[Any]:
        """Returns the points of a segment's blocks, from the last to the first."""
        s, points = mark.state, []
        with replayed(mark.random, s.device):
            for i in range(*span):
                s, point = self.blocks[i].predict(s)
                points.append(point)
        return points[::-1]

    def _product(self, i: int, point: Any, e: Tensor) -> Tensor:
        return product(self.blocks[i], point, e, self._feedback)


def _downwards(span: Span) -> range:
    """Nothing is pulled through the first block of a chain."""
    return range(span[1] - 1, max(span[0], 1) - 1, -1)
