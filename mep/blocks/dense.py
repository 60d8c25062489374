"""The block that most networks are made of, a pointwise activation and Linear, without detours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mep.blocks.buffers import Shelf, shelf
from mep.blocks.closed import ClosedBlock, Point
from mep.blocks.elementwise import Elementwise, elementwise_of
from mep.blocks.layers import Layer, Linear
from mep.blocks.operations import Operation, Pointwise

if TYPE_CHECKING:
    from mep.blocks.passes import Passes

__all__ = ["DenseBlock", "DensePoint"]


class DensePoint(Point):
    """A point that knows its arithmetic, and where tensors like its input and prediction are.

    Attributes:
        passes: those of the run that has made it together with its other blocks', if one has.
    """

    def __init__(
        self,
        s: Tensor,
        y: Tensor,
        between: Elementwise,
        inputs: Shelf,
        outputs: Shelf,
        passes: Passes | None = None,
    ) -> None:
        self.values, self.memos = [s, y], [None]
        self.between = between
        self.inputs = inputs
        self.outputs = outputs
        self.passes = passes

    def moved(self, y: Tensor) -> DensePoint:
        """Returns the point at a displaced state, whose activity is ``y``."""
        return DensePoint(self.values[0], y, self.between, self.inputs, self.outputs, self.passes)

    def room(self) -> Tensor:
        """Returns a tensor like the input, to write into."""
        kept = self.inputs.take()
        return torch.empty_like(self.values[0]) if kept is None else kept


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
        self._transpose: tuple[tuple, Tensor] | None = None

    @property
    def weight(self) -> nn.Parameter:
        """The weight as it is now."""
        return self._of_layer["weight"]

    @property
    def transpose(self) -> Tensor:
        """The weight's transpose: a view that is kept, for a new one costs as much as an addition.

        While it is kept, its memory is nobody else's, so that address and layout tell whose it is.
        """
        weight = self._of_layer["weight"]
        where = weight.data_ptr(), weight.shape, weight.stride()
        if self._transpose is None or self._transpose[0] != where:
            self._transpose = where, weight.detach().t()
        return self._transpose[1]

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias as it is now, if there is one."""
        return self._of_layer["bias"]

    @property
    def width(self) -> int:
        """Number of inputs."""
        return self._of_layer["weight"].shape[1]

    @property
    def height(self) -> int:
        """Number of outputs."""
        return self._of_layer["weight"].shape[0]

    @staticmethod
    def fits(operations: list[Operation], layer: Layer) -> bool:
        """True for one activation that can write into buffers, and Linear."""
        if type(layer) is not Linear or len(operations) != 1:
            return False
        lead = operations[0]
        return isinstance(lead, Pointwise) and lead.activation.writes and not lead.reads_input

    def predict(self, s: Tensor) -> tuple[Tensor, Point]:
        if s.dim() != 2 or not s.is_contiguous() or torch.is_grad_enabled():
            return super().predict(s)
        inputs, outputs = shelf(s), shelf(s, (s.shape[0], self.height))
        y = self.activation.value(s, out=inputs.take())
        point = DensePoint(s, y, elementwise_of(self.activation, s), inputs, outputs)
        if self.bias is None:
            return torch.mm(y, self.transpose, out=outputs.take()), point
        return torch.addmm(self.bias, y, self.transpose, out=outputs.take()), point

    def product(self, point: Point, e: Tensor) -> Tensor:
        if not isinstance(point, DensePoint):
            return super().product(point, e)
        return torch.mm(e, self.weight, out=point.inputs.take())

    def pull(self, point: Point, product: Tensor) -> Tensor:
        if not isinstance(point, DensePoint):
            return super().pull(point, product)
        e = point.room()
        s, y = point.values
        point.between.pull(s, y, product.contiguous(), e)
        return e

    def difference(self, point: Point, d: Tensor) -> tuple[Tensor, Point]:
        if not isinstance(point, DensePoint) or not d.is_contiguous():
            return super().difference(point, d)
        (s, y), change, y_new = point.values, point.room(), point.room()
        point.between.move(s, y, d, change, y_new)
        delta = torch.mm(change, self.transpose, out=point.outputs.take())
        point.inputs.give(change)
        return delta, point.moved(y_new)

    def advance(
        self, point: Point, d: Tensor, product: Tensor, e: Tensor, beta: float = 0.0
    ) -> tuple[Tensor, Point, Tensor]:
        if not isinstance(point, DensePoint) or not d.is_contiguous():
            return super().advance(point, d, product, e, beta)
        (s, y), change, y_new = point.values, point.room(), point.room()
        norm = torch.empty_like(d[:, 0])
        product, e = product.contiguous(), e.contiguous()
        point.between.nudge(s, y, d, beta, product, e, change, y_new, norm)
        delta = torch.mm(change, self.transpose, out=point.outputs.take())
        point.inputs.give(change)
        return delta, point.moved(y_new), norm
