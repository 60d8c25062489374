"""Plans: what is kept, what is computed again, so that a step stays within its budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from mep.memory.size import show

__all__ = ["Footprint", "Plan", "Update", "plan", "spans"]


class Update(NamedTuple):
    """What the update of one block takes, in bytes.

    Attributes:
        gradients: formed on their way to the rule.
        rule: what the rule takes besides, at the most.
        waits: whether the update is made at the end of the segment, or at once.
        signals: whether it waits for the sake of signals that are kept as they are.
    """

    gradients: int = 0
    rule: int = 0
    waits: bool = False
    signals: bool = False


_NONE = Update()


@dataclass(frozen=True)
class Footprint:
    """What one block takes, in bytes.

    Attributes:
        state: its prediction; its error and its displacement take the same.
        point: what is kept of one evaluation besides input and prediction.
        product: ``W^T e``; 0 where it is the error itself.
        work: the most that comes and goes while the block is at work, its displacement included.
        norms: what is noted of its residual where nothing is computed again.
        update: its update, at the most.
        pull: the most that comes and goes on the way down alone.
        ends: where blocks of a segment are worked on as one, so that all of it is kept until the
            last has been passed: what this one takes besides, as the first and as the last.
    """

    state: int
    point: int
    product: int
    work: int
    norms: int = 0
    update: Update = _NONE
    pull: int = 0
    ends: tuple[int, int] | None = None

    @property
    def moving(self) -> int:
        """The most that comes and goes."""
        at_once = 0 if self.update.waits else self.update.gradients + self.update.rule
        return max(self.work, at_once)

    @property
    def waiting(self) -> int:
        """What waits for the end of the segment, besides signals."""
        return self.update.gradients if self.update.waits else 0


@dataclass(frozen=True)
class Plan:
    """How a chain is walked within a budget.

    Attributes:
        budget: bytes that may be taken besides parameters and the rule's state.
        blocks: length of the chain.
        lengths: blocks per span, level by level, each a multiple of the next; the last are the
            segments within which everything is kept. Empty if all of the chain is.
        peak: predicted peak, in bytes.

    >>> Plan(2**20, 1000, (40,), 2**19).passes
    {'forward': 3, 'backward': 2, 'nudged': 1, 'contrast': 1}
    """

    budget: int
    blocks: int
    lengths: tuple[int, ...]
    peak: int

    @property
    def levels(self) -> int:
        """Levels of checkpoints."""
        return len(self.lengths)

    @property
    def passes(self) -> dict[str, int]:
        """Passes over the chain; without checkpoints each is one."""
        p = self.levels
        forward = 2 * p + 1 + p * (p - 1) // 2
        return {"forward": forward, "backward": p + 1, "nudged": 1, "contrast": 1}

    def __str__(self) -> str:
        passes = ", ".join(f"{count} {name}" for name, count in self.passes.items())
        spans = " of ".join(f"{n} blocks" for n in reversed(self.lengths)) or "all at once"
        return (
            f"{self.blocks} blocks within {show(self.budget)}: predicted peak {show(self.peak)}, "
            f"{self.levels} level(s) of checkpoints ({spans}), passes: {passes}"
        )


def spans(start: int, stop: int, length: int) -> list[tuple[int, int]]:
    """Cuts ``[start, stop)`` into spans of a length, the last perhaps shorter.

    >>> spans(0, 5, 2)
    [(0, 2), (2, 4), (4, 5)]
    """
    return [(a, min(a + length, stop)) for a in range(start, stop, length)]


def plan(
    footprints: Sequence[Footprint],
    budget: int,
    *,
    base: int,
    share: float = 1.0,
    least: int = 0,
) -> Plan:
    """Finds the plan with the fewest passes that keeps to a budget, and of these the smallest.

    Args:
        footprints: of every block.
        budget: bytes, > 0.
        base: bytes taken all the time (the batch, the output).
        share: of a state's bytes that its checkpoint takes (0.5 for half the digits).
        least: number of levels; 0 may keep all of the chain at hand.

    Returns:
        The plan.

    Raises:
        ValueError: if none keeps to the budget; the message names the least that would do.

    >>> blocks = [Footprint(100, 100, 100, 300)] * 1000
    >>> plan(blocks, 40_000, base=0).lengths
    (22,)

    Source: the trade of checkpoints against recomputation: Griewank & Walther 2000; Chen et al.
    2016.
    """
    costs = _Costs(footprints, base, share)
    lowest = None
    for levels in range(least, least + int(math.log2(max(2, len(footprints)))) + 1):
        found = [(costs.peak(lengths), lengths) for lengths in _candidates(costs, levels)]
        if not found:
            continue
        peak, lengths = min(found)
        if peak <= budget:
            return Plan(budget, len(footprints), lengths, peak)
        lowest = peak if lowest is None else min(lowest, peak)
    assert lowest is not None, "of two blocks or more, segments of one are always a candidate"
    raise ValueError(
        f"`memory_budget={show(budget)}` is not enough for this model and batch: the least that "
        f"works is {show(lowest, up=True)}"
    )


# What is not worth counting: a point that lingers in the walk's hands, where blocks are unequal.
_MARGIN = 1.025


class _Costs:
    """Adds up footprints for any plan, in the order in which ``contrast_streamed`` walks."""

    def __init__(self, footprints: Sequence[Footprint], base: int, share: float) -> None:
        self.footprints = footprints
        self.base = base
        self.share = share
        below = [0, *(f.state for f in footprints)]
        # While its segment is worked on, a block has its input and the error there, its point and
        # its product; on the way down, less.
        opened = (2 * s + f.point + f.product for f, s in zip(footprints, below, strict=False))
        passed = (s + f.point for f, s in zip(footprints, below, strict=False))
        self.open, self.passed = [0, *accumulate(opened)], [0, *accumulate(passed)]
        waiting = (f.waiting + (f.state + f.point) * f.update.signals for f in footprints)
        self.waiting = [0, *accumulate(waiting)]
        # At the end of a segment, all of its updates together.
        self.end = [0, *accumulate(f.update.rule if f.update.waits else 0 for f in footprints)]
        alike = {footprint: k for k, footprint in enumerate(dict.fromkeys(footprints))}
        self.alike = [alike[footprint] for footprint in footprints]

    def peak(self, lengths: tuple[int, ...]) -> int:
        """Returns the peak of a plan."""
        if not lengths:
            return self.base + self._plain()
        return int(_MARGIN * (self.base + self._most(lengths)))

    def _most(self, lengths: tuple[int, ...]) -> int:
        count = len(self.footprints)
        parts = spans(0, count, lengths[0])
        known: dict[Any, int] = {}
        # The first way down still has the states at all feet.
        feet, tops, most = sum(self._foot(a) for a, _ in parts), 0, 0
        for a, b in reversed(parts):
            most = max(most, feet + tops + self._down(known, a, b, lengths[1:]))
            feet -= self._foot(a)
            tops += self._checkpoint(a - 1) if a else 0
        return max(most, self._up(known, 0, count, lengths))

    def _plain(self) -> int:
        """A plain walk keeps all displacements and displaced points, too."""
        kept, most = self.open[-1] + sum(f.norms for f in self.footprints), 0
        for footprint in self.footprints:
            most = max(most, kept + footprint.moving)
            kept += footprint.state + footprint.point + footprint.waiting
        return max(most, kept + self.end[-1])

    def _down(self, known: dict[Any, int], start: int, stop: int, rest: tuple[int, ...]) -> int:
        """The peak of a way down through a span, besides what it begins with."""
        key = "down", rest, tuple(self.alike[max(0, start - 1) : stop])
        if key not in known:
            if rest:
                parts = spans(start, stop, rest[0])
                feet, most = sum(self._foot(a) for a, _ in parts[1:]), 0
                for a, b in reversed(parts):
                    most = max(most, feet + self._down(known, a, b, rest[1:]))
                    feet -= self._foot(a) if a > start else 0
            else:
                error = self.footprints[stop - 1].state
                work = max(f.pull + f.product for f in self.footprints[start:stop])
                most = self.passed[stop] - self.passed[start] + error + work
            known[key] = most
        return known[key]

    def _up(self, known: dict[Any, int], start: int, stop: int, lengths: tuple[int, ...]) -> int:
        """The peak of a way up through a span."""
        key = "up", lengths, tuple(self.alike[max(0, start - 1) : stop])
        if key not in known:
            known[key] = (
                self._through(known, start, stop, lengths)
                if lengths
                else self._segment(start, stop)
            )
        return known[key]

    def _through(
        self, known: dict[Any, int], start: int, stop: int, lengths: tuple[int, ...]
    ) -> int:
        parts = spans(start, stop, lengths[0])
        # Checkpoints of fewer digits are read into states of their own.
        kept = self.footprints[stop - 1].state if self.share < 1 else 0
        tops, feet, most = 0, sum(self._foot(a) for a, _ in parts[1:]), 0
        for a, b in reversed(parts[1:]):  # down to the first, where all tops are known
            most = max(most, kept + feet + tops + self._down(known, a, b, lengths[1:]))
            tops += self._checkpoint(a - 1)
        for a, b in parts:
            feet -= self._foot(a) if a > start else 0
            top = self._checkpoint(b - 1) if b < stop else 0
            tops -= top
            # A segment's foot and top are read into states of their own, if they must be.
            own = self._foot(a) if self.share < 1 and len(lengths) == 1 else 0
            read = self.footprints[b - 1].state if b < stop and len(lengths) == 1 else 0
            held = own + (read if self.share < 1 else top)
            most = max(most, kept + feet + tops + held + self._up(known, a, b, lengths[1:]))
        return most

    def _segment(self, start: int, stop: int) -> int:
        waiting = self.waiting[stop] - self.waiting[start]
        most = waiting + self.end[stop] - self.end[start]
        if most:  # what the walk still has in its hands by then
            last = self.footprints[stop - 1]
            most += 3 * (last.state + last.point)
        for i in range(start, stop):
            waiting = self.waiting[i] - self.waiting[start]
            if i > start and self.footprints[i - 1].update.signals:
                waiting -= self.footprints[i - 1].state  # the error below, which is open anyway
            opened, ends = self.open[stop] - self.open[i], 0
            if self.footprints[i].ends is not None:
                opened, ends = self.open[stop] - self.open[start], self._ends(start, stop - 1)
            most = max(most, opened + ends + waiting + self.footprints[i].moving)
        return most

    def _ends(self, first: int, last: int) -> int:
        (foot, _), (_, top) = (self.footprints[i].ends or (0, 0) for i in (first, last))
        return foot + top

    def _foot(self, start: int) -> int:
        return self._checkpoint(start - 1) if start else 0  # the input is the batch's own

    def _checkpoint(self, i: int) -> int:
        return int(self.footprints[i].state * self.share)


def _candidates(costs: _Costs, levels: int) -> Iterator[tuple[int, ...]]:
    """Yields span lengths near the optimum of a chain of equal blocks.

    With ``K`` spans per level, ``n`` blocks per segment and ``K^levels n = L`` the peak is about
    ``2 S K levels + C n``, which is least at ``n = 2 S K / C``.
    """
    count = len(costs.footprints)
    if levels == 0:
        yield ()
        return
    kept = 2 * costs.share * sum(f.state for f in costs.footprints) / count
    opened = max(1.0, costs.open[-1] / count)
    best = kept / opened * (count * opened / max(kept, 1e-9)) ** (1 / (levels + 1))
    tried: set[tuple[int, ...]] = set()
    for factor in (0.4, 0.5, 0.63, 0.8, 1.0, 1.25, 1.6, 2.0, 2.5):
        segment = max(1, round(best * factor))
        ratio = (count / segment) ** (1 / levels)
        for spread in (0.7, 0.85, 1.0, 1.2, 1.4):
            lengths = [segment]
            for _ in range(levels - 1):
                lengths.append(lengths[-1] * max(2, round(ratio * spread)))
            found = tuple(reversed(lengths))
            if found[0] < count and found not in tried:
                tried.add(found)
                yield found
