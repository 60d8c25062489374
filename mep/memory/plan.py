"""Plans: what is kept, what is computed again, so that a step stays within its budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

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
    """

    state: int
    point: int
    product: int
    work: int
    norms: int = 0
    update: Update = _NONE

    @property
    def moving(self) -> int:
        """The most that comes and goes."""
        at_once = 0 if self.update.waits else self.update.gradients + self.update.rule
        return max(self.work, at_once)

    @property
    def waiting(self) -> int:
        """What waits for the end of the segment, besides signals."""
        return self.update.gradients if self.update.waits else 0

    @property
    def open(self) -> int:
        """What the block takes while its segment is worked on."""
        return 2 * self.state + self.point + self.product


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
) -> Plan:
    """Finds the plan with the fewest passes that keeps to a budget, and of these the smallest.

    Args:
        footprints: of every block.
        budget: bytes, > 0.
        base: bytes taken all the time (the batch, the output).
        share: of a state's bytes that its checkpoint takes (0.5 for half the digits).

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
    least = None
    for levels in range(int(math.log2(max(2, len(footprints)))) + 1):
        found = [(costs.peak(lengths), lengths) for lengths in _candidates(costs, levels)]
        if not found:
            continue
        peak, lengths = min(found)
        if peak <= budget:
            return Plan(budget, len(footprints), lengths, peak)
        least = peak if least is None else min(least, peak)
    assert least is not None, "a chain has blocks, and no level at all is always a candidate"
    raise ValueError(
        f"`memory_budget={show(budget)}` is not enough for this model and batch: the least that "
        f"works is {show(least)}"
    )


class _Costs:
    """Adds up footprints for any plan; a walk over all blocks in Python is taken only once."""

    def __init__(self, footprints: Sequence[Footprint], base: int, share: float) -> None:
        self.footprints = footprints
        self.base = base
        self.share = share
        self.open = [0, *accumulate(f.open for f in footprints)]
        signals = (f.state + f.point if f.update.signals else 0 for f in footprints)
        waiting = (f.waiting + kept for f, kept in zip(footprints, signals, strict=True))
        self.waiting = [0, *accumulate(waiting)]
        # At the end of a segment, all of its updates together.
        self.end = [0, *accumulate(f.update.rule if f.update.waits else 0 for f in footprints)]

    def peak(self, lengths: tuple[int, ...]) -> int:
        count = len(self.footprints)
        return self.base + (self._span(0, count, lengths) if lengths else self._plain())

    def _plain(self) -> int:
        """A plain walk keeps all displacements and displaced points, too."""
        kept, most = self.open[-1] + sum(f.norms for f in self.footprints), 0
        for footprint in self.footprints:
            most = max(most, kept + footprint.moving)
            kept += footprint.state + footprint.point + footprint.waiting
        return max(most, kept + self.end[-1])

    def _span(self, start: int, stop: int, lengths: tuple[int, ...]) -> int:
        if not lengths:
            return self._segment(start, stop)
        parts = spans(start, stop, lengths[0])
        # A checkpoint of fewer digits is read into a state of its own.
        most, kept = 0, 0 if self.share == 1 else self.footprints[stop - 1].state
        inner: dict[tuple[int, int, int], int] = {}
        for a, b in reversed(parts):  # the way up: what is above is still kept
            if b < stop:
                kept += self._checkpoint(b - 1)  # the error at its top
            most = max(most, kept + self._once(inner, a, b, lengths[1:]))
            if a > start:
                kept += self._checkpoint(a - 1)  # the state at its foot
        return most

    def _once(
        self, known: dict[tuple[int, int, int], int], a: int, b: int, rest: tuple[int, ...]
    ) -> int:
        """Spans with the same number of blocks and bytes are taken to be alike."""
        key = b - a, self.open[b] - self.open[a], self.waiting[b] - self.waiting[a]
        if key not in known:
            known[key] = self._span(a, b, rest)
        return known[key]

    def _segment(self, start: int, stop: int) -> int:
        last = self.footprints[stop - 1]
        most = self.waiting[stop] - self.waiting[start] + self.end[stop] - self.end[start]
        most += 3 * (last.state + last.point)  # what the walk still has in its hands
        for i in range(start, stop):
            waiting = self.waiting[i] - self.waiting[start]
            most = max(most, self.open[stop] - self.open[i] + waiting + self.footprints[i].moving)
        return most

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
