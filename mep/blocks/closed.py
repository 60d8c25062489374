"""The closed-form block: parameter-free operations, then Linear or Conv2d, without a graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mep.blocks.block import Block
from mep.blocks.buffers import give, take
from mep.blocks.layers import Layer
from mep.blocks.operations import Memo, Operation, Pointwise
from mep.curvature import Signal

__all__ = ["ClosedBlock", "Point"]


@dataclass
class Point:
    """One evaluation: the input, the value after every operation, and the operations' memos."""

    values: list[Tensor]
    memos: list[Memo]


class ClosedBlock(Block):
    """``f(s) = W g(s) + b`` with ``g`` a chain of operations, all derivatives written out.

    Args:
        name: path of the weighted module in the model.
        modules: the modules that ``operations`` and ``layer`` stand for.
        operations: the parameter-free part ``g``, possibly empty.
        layer: the weighted layer, or None for a chain's trailing parameter-free block.
    """

    kind = "closed form"

    def __init__(
        self, name: str, modules: list[nn.Module], operations: list[Operation], layer: Layer | None
    ) -> None:
        super().__init__(name, modules)
        self.operations = operations
        self.layer = layer
        lead = operations[0] if operations else None
        self.box = lead.activation.box if isinstance(lead, Pointwise) else None

    def predict(self, s: Tensor) -> tuple[Tensor, Point]:
        values, memos = [s], []
        for operation in self.operations:
            y, memo = operation.apply(values[-1])
            values.append(y)
            memos.append(memo)
        a = values[-1]
        return (a if self.layer is None else self.layer.apply(a)), Point(values, memos)

    def product(self, point: Point, e: Tensor) -> Tensor:
        return e if self.layer is None else self.layer.pull(point.values[-1], e)

    def product_through(self, point: Point, e: Tensor, weight: Tensor) -> Tensor:
        assert self.layer is not None
        return self.layer.pull(point.values[-1], e, weight)

    @property
    def feedback_weight(self) -> nn.Parameter | None:
        return None if self.layer is None else self.layer.weight

    def pull(self, point: Point, product: Tensor) -> Tensor:
        return self._pull_through(point, product, 0)

    def inner(self, point: Point, product: Tensor) -> Tensor | None:
        return None if self.box is None else self._pull_through(point, product, 1)

    def at_rest(self, s: Tensor, delta: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
        assert self.box is not None
        low, high = self.box
        # Outside the box the slope is 0 and the unit keeps to its prediction; inside, it moves by
        # its error but not past a kink. Clamped in displacements, so that a unit at rest sits on
        # its kink to the last bit.
        e = _box_backward(inner, s + delta, low, high)
        lowest = torch.minimum(low - s, delta)
        highest = None if high == torch.inf else torch.maximum(high - s, delta)
        d = torch.clamp(delta + e, lowest, highest)
        spare = None if highest is None else highest - delta
        return d, torch.clamp(e, lowest - delta, spare)

    def least_force(self, s: Tensor, e: Tensor, inner: Tensor) -> Tensor:
        assert self.box is not None
        low, high = (torch.tensor(kink, dtype=s.dtype) for kink in self.box)
        below, above = torch.nextafter(low, low - 1), torch.nextafter(high, high + 1)
        one_side = _box_backward(inner, s, float(low), float(high))
        other_side = _box_backward(inner, s, float(below), float(above))
        least, most = torch.minimum(one_side, other_side), torch.maximum(one_side, other_side)
        return e - torch.clamp(e, least, most)

    def _pull_through(self, point: Point, g: Tensor, first: int) -> Tensor:
        for k in reversed(range(first, len(self.operations))):
            g = self.operations[k].pull(point.values[k], point.values[k + 1], point.memos[k], g)
        return g

    def change(self, point: Point, d: Tensor) -> Tensor:
        """Returns what a displaced input changes before the layer, ``g(s + d) - g(s)``."""
        return self._moved(point, d)[0] if self.operations else d

    def difference(self, point: Point, d: Tensor) -> tuple[Tensor, Point]:
        change, moved = self._moved(point, d)
        if self.layer is None:
            return change.clone(), moved
        pushed = self.layer.push(change)
        if change is not d:
            give(change)
        return pushed, moved

    def _moved(self, point: Point, d: Tensor) -> tuple[Tensor, Point]:
        s = point.values[0]
        s_new = torch.add(s, d, out=take(d))
        values, memos = [s_new], []
        for k, operation in enumerate(self.operations):
            x, y, memo = point.values[k], point.values[k + 1], point.memos[k]
            d, y_new, memo = operation.move(x, y, memo, d, values[-1])
            values.append(y_new)
            memos.append(memo)
        if self.operations and not self.operations[0].reads_input:
            values[0] = s  # its shape is all that will be asked for
            give(s_new)
        return d, Point(values, memos)

    def signals(self, point: Point, e: Tensor, scale: float) -> Iterator[Signal]:
        layer, a, samples = self.layer, point.values[-1], e.shape[0]
        if layer is None:
            return
        weight, bias = layer.weight, layer.bias
        bias = bias if bias is not None and bias.requires_grad else None
        gradients = _Gradients(layer, a, e, scale, bias is not None)
        several = e.dim() > 2  # positions per sample
        if weight.requires_grad:
            rows = partial(layer.rows, a, e) if layer.is_product else None
            each = partial(layer.sample_gradients, a, e) if several else None
            squares = partial(layer.sample_squares, a, e) if several else None
            yield Signal(weight, scale, samples, gradients.weight, rows, each, squares)
        if bias is not None:
            rows = partial(layer.bias_rows, e)
            each = partial(layer.sample_bias_gradients, e) if several else None
            yield Signal(bias, scale, samples, gradients.bias, rows, each)


class _Gradients:
    """The gradients of a layer, of which the bias's may come along with the weight's.

    Args:
        layer: whose they are.
        a: activity.
        e: error.
        scale: of the sum over the batch.
        both: whether both will be asked for.
    """

    def __init__(self, layer: Layer, a: Tensor, e: Tensor, scale: float, both: bool) -> None:
        self._layer, self._of, self._both = layer, (a, e, scale), both
        self._bias: Tensor | None = None

    def weight(self) -> Tensor:
        """Returns the weight's."""
        if not self._both:
            return self._layer.weight_gradient(*self._of)
        found, self._bias = self._layer.gradients(*self._of)
        return found

    def bias(self) -> Tensor:
        """Returns the bias's; it belongs to whom it was given."""
        found, self._bias = self._bias, None
        return self._layer.bias_gradient(*self._of[1:]) if found is None else found


def _box_backward(g: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """``g`` where ``low < x < high``, else 0."""
    return torch.ops.aten.hardtanh_backward(g, x, low, high)
