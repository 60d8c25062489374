"""A perceptron walked through a segment at a time, in compiled calls, with little memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mep.kernels.job import HEAD, NUMBERS, SUMS, TABLES, Job, addresses, empty
from mep.kernels.library import Native
from mep.kernels.perceptron import ascend, climb, descend, learn
from mep.kernels.team import call

__all__ = ["CapturedSegments", "Climbed", "Segment"]


@dataclass(frozen=True)
class Segment:
    """Layers in a row.

    Attributes:
        kinds: numbers of the activations, one below every layer, but for the chain's first.
        weights: ``(out, in)`` each.
        biases: ``(out,)`` each, or None.
        skips: whether a skip leads around a layer.
        foot: whether another layer comes before them, whose state is their input.
    """

    kinds: Sequence[int]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    skips: Sequence[bool]
    foot: bool

    @cached_property
    def widths(self) -> list[int]:
        """Units of every state, the foot's among them."""
        own = [w.shape[0] for w in self.weights]  # len() takes longer
        return [self.weights[0].shape[1], *own] if self.foot else own


@dataclass(frozen=True)
class Climbed:
    """What the nudged sweep through a segment leaves.

    Attributes:
        moved: displacement of the last state, ``(B, out)``.
        job: with all addresses, for ``learn``.
        kept: what these are addresses of.
        most: bound on the norm of every gradient.
    """

    moved: Tensor
    job: Job
    kept: list[Tensor]
    most: float


_Rooms = Callable[[Sequence[int], list[Tensor]], list[int]]


class CapturedSegments:
    """Walks through segments on batches of one size: float32, on a CPU.

    Args:
        found: functions of torch's libraries.
        batch: number of samples.

    Attributes:
        segment: makes a ``Segment``.
        by_layer: bytes that a layer takes in a job, and in the numbers of its rule on their way.
        by_call: bytes that a job takes besides, a foot's among them.
    """

    segment = Segment
    by_layer = 8 * (len(TABLES) + 2 * NUMBERS + 2)
    by_call = 8 * (HEAD + len(TABLES) + 2 * NUMBERS)

    def __init__(self, found: Native, batch: int) -> None:
        self._native, self._batch = found, batch
        self._sums = np.zeros((torch.get_num_threads(), SUMS))

    def ascend(self, segment: Segment, s: Tensor) -> Tensor:
        """Returns the state above a segment: ``s_k = W_k phi(s_{k-1}) + b_k``.

        Args:
            segment: the layers.
            s: what they begin with, ``(B, in)``, contiguous.
        """
        top, kept = empty(self._batch, segment.widths[-1]), list[Tensor]()
        job = self._job(segment, s, kept)
        states = self._states(segment, s, self._shared, kept)
        job.fill(s=[*states[:-1], top.data_ptr()], y=self._shared(segment.widths, kept))
        self._call(ascend, segment, job, 1)
        return top

    def descend(self, segment: Segment, s: Tensor, e: Tensor) -> tuple[Tensor, float]:
        """Returns the error at the foot (or at the first state), and the squares of all below.

        Args:
            segment: the layers.
            s: what they begin with.
            e: the error at their last state, ``(B, out)``, contiguous.
        """
        widths, kept = segment.widths, list[Tensor]()
        if len(widths) == 1:  # nothing is pulled through the first layer
            return e, 0.0
        job, below, most = self._job(segment, s, kept), empty(self._batch, widths[0]), max(widths)
        errors, passing = [below.data_ptr(), *[0] * (len(widths) - 2)], empty(self._batch, most)
        if any(segment.skips):
            errors[1:] = self._shared(widths, kept)[1:-1]
        errors.append(e.data_ptr())
        job.set(most=most, change=passing.data_ptr())
        job.fill(
            s=self._states(segment, s, self._shared, kept), e=errors,
            y=[*self._apart(widths[:-1], kept), 0], p=[*self._shared(widths[:-1], kept), 0],
            through=self._through(segment, errors, kept, apart=False),
        )  # fmt: skip
        self._call(descend, segment, job, 2)
        return below, float(self._sums[:, 1].sum())

    def climb(
        self,
        segment: Segment,
        s: Tensor,
        e: Tensor,
        moved: Tensor | None,
        forces: Tensor,
        beta: float,
    ) -> Climbed:
        """Takes the nudged sweep: ``d_k = W_k (phi(s_{k-1} + d_{k-1}) - phi(s_{k-1})) + beta e_k``.

        Args:
            segment: the layers.
            s: what they begin with.
            e: the error at their last state.
            moved: displacement of the foot; None without one.
            forces: squares of the forces so far, ``(B,)`` float64; those from here are added.
            beta: nudging strength.
        """
        widths, kept = segment.widths, [s, e]
        job, leaves, most = self._job(segment, s, kept), empty(*e.shape), max(widths)
        below = self._apart(widths[:-1], kept) if any(segment.skips) else [0] * (len(widths) - 1)
        errors = [*below, e.data_ptr()]
        job.fill(
            s=self._states(segment, s, self._apart, kept),
            y=[*self._apart(widths[:-1], kept), 0], p=[*self._apart(widths[:-1], kept), 0],
            e=errors, through=self._through(segment, errors, kept, apart=True),
        )  # fmt: skip
        passing = [empty(self._batch, n) for n in (most, most, 1)]  # goes with this call
        number = np.array([beta])
        job.set(
            most=most, change=passing[0].data_ptr(), moved=passing[1].data_ptr(),
            norm=passing[2].data_ptr(), forces=forces.data_ptr(), beta=number.ctypes.data,
            enters=0 if moved is None else moved.data_ptr(), leaves=leaves.data_ptr(),
        )  # fmt: skip
        self._call(climb, segment, job, 3)
        top, below, entering, active, *_ = self._sums.sum(0).tolist()
        # |G| <= |e| |a| / B, and what is below a bias is 1 for every sample.
        bound = math.sqrt((top + below) * (entering + active + self._batch))
        return Climbed(leaves, job, kept, bound)

    def learn(
        self,
        segment: Segment,
        climbed: Climbed,
        weights: Sequence[int],
        biases: Sequence[int],
        numbers: Tensor,
    ) -> None:
        """Takes the step at the states that have been climbed to.

        Args:
            segment: the layers.
            climbed: what ``climb`` has left.
            weights: addresses of the weights' momenta; 0 for one without.
            biases: the same of the biases.
            numbers: ``(2, n, 5)`` float64, for weights and biases, as in ``Captured.numbers``; any
                for the foot, which learns nothing.
        """
        none = [0] if segment.foot else []
        weights, biases = [*none, *weights], [*none, *biases]
        climbed.job.fill(weight_momentum=weights, bias_momentum=biases)
        climbed.job.set(numbers=numbers.data_ptr())
        call(self._native, learn, climbed.job.array, self._batch, self._work(segment))

    def _job(self, segment: Segment, s: Tensor, kept: list[Tensor]) -> Job:
        """Returns a job with what every walk needs."""
        none = [0] if segment.foot else []
        job = Job(len(segment.widths))
        job.fill(
            width=segment.widths, kind=[*segment.kinds, 0],
            weight=[*none, *addresses(segment.weights)],
            bias=[*none, *addresses(segment.biases)], skip=[*none, *segment.skips],
        )  # fmt: skip
        if not segment.foot:
            job.set(x=s.data_ptr(), inputs=s.shape[1])
        kept += [s, job.tensor]
        return job

    def _states(self, segment: Segment, s: Tensor, rooms: _Rooms, kept: list[Tensor]) -> list[int]:
        if not segment.foot:
            return rooms(segment.widths, kept)
        return [s.data_ptr(), *rooms(segment.widths[1:], kept)]

    def _through(
        self, segment: Segment, errors: list[int], kept: list[Tensor], *, apart: bool
    ) -> list[int]:
        """What comes through the next layer is the error itself, unless a skip leads around it."""
        skips = [*segment.skips[0 if segment.foot else 1 :], False]
        if not any(skips):
            return errors
        rooms = (self._apart if apart else self._shared)(segment.widths[:-1], kept)
        chosen = zip([*rooms, 0], skips, errors, strict=True)
        return [room if skip else e for room, skip, e in chosen]

    def _apart(self, widths: Sequence[int], kept: list[Tensor]) -> list[int]:
        """Returns where every layer has memory of its own."""
        whole = empty(self._batch * sum(widths))
        kept.append(whole)
        starts = np.cumsum([0, *widths])[:-1] * (4 * self._batch)
        return (starts + whole.data_ptr()).tolist()

    def _shared(self, widths: Sequence[int], kept: list[Tensor]) -> list[int]:
        """Returns the same where layers of one width have theirs together."""
        rooms = {n: empty(self._batch, n) for n in {*widths}}
        kept += rooms.values()
        return [rooms[n].data_ptr() for n in widths]

    def _work(self, segment: Segment) -> int:
        return self._batch * sum(w.numel() for w in segment.weights)

    def _call(self, loop: object, segment: Segment, job: Job, passes: int) -> None:
        if len(self._sums) < torch.get_num_threads():
            self._sums = np.zeros((torch.get_num_threads(), SUMS))
        self._sums[:] = 0
        job.set(sums=self._sums.ctypes.data)
        call(self._native, loop, job.array, self._batch, passes * self._work(segment))
