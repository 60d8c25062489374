"""The estimator within a memory budget: the same nudged sweep, segment by segment.

Kept are states and errors at the boundaries of segments; what lies between is computed again when
the walk comes by. Where a plan has several levels, a span is walked as the chain itself is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mep.blocks import random_state, replayed, sample_norm
from mep.contrast.estimate import Estimate, refused
from mep.contrast.segments import Mark, Segments, Span
from mep.contrast.settings import Settings
from mep.contrast.strength import strength_of
from mep.energies import usable_gain
from mep.memory import Plan, phase, spans
from mep.settling import Residual, verdict

__all__ = ["contrast_streamed"]


def contrast_streamed(
    segments: Segments,
    x: Tensor,
    target: Tensor,
    how: Settings,
    plan: Plan,
    *,
    state_dtype: torch.dtype | None = None,
) -> Estimate:
    """Takes one nudged sweep within a plan, whose segments send their signals as it passes.

    The walk does not come back: what receives the signals may change parameters at once. A loss or
    errors that are not finite are refused before the first signal.

    Args:
        segments: of the chain.
        x: a checked input, ``(B, *in)``.
        target: target as the cost takes it.
        how: the strategy, which ``check_blockwise`` has passed.
        plan: with one level of checkpoints at least.
        state_dtype: of checkpoints, where it is not the states' own. The free phase then goes on
            from what was rounded, so that every later pass meets the very same states.

    Returns:
        The estimate; ``"diverged"`` with infinite residuals if nothing was sent.

    Raises:
        ValueError: if input or target do not fit.
    """
    walk = _Walk(segments, plan.lengths, state_dtype)
    with phase("mep: settle"):
        output, marks = walk.free(x)
        y = how.cost.prepare(target, output)
        loss = how.cost.value(output, y)
        e = how.cost.gradient(output, y).neg()
        tops = walk.errors(marks, e)
    ((beta, weight),) = how.nodes(strength_of(how.beta, lambda: walk.gain))
    if not math.isfinite(float(loss.sum() + walk.size)):
        return refused(loss, beta)
    with phase("mep: settle"):
        walk.climb(0, walk.parts, marks, tops, (beta, -weight * beta / len(loss)))
        assert segments.moved is not None, "every chain has a segment"
        nudge = how.cost.gradient(output + segments.moved, y)
        own = sample_norm(e + nudge).square()
        forces = (segments.squares + own).sqrt().to(nudge.dtype)
        residual = Residual.of(forces, sample_norm(nudge))
    status = verdict(residual.total, residual.per_sample.median(), how.settler.tol)
    return Estimate(loss.mean(), residual, 1, status, abs(beta))


class _Walk:
    """Passes over a chain that keep no more than marks.

    Attributes:
        parts: the topmost spans.
        size: sum of the errors' squares, finite only if they are.
    """

    def __init__(
        self, segments: Segments, lengths: tuple[int, ...], dtype: torch.dtype | None
    ) -> None:
        self.segments = segments
        self.lengths = lengths
        self.parts = spans(0, len(segments), lengths[0])
        self._dtype, self._own = dtype, dtype  # of checkpoints, and of states
        self._draws = segments.draws

    def free(self, x: Tensor) -> tuple[Tensor, list[Mark]]:
        """The free phase: returns the output and the marks of the topmost spans."""
        before = random_state(x.device)
        output, marks = self._forward(x, self.parts, x)
        self._draws = self._draws and not torch.equal(before, random_state(x.device))
        return output, marks if self._draws else [Mark(mark.state, None) for mark in marks]

    def errors(self, marks: list[Mark], e: Tensor) -> list[Tensor]:
        """The first backward sweep: measures all errors, returns those at the topmost spans."""
        self._first = torch.linalg.vector_norm(e).double().square_()
        self.size: Tensor | float = self._first.clone()
        tops = self._tops(0, self.parts, marks, e, measure=True)
        self._descend(1, self.parts[0], marks[0], self._restored(tops[0]), measure=True)
        return tops

    @property
    def gain(self) -> float:
        """``kappa = sum_i ||e_i||^2 / ||e_L||^2``."""
        return usable_gain(float(self.size / self._first), len(self.segments))

    def climb(
        self,
        level: int,
        parts: list[Span],
        marks: list[Mark],
        tops: list[Tensor],
        numbers: tuple[float, float],
    ) -> None:
        """The nudged sweep through the parts of a span; lets go of what lies behind.

        Args:
            level: of the parts.
            parts: in order.
            marks: of each.
            tops: the error above each.
            numbers: nudging strength, and scale of the signals.
        """
        marks.reverse()
        tops.reverse()
        for part in parts:
            mark, e = marks.pop(), self._restored(tops.pop())
            if level + 1 == len(self.lengths):
                self.segments.climb(part, self._read(mark), e, *numbers)
            else:
                inner, inner_marks = self._cut(level + 1, part, mark)
                inner_tops = self._tops(level + 1, inner, inner_marks, e)
                del mark, e  # or they would be kept until the span is done
                self.climb(level + 1, inner, inner_marks, inner_tops, numbers)

    def _tops(
        self, level: int, parts: list[Span], marks: list[Mark], e: Tensor, *, measure: bool = False
    ) -> list[Tensor]:
        """Returns the error at the top of every part of a span, ``e`` at that of the last."""
        found = [e]
        for part, mark in zip(parts[:0:-1], marks[:0:-1], strict=True):
            above = self._restored(found[-1])
            found.append(self._kept(self._descend(level + 1, part, mark, above, measure=measure)))
        return found[::-1]

    def _descend(
        self, level: int, span: Span, mark: Mark, e: Tensor, *, measure: bool = False
    ) -> Tensor:
        """Returns the error below a span; at the foot of the chain, that of the first state."""
        if level < len(self.lengths):
            parts, marks = self._cut(level, span, mark)
            tops = self._tops(level, parts, marks, e, measure=measure)
            top = self._restored(tops[0])
            return self._descend(level + 1, parts[0], marks[0], top, measure=measure)
        below, squares = self.segments.descend(span, self._read(mark), e, measure=measure)
        if measure:
            self.size += squares
        return below

    def _cut(self, level: int, span: Span, mark: Mark) -> tuple[list[Span], list[Mark]]:
        """Cuts a span into parts and marks them."""
        parts = spans(*span, self.lengths[level])
        s = self._restored(mark.state)
        with replayed(mark.random, s.device):
            s, marks = self._forward(s, parts[:-1], None)
            marks.append(self._mark(s))
        return parts, marks

    def _forward(self, s: Tensor, parts: list[Span], x: Tensor | None) -> tuple[Tensor, list[Mark]]:
        """Runs forward through some parts, marking each: returns the state at the end, too."""
        marks = []
        for start, stop in parts:
            # The input of the chain is the user's own, and may be whole numbers.
            marks.append(self._mark(s) if start else Mark(s, self._mark(s).random))
            for segment in spans(start, stop, self.lengths[-1]):
                s = self.segments.forward(segment, s, x)
                self._own = s.dtype
                if segment[1] < len(self.segments):
                    s = self._restored(self._kept(s))  # every pass starts a segment from the same
        return s, marks

    def _read(self, mark: Mark) -> Mark:
        return Mark(self._restored(mark.state), mark.random)

    def _restored(self, kept: Tensor) -> Tensor:
        """Returns a checkpoint in the dtype it came in."""
        return kept if kept.dtype != self._dtype else kept.to(self._own)

    def _kept(self, t: Tensor) -> Tensor:
        return t if self._dtype is None else t.to(self._dtype)

    def _mark(self, s: Tensor) -> Mark:
        return Mark(self._kept(s), random_state(s.device) if self._draws else None)
