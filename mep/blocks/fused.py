"""An activation and a weighted layer on maps: one pass over memory between two products."""

from __future__ import annotations

import torch
from torch import Tensor

from mep.blocks.buffers import give, take
from mep.blocks.closed import ClosedBlock, Point
from mep.blocks.elementwise import Elementwise, elementwise_of
from mep.blocks.layers import Layer
from mep.blocks.operations import Memo, Operation, Pointwise, Reshape
from mep.kernels import laid_like, rows_of

__all__ = ["FusedBlock", "FusedPoint"]


class FusedPoint(Point):
    """A point that knows its arithmetic."""

    def __init__(self, values: list[Tensor], memos: list[Memo], between: Elementwise) -> None:
        super().__init__(values, memos)
        self.between = between


class FusedBlock(ClosedBlock):
    """``f(s) = W phi(s) + b``, with changes of shape before the layer: for Conv2d, and at its end.

    The fast path of ``ClosedBlock``, which is its reference and takes whatever does not lie in
    memory sample by sample, channels first or last.
    """

    @staticmethod
    def fits(operations: list[Operation], layer: Layer) -> bool:
        """True for an activation that can write into buffers, and nothing but shapes after it."""
        lead, *others = operations or [None]
        if not isinstance(lead, Pointwise) or lead.reads_input or not lead.activation.writes:
            return False
        return all(isinstance(op, Reshape) for op in others)

    def predict(self, s: Tensor) -> tuple[Tensor, Point]:
        if s.dim() < 2 or rows_of(s) is None or torch.is_grad_enabled():
            return super().predict(s)
        lead = self.operations[0]
        assert isinstance(lead, Pointwise) and self.layer is not None
        y = lead.activation.value(s, out=_room(s))
        between = elementwise_of(lead.activation, s)
        point = FusedPoint([s, *self._shaped(y)], [None] * len(self.operations), between)
        return self.layer.apply(point.values[-1]), point

    def pull(self, point: Point, product: Tensor) -> Tensor:
        if not isinstance(point, FusedPoint):
            return super().pull(point, product)
        e, rows = self._to_pull(point, product)
        point.between.pull(*rows)
        return e

    def pull_and_square(self, point: Point, product: Tensor) -> tuple[Tensor, Tensor | float]:
        if not isinstance(point, FusedPoint):
            return super().pull_and_square(point, product)
        e, rows = self._to_pull(point, product)
        return e, point.between.pull_and_square(*rows)

    def _to_pull(self, point: FusedPoint, product: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns room for an error, and the rows of state, activity, product and error."""
        s, y, *_ = point.values
        e = _room(s)
        inner = laid_like(self._pull_through(point, product, 1), s)
        return e, [_row(t) for t in (s, y, inner, e)]

    def difference(self, point: Point, d: Tensor) -> tuple[Tensor, Point]:
        if not isinstance(point, FusedPoint):
            return super().difference(point, d)
        s, y, *_ = point.values
        change, y_new = _room(s), _room(s)
        point.between.move(*map(_row, (s, y, laid_like(d, s), change, y_new)))
        return self._pushed(point, change), self._moved_to(point, y_new)

    def advance(
        self, point: Point, d: Tensor, product: Tensor, e: Tensor, beta: float = 0.0
    ) -> tuple[Tensor, Point, Tensor]:
        if not isinstance(point, FusedPoint):
            return super().advance(point, d, product, e, beta)
        s, y, *_ = point.values
        inner = laid_like(self._pull_through(point, product, 1), s)
        change, y_new, norm = _room(s), _room(s), torch.empty_like(_row(s)[:, 0])
        laid = laid_like(d, s)
        if beta and laid is not d:
            d.add_(e, alpha=beta)
            laid, beta = laid_like(d, s), 0.0
        inner, e = _row(inner), _row(laid_like(e, s))
        point.between.nudge(
            _row(s), _row(y), _row(laid), beta, inner, e, _row(change), _row(y_new), norm
        )
        return self._pushed(point, change), self._moved_to(point, y_new), norm

    def _shaped(self, y: Tensor) -> list[Tensor]:
        """Returns an activity, and what each change of shape makes of it."""
        values = [y]
        for operation in self.operations[1:]:
            values.append(operation.apply(values[-1])[0])
        return values

    def _pushed(self, point: Point, change: Tensor) -> Tensor:
        assert self.layer is not None
        pushed = self.layer.push(self._shaped(change)[-1])
        give(change)
        return pushed

    def _moved_to(self, point: FusedPoint, y_new: Tensor) -> FusedPoint:
        # Of the state only the shape will be asked for.
        return FusedPoint([point.values[0], *self._shaped(y_new)], point.memos, point.between)


def _row(t: Tensor) -> Tensor:
    found = rows_of(t)
    assert found is not None, "laid like a state that has rows"
    return found


def _room(s: Tensor) -> Tensor:
    """Returns a tensor like a state, to write into."""
    kept = take(s) if s.is_contiguous() else None
    return torch.empty_like(s) if kept is None else kept
