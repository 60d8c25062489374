"""The block that most networks are made of, a pointwise activation and Linear, without detours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mep.blocks.buffers import Shelf, shelf
from mep.blocks.closed import ClosedBlock, Point
from mep.blocks.layers import Layer, Linear
from mep.blocks.operations import Operation, Pointwise

__all__ = ["DenseBlock"]


class DensePoint(Point):
    """A point that knows where tensors like its input and like its prediction are kept."""

    def __init__(self, s: Tensor, y: Tensor, inputs: Shelf, outputs: Shelf) -> None:
        self.values, self.memos = [s, y], [None]
        self.inputs = inputs
        self.outputs = outputs


class DenseBlock(ClosedBlock):
    """``f(s) = W phi(s) + b`` on vectors: the fast path of ``ClosedBlock``, which is its reference.

    Between two products there is little arithmetic, so that Python takes a good part of the time:
    here every question is answered by one function, into buffers where there are any. States of
    more dimensions are left to the reference.
    """

    def __init__(
        self, name: str, modules: list[nn.Module], operations: list[Operation], layer: Layer
    ) -> None:
        super().__init__(name, modules, operations, layer)
        lead = operations[0]
        assert isinstance(lead, Pointwise)
        self.activation = lead.activation
        self._of_layer: dict[str, Any] = layer.module._parameters

    @staticmethod
    def fits(operations: list[Operation], layer: Layer) -> bool:
        """True for one activation that can write into buffers, and Linear."""
        if type(layer) is not Linear or len(operations) != 1:
            return False
        lead = operations[0]
        return isinstance(lead, Pointwise) and lead.activation.writes and not lead.reads_input

    def predict(self, s: Tensor) -> tuple[Tensor, Point]:
        if s.dim() != 2:
            return super().predict(s)
        weight, bias = self._of_layer["weight"], self._of_layer["bias"]
        inputs, outputs = shelf(s), shelf(s, (s.shape[0], weight.shape[0]))
        y = self.activation.value(s, out=inputs.take())
        if bias is None:
            f = torch.mm(y, weight.t(), out=outputs.take())
        else:
            f = torch.addmm(bias, y, weight.t(), out=outputs.take())
        return f, DensePoint(s, y, inputs, outputs)

    def product(self, point: Point, e: Tensor) -> Tensor:
        if not isinstance(point, DensePoint):
            return super().product(point, e)
        return torch.mm(e, self._of_layer["weight"], out=point.inputs.take())

    def pull(self, point: Point, product: Tensor) -> Tensor:
        if not isinstance(point, DensePoint):
            return super().pull(point, product)
        s, y = point.values
        return self.activation.pull(s, y, product, out=point.inputs.take())

    def difference(self, point: Point, d: Tensor) -> tuple[Tensor, Point]:
        if not isinstance(point, DensePoint):
            return super().difference(point, d)
        (s, y), inputs, outputs = point.values, point.inputs, point.outputs
        s_new, y_new, room = inputs.take(), inputs.take(), inputs.take()
        s_new = torch.add(s, d, out=s_new)
        change, y_new = self.activation.move(s, y, d, s_new, room=(room, y_new, s_new))
        delta = torch.mm(change, self._of_layer["weight"].t(), out=outputs.take())
        inputs.give(s_new)
        inputs.give(change)
        return delta, DensePoint(s, y_new, inputs, outputs)

    def advance(
        self, point: Point, d: Tensor, product: Tensor, e: Tensor
    ) -> tuple[Tensor, Point, Tensor]:
        if not isinstance(point, DensePoint):
            return super().advance(point, d, product, e)
        delta, moved = self.difference(point, d)
        force = self.pull(moved, product).sub_(e)
        norm = torch.linalg.vector_norm(force, dim=1)
        point.inputs.give(force)
        return delta, moved, norm
