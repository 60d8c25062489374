"""Steps of a multilayer perceptron, captured: the fast paths of ``contrast``.

Between two products of a small net there is time for little, and nothing here comes back to Python
between two layers. The references are ``contrast``, which takes every other chain, and, within a
memory budget, ``BlockSegments``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mep.contrast.estimate import Estimate
from mep.contrast.layers import Layers, Parameters
from mep.contrast.segments import Mark, Segments, Span
from mep.contrast.settings import Settings
from mep.contrast.stencils import one_sided
from mep.contrast.strength import AutoBeta
from mep.energies import CrossEntropy, PredictionError, Squared, SquaredError
from mep.kernels import DESCENT, SWEEP, SWEEPS, capture, capture_segments, kernels_of
from mep.kernels import LIMIT as LIMITED
from mep.memory import Footprint, phase, show_use
from mep.settling import (
    DIVERGED,
    DIVERGENCE,
    LIMIT,
    TRANSPOSE,
    GradientDescent,
    Limit,
    Residual,
    Sweep,
    may_stop,
    verdict,
)

if TYPE_CHECKING:
    from mep.kernels.captured import Captured, Swung
    from mep.kernels.segments import CapturedSegments, Segment

__all__ = ["Flat", "FlatSegments", "Lesson", "Room", "Swept"]

_MOST_WIDTHS = 4


@dataclass(frozen=True, slots=True)
class Swept:
    """What a step is made of.

    Attributes:
        estimate: the verdict.
        captured: activities and errors, and how to learn from them.
        learned: whether that has been done.
    """

    estimate: Estimate
    captured: Captured
    learned: bool


@dataclass
class Room:
    """What there is room for: part of what a run needs to go on as it would have.

    Attributes:
        further: sweeps after the first, once a batch has needed one.
    """

    further: bool = False


class Flat:
    """Steps of a perceptron.

    Args:
        layers: the net's.
        how: the strategy, one that ``fits``; its strength is told step by step.
        room: what there is room for; another place may keep it.
    """

    def __init__(self, layers: Layers, how: Settings, room: Room) -> None:
        self.layers, self.how, self._room = layers, how, room
        self._known: list[Any] = []
        self._captured: Captured | None = None

    @staticmethod
    def fits(how: Settings) -> bool:
        """Returns whether all that is asked for is sweeps, or steps downhill."""
        settler, cost = how.settler, how.cost
        return (
            type(settler) in (Limit, Sweep, GradientDescent)
            and settler.feedback == TRANSPOSE
            and how.stencil is one_sided
            and type(how.energy) is PredictionError
            and type(how.energy.output) is Squared
            and (type(cost) is SquaredError or (type(cost) is CrossEntropy and not cost.classes))
        )

    def goes_by(self, how: Settings) -> bool:
        """Returns whether a strategy is the same but for its strength."""
        return how is self.how or replace(how, beta=self.how.beta) == self.how

    def sweep(
        self,
        x: Tensor,
        target: Tensor,
        parameters: Parameters,
        beta: float | AutoBeta,
        teach: Callable[[Captured], None] | None,
    ) -> Swept | None:
        """Takes free phase, backward sweep and nudged phase; nothing here makes a graph.

        Args:
            x: input, ``(B, *in)``.
            target: target as the cost takes it.
            parameters: the layers' as they are now.
            beta: strength of the nudge.
            teach: says how to learn; what one sweep settles then learns in the same call. None
                leaves it to the caller.

        Returns:
            None where the reference is asked for: tensors without kernels, an input that does not
            fit, loss or gradients that may not be finite.

        Raises:
            TypeError, ValueError: if the target does not fit.
        """
        if not isinstance(x, Tensor) or x.dim() < 2 or not x.numel():
            return None
        if x.dim() > 2 and not self.layers.flattens:
            return None
        settler = self.how.settler
        if isinstance(settler, GradientDescent) and settler.max_steps < len(self.layers):
            return None  # not every layer gets a signal, as the reference says
        with phase("mep: settle"):
            # As it lies in memory it is ``(B, in)`` already, unless it lies otherwise.
            a = x if x.is_contiguous() and not x.is_neg() else _entering(x)
            captured = self._capture_for(a, *parameters)
            if captured is None:
                return None
            show_use(captured.tensors, "states")
            if teach is not None:
                teach(captured)
            swept = self._settled(captured, a, target, beta, self._at_once if teach else -1.0)
        if swept is None and captured.settling != self._settling:  # one was not enough
            del captured  # before there are others
            return self.sweep(x, target, parameters, beta, teach)
        return swept

    @property
    def _at_once(self) -> float:
        """The median residual up to which a first sweep is the last; negative where it is not."""
        settler = self.how.settler
        if isinstance(settler, GradientDescent):
            return -1.0
        if settler.max_steps <= 1:
            return DIVERGENCE
        return -1.0 if settler.tol is None else min(settler.tol, DIVERGENCE)

    def _capture_for(
        self, a: Tensor, weights: list[nn.Parameter], biases: list[nn.Parameter | None]
    ) -> Captured | None:
        """Returns the tensors of a step; the last ones, where nothing has become another."""
        if kernels_of(self.layers.activations[0], a) is None:
            return None
        settling = self._settling
        known: list[Any] = [
            p if p is None else (p.data_ptr(), p.shape, p.dtype, p.is_contiguous())
            for p in (*weights, *biases)
        ]
        known += a.shape, settling
        if known != self._known:
            squared = type(self.how.cost) is SquaredError
            self._captured = None  # before there are others
            layers = self.layers
            self._captured = capture(
                layers.activations, weights, biases, layers.skips, _entering(a), squared, settling
            )
            self._known = known
        return self._captured

    def _settled(
        self, captured: Captured, a: Tensor, target: Tensor, nudge: float | AutoBeta, at_once: float
    ) -> Swept | None:
        share, given = (nudge.c, 0.0) if isinstance(nudge, AutoBeta) else (0.0, nudge)
        first = captured.sweep(a, self._goal(target, captured.output), share, given, at_once)
        if first is None:
            return None
        settler, end, steps, status = self.how.settler, first.end, 0, LIMIT
        if not isinstance(settler, Limit):
            settled = self._nudged(captured, end)
            if settled is None:
                return None
            end, steps = settled
            status = verdict(end.total, end.median, settler.tol)
        if status == DIVERGED:
            return None
        if not first.learned and captured.largest > torch.finfo(a.dtype).max:
            return None
        balance = Residual(end.residual, end.nudge)
        found = Estimate(first.loss, balance, steps, status, first.beta)
        return Swept(found, captured, first.learned)

    def _goal(self, target: Tensor, output: Tensor) -> Tensor:
        """Returns the target as the compiled cost takes it."""
        if (
            type(self.how.cost) is CrossEntropy
            and isinstance(target, Tensor)
            and target.dtype == torch.int64
            and target.device == output.device
            and target.shape == output.shape[:1]
        ):
            return target.contiguous()  # classes that there are not leave no loss
        return self.how.cost.prepare(target, output).contiguous().resolve_neg()

    @property
    def _settling(self) -> str:
        """What a step needs room for."""
        if isinstance(self.how.settler, GradientDescent):
            return DESCENT
        if isinstance(self.how.settler, Limit):
            return LIMITED
        return SWEEPS if self._room.further else SWEEP

    def _nudged(self, captured: Captured, first: Swung) -> tuple[Swung, int] | None:
        """Settles the nudged phase, as the settling loop does.

        Args:
            captured: where.
            first: what the first sweep has left to settle.

        Returns:
            What is left to settle, and how many sweeps or steps it took; None if there is no room
            for another sweep yet, or nothing to settle.
        """
        settler = self.how.settler
        if isinstance(settler, GradientDescent):
            return self._downhill(captured, first, settler)
        found, sweeps = first, 1
        while sweeps < settler.max_steps and not may_stop(settler, [found.median]):
            if captured.settling == SWEEP:
                self._room.further = True
                return None
            found, sweeps = captured.again(), sweeps + 1
        return found, sweeps

    def _downhill(
        self, captured: Captured, first: Swung, settler: GradientDescent
    ) -> tuple[Swung, int] | None:
        """Goes downhill; None also where layers get no signal, which the reference warns of."""
        captured.begin(settler.lr, settler.momentum)
        found, steps = None, 0
        if settler.tol is None:
            found, steps = captured.relax(settler.max_steps), settler.max_steps
        history = [float(first.residual.median())]
        while steps < settler.max_steps and not may_stop(settler, history):
            found, steps = captured.relax(1), steps + 1
            history.append(found.median)
        return None if found is None or captured.silent() else (found, steps)


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a segment can learn.

    Attributes:
        span: its layers.
        most: bound on the norm of every gradient.
        take: takes the step: addresses of the weights' and biases' momenta, and the numbers of the
            rule, as ``CapturedSegments.learn`` does.
    """

    span: Span
    most: float
    take: Callable[[Sequence[int], Sequence[int], Tensor], None]


class FlatSegments(Segments):
    """The passes over a perceptron's segments, compiled.

    Args:
        layers: the net's.
        captured: the passes.
        kinds: numbers of the activations, one below every layer but the first.
        a: the input as the first layer takes it, ``(B, in)``.
        x: the input.
        teach: called with every segment's lesson, from input to output, which it may take or not.
    """

    draws = False

    def __init__(
        self,
        layers: Layers,
        captured: CapturedSegments,
        kinds: list[int],
        a: Tensor,
        x: Tensor,
        teach: Callable[[Lesson], None],
    ) -> None:
        self._layers, self._captured, self._kinds = layers, captured, kinds
        self._a, self._teach = a, teach
        self._copied = a.nbytes if a.data_ptr() != x.data_ptr() else 0

    @classmethod
    def of(cls, layers: Layers, x: Tensor, teach: Callable[[Lesson], None]) -> FlatSegments | None:
        """Returns the passes for a batch; None where there are no kernels for them.

        Args:
            layers: the net's, whose parameters are looked at.
            x: input, ``(B, *in)``, checked.
            teach: as for the class.
        """
        if x.dim() < 2 or not x.numel() or (x.dim() > 2 and not layers.flattens):
            return None
        a, (weights, biases) = _entering(x), layers.parameters()
        # Layers of one width share what nobody keeps.
        if len({len(weight) for weight in weights}) > _MOST_WIDTHS:
            return None
        found = capture_segments(layers.activations, weights, biases, layers.skips, a)
        return found and cls(layers, *found, a, x, teach)

    def __len__(self) -> int:
        return len(self._layers)

    def forward(self, span: Span, s: Tensor, x: Tensor | None) -> Tensor:
        return self._captured.ascend(self._segment(span), self._a if span[0] == 0 else s)

    def descend(self, span: Span, mark: Mark, e: Tensor, *, measure: bool) -> tuple[Tensor, float]:
        foot = self._foot(span, mark)
        return self._captured.descend(self._segment(span), foot, _error(e, foot))

    def climb(self, span: Span, mark: Mark, e: Tensor, beta: float, scale: float) -> None:
        segment, foot = self._segment(span), self._foot(span, mark)
        if self.moved is None:
            self.squares = torch.zeros(len(e), dtype=torch.float64, device=e.device)
        climbed = self._captured.climb(
            segment, foot, _error(e, foot), self.moved, self.squares, beta
        )
        self.moved = climbed.moved
        # `learn` divides by the batch by itself: the weights of one node are 1 / beta.
        with phase("mep: contrast"):
            self._teach(Lesson(span, climbed.most, partial(self._captured.learn, segment, climbed)))

    @property
    def standing(self) -> int:
        """Returns the bytes taken all the time: a job, forces per sample, a copy of the input."""
        return self._captured.by_call + 8 * len(self._a) + self._copied

    @property
    def widths(self) -> list[int]:
        """Units of every layer."""
        return [weight.shape[0] for weight in self._layers.parameters()[0]]

    def footprints(self) -> list[Footprint]:
        """Returns what the layers take in memory."""
        known: dict[Any, Footprint] = {}
        found, below, widths = [], 0, self.widths
        unit, rooms, skips = 4 * len(self._a), sum({*widths}), any(self._layers.skips)
        for own in widths:
            key = own, below
            if key not in known:
                # Activity, and with a skip the error and what has come through; room for what
                # passes by; the foot's displacement; state and displacement of the top.
                known[key] = Footprint(
                    unit * own, unit * below + self._captured.by_layer, 2 * unit * below * skips,
                    unit * (2 * max(own, below) + 1), pull=2 * unit * rooms,
                    ends=(unit * below, 2 * unit * own),
                )  # fmt: skip
            found.append(known[key])
            below = own
        return found

    def _segment(self, span: Span) -> Segment:
        start, stop = span
        weights, biases = self._layers.parameters(start, stop)
        kinds, skips = self._kinds[max(start - 1, 0) : stop - 1], self._layers.skips[start:stop]
        return self._captured.segment(kinds, weights, biases, skips, foot=start > 0)

    def _foot(self, span: Span, mark: Mark) -> Tensor:
        return self._a if span[0] == 0 else mark.state


def _error(e: Tensor, s: Tensor) -> Tensor:
    """Returns an error as the passes take it; the topmost one comes from a cost, any user's."""
    if e.dtype != s.dtype or e.device != s.device:
        raise TypeError(
            f"the cost's gradient must be {s.dtype} on {s.device}, as the states are, got "
            f"{e.dtype} on {e.device}"
        )
    return e.contiguous()


def _entering(x: Tensor) -> Tensor:
    """Returns the input as the first layer takes it, ``(B, in)``."""
    return (x if x.dim() == 2 else x.flatten(1)).contiguous().resolve_neg()
