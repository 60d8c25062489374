"""The estimator within a memory budget: the same nudged sweep, segment by segment.

Kept are states and errors at the boundaries of segments; what lies between is computed again when
the walk comes by. Where a plan has several levels, a span is walked as the chain itself is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mep.blocks import Chain, product, random_state, replayed, sample_norm
from mep.contrast.estimate import Estimate, refused
from mep.contrast.settings import Settings
from mep.contrast.strength import strength_of
from mep.curvature import Signal
from mep.energies import usable_gain
from mep.memory import Plan, phase, spans
from mep.settling import Residual, verdict

__all__ = ["contrast_streamed"]

Span = tuple[int, int]


class Mark(NamedTuple):
    """Where a span can be walked again from: its input, and what its blocks draw from."""

    state: Tensor
    random: Tensor | None


def contrast_streamed(
    chain: Chain,
    x: Tensor,
    target: Tensor,
    how: Settings,
    plan: Plan,
    sink: Callable[[list[Signal]], None],
    done: Callable[[bool], None],
    *,
    state_dtype: torch.dtype | None = None,
    feedback: Mapping[int, Tensor] | None = None,
) -> Estimate:
    """Takes one nudged sweep within a plan and sends each block's signals as it passes.

    The walk does not come back: the sink may change the block's parameters at once. A loss or
    errors that are not finite are refused before the first signal.

    Args:
        chain: the chain.
        x: a checked input, ``(B, *in)``.
        target: target as the cost takes it.
        how: the strategy, which ``check_blockwise`` has passed.
        plan: with one level of checkpoints at least.
        sink: receives all signals of one block at a time, from input to output.
        done: called after every block, and with True after every segment: signals that have been
            held back must not be held any longer.
        state_dtype: of checkpoints, where it is not the states' own. The free phase then goes on
            from what was rounded, so that every later pass meets the very same states.
        feedback: as for ``free_phase``.

    Returns:
        The estimate; ``"diverged"`` with infinite residuals if nothing was sent.

    Raises:
        ValueError: if input or target do not fit.
    """
    walk = _Walk(chain, plan.lengths, state_dtype, feedback)
    with phase("mep: settle"):
        output, marks = walk.free(x)
        y = how.cost.prepare(target, output)
        loss = how.cost.value(output, y)
        e = how.cost.gradient(output, y).neg()
        tops = walk.errors(marks, e)
    ((beta, weight),) = how.nodes(strength_of(how.beta, lambda: walk.gain))
    if not math.isfinite(float(loss.sum() + walk.size)):
        return refused(loss, beta)
    scale = -weight * beta / len(loss)

    def visit(i: int, free: Any, point: Any, e: Tensor) -> None:
        with phase("mep: contrast"):
            sink(list(chain.blocks[i].signals(point, e, scale)))
        done(False)
        chain.blocks[i].commit(free)

    with phase("mep: settle"):
        climb = _Climb(walk, beta, visit, partial(done, True))
        climb.rise(0, walk.parts, marks, tops)
        nudge = how.cost.gradient(output + climb.d, y)
        forces = (climb.squares + sample_norm(e + nudge).square()).sqrt()
        residual = Residual.of(forces, sample_norm(nudge))
    status = verdict(residual, residual.per_sample.median(), how.settler.tol)
    return Estimate(loss.mean(), residual, 1, status, abs(beta))


class _Walk:
    """Passes over a chain that keep no more than marks.

    Attributes:
        parts: the topmost spans.
        size: sum of the errors' norms, finite only if they are.
    """

    def __init__(
        self,
        chain: Chain,
        lengths: tuple[int, ...],
        dtype: torch.dtype | None,
        feedback: Mapping[int, Tensor] | None,
    ) -> None:
        self.chain = chain
        self.blocks = chain.blocks
        self.lengths = lengths
        self.parts = spans(0, len(chain), lengths[0])
        self.dtype = dtype
        self.feedback = feedback
        self._draws = True
        self._measures = False

    def free(self, x: Tensor) -> tuple[Tensor, list[Mark]]:
        """The free phase: returns the output and the marks of the topmost spans."""

        def predict(i: int, s: Tensor) -> Tensor:
            return self.blocks[i].predict_checked(s, x)[0]

        before = random_state(x.device)
        output, marks = self._forward(x, self.parts, predict)
        self._draws = not torch.equal(before, random_state(x.device))
        return output, marks if self._draws else [Mark(mark.state, None) for mark in marks]

    def errors(self, marks: list[Mark], e: Tensor) -> list[Tensor]:
        """The first backward sweep: measures all errors, returns those at the topmost spans."""
        first = torch.linalg.vector_norm(e)
        self._first, self.size, self._gain = first, first.clone(), torch.ones_like(first)
        self._measures = True
        tops = self.tops(0, self.parts, marks, e)
        self._descend(1, self.parts[0], marks[0], self.restored(tops[0]))
        self._measures = False
        return tops

    @property
    def gain(self) -> float:
        """``kappa = sum_i ||e_i||^2 / ||e_L||^2``."""
        return usable_gain(float(self._gain), len(self.blocks))

    def tops(self, level: int, parts: list[Span], marks: list[Mark], e: Tensor) -> list[Tensor]:
        """Returns the error at the top of every part of a span, ``e`` at that of the last."""
        found = [e]
        for part, mark in zip(parts[:0:-1], marks[:0:-1], strict=True):
            found.append(self._kept(self._descend(level + 1, part, mark, self.restored(found[-1]))))
        return found[::-1]

    def cut(self, level: int, span: Span, mark: Mark) -> tuple[list[Span], list[Mark]]:
        """Cuts a span into parts and marks them."""
        parts = spans(*span, self.lengths[level])
        s = self.restored(mark.state)
        with replayed(mark.random, s.device):
            s, marks = self._forward(s, parts[:-1], lambda i, s: self.blocks[i].predict(s)[0])
            marks.append(self._mark(s))
        return parts, marks

    def points(self, span: Span, mark: Mark) -> list[Any]:
        """Returns the points of a segment's blocks, from the last to the first."""
        s, points = self.restored(mark.state), []
        with replayed(mark.random, s.device):
            for i in range(*span):
                s, point = self.blocks[i].predict(s)
                points.append(point)
        return points[::-1]

    def product(self, i: int, point: Any, e: Tensor) -> Tensor:
        """Returns ``W^T e`` of a block."""
        return product(self.blocks[i], point, e, self.feedback)

    def restored(self, kept: Tensor) -> Tensor:
        """Returns a checkpoint in the dtype it came in."""
        return kept if kept.dtype != self.dtype else kept.to(self.chain.parameter.dtype)

    def _kept(self, t: Tensor) -> Tensor:
        return t if self.dtype is None else t.to(self.dtype)

    def _mark(self, s: Tensor) -> Mark:
        return Mark(self._kept(s), random_state(s.device) if self._draws else None)

    def _forward(
        self, s: Tensor, parts: list[Span], predict: Callable[[int, Tensor], Tensor]
    ) -> tuple[Tensor, list[Mark]]:
        """Runs forward through some parts, marking each: returns the state at the end, too."""
        marks, segment = [], self.lengths[-1]
        for start, stop in parts:
            # The input of the chain is the user's own, and may be whole numbers.
            marks.append(self._mark(s) if start else Mark(s, self._mark(s).random))
            for i in range(start, stop):
                s = predict(i, s)
                if (i + 1) % segment == 0 and i + 1 < len(self.blocks):
                    s = self.restored(self._kept(s))  # every pass starts a segment from the same
        return s, marks

    def _descend(self, level: int, span: Span, mark: Mark, e: Tensor) -> Tensor:
        """Returns the error below a span; at the foot of the chain, that of the first state."""
        if level < len(self.lengths):
            parts, marks = self.cut(level, span, mark)
            tops = self.tops(level, parts, marks, e)
            return self._descend(level + 1, parts[0], marks[0], self.restored(tops[0]))
        points, norms = self.points(span, mark), []
        for i, point in zip(range(span[1] - 1, max(span[0], 1) - 1, -1), points, strict=False):
            e = self.blocks[i].pull(point, self.product(i, point, e))
            if self._measures:
                norms.append(torch.linalg.vector_norm(e))
        if norms:
            found = torch.stack(norms)
            self._gain += (found / self._first).square_().sum()
            self.size += found.sum()
        return e


class _Climb:
    """The nudged sweep, from the foot of the chain to its top.

    Attributes:
        d: displacement of the state that has been reached.
        squares: of the forces below it, summed, per sample.
    """

    def __init__(
        self,
        walk: _Walk,
        beta: float,
        visit: Callable[[int, Any, Any, Tensor], None],
        done: Callable[[], None],
    ) -> None:
        self.walk = walk
        self.beta = beta
        self.visit = visit
        self.done = done
        self.d = self.squares = self._below = torch.zeros(())

    def rise(self, level: int, parts: list[Span], marks: list[Mark], tops: list[Tensor]) -> None:
        """Climbs through the parts of a span, and lets go of what lies behind."""
        marks.reverse()
        tops.reverse()
        for part in parts:
            mark, e = marks.pop(), self.walk.restored(tops.pop())
            if level + 1 == len(self.walk.lengths):
                self._segment(part, mark, e)
            else:
                inner, inner_marks = self.walk.cut(level + 1, part, mark)
                inner_tops = self.walk.tops(level + 1, inner, inner_marks, e)
                del mark, e  # or they would be kept until the span is done
                self.rise(level + 1, inner, inner_marks, inner_tops)

    def _segment(self, span: Span, mark: Mark, e: Tensor) -> None:
        walk, points = self.walk, self.walk.points(span, mark)
        errors, products = [e], []
        for i, point in zip(range(span[1] - 1, max(span[0], 1) - 1, -1), points, strict=False):
            products.append(walk.product(i, point, errors[-1]))
            if i > span[0]:  # below the first lies an error that is known
                errors.append(walk.blocks[i].pull(point, products[-1]))
        for i in range(*span):
            e, free = errors.pop(), points.pop()
            if i == 0:
                moved, self.d = free, e * self.beta
                self.squares = sample_norm(e).zero_()
            else:
                delta, moved, force = walk.blocks[i].advance(
                    free, self.d, products.pop(), self._below
                )
                self.d = delta.add_(e, alpha=self.beta)
                self.squares.addcmul_(force, force)
            self.visit(i, free, moved, e)
            self._below = e
        self.done()
