"""Parameter-free operations with a closed form: activation, pooling, reshaping, dropout.

Each is applied before a block's weighted layer. All share one shape: ``apply`` evaluates it and
returns a memo (pooling indices, a dropout mask) that the other two methods need.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mep.blocks.activations import Activation, of_module
from mep.kernels import is_channels_last, laid_like

__all__ = [
    "AvgPool2d",
    "Dropout",
    "MaxPool2d",
    "Operation",
    "Pointwise",
    "Reshape",
    "Scale",
    "Scaling",
    "operation_of",
]

Memo = Tensor | None


class Operation(ABC):
    """A parameter-free map ``y = g(x)`` of a batch, ``x`` of shape ``(B, *units)``.

    Attributes:
        reads_input: False if ``pull`` takes no more than its shape from ``x``.
    """

    reads_input: bool = True

    @abstractmethod
    def apply(self, x: Tensor) -> tuple[Tensor, Memo]:
        """Returns ``g(x)`` and the memo of this evaluation."""

    @abstractmethod
    def pull(self, x: Tensor, y: Tensor, memo: Memo, g: Tensor) -> Tensor:
        """Returns ``J(x)^T g`` at the evaluation that gave ``y`` and ``memo``."""

    @abstractmethod
    def move(
        self, x: Tensor, y: Tensor, memo: Memo, d: Tensor, x_new: Tensor
    ) -> tuple[Tensor, Tensor, Memo]:
        """Moves the input by ``d`` to ``x_new``.

        Returns:
            ``g(x + d) - g(x)`` without cancellation, ``g(x + d)``, and the memo there.
        """


class Pointwise(Operation):
    """An activation, unit by unit."""

    def __init__(self, activation: Activation) -> None:
        self.activation = activation
        self.reads_input = activation.reads_input

    def apply(self, x: Tensor) -> tuple[Tensor, Memo]:
        return self.activation.value(x), None

    def pull(self, x: Tensor, y: Tensor, memo: Memo, g: Tensor) -> Tensor:
        return self.activation.pull(x, y, g)

    def move(
        self, x: Tensor, y: Tensor, memo: Memo, d: Tensor, x_new: Tensor
    ) -> tuple[Tensor, Tensor, Memo]:
        return *self.activation.move(x, y, d, x_new), None


class Reshape(Operation):
    """A change of shape that keeps the batch dimension first (flatten, unflatten)."""

    def __init__(self, module: Callable[[Tensor], Tensor]) -> None:
        self.module = module

    def apply(self, x: Tensor) -> tuple[Tensor, Memo]:
        return self.module(x), None

    def pull(self, x: Tensor, y: Tensor, memo: Memo, g: Tensor) -> Tensor:
        g = g.reshape(x.shape)
        return laid_like(g, x) if is_channels_last(x) else g

    def move(
        self, x: Tensor, y: Tensor, memo: Memo, d: Tensor, x_new: Tensor
    ) -> tuple[Tensor, Tensor, Memo]:
        return self.module(d), self.module(x_new), None


class Scale(nn.Module):
    """``y = factor x``: a fixed strength of what is sent on and, in a symmetric net, back.

    Of any shape, and gives the same.

    Args:
        factor: any finite number.

    Raises:
        ValueError: if ``factor`` is no finite number.

    >>> Scale(0.5)(torch.ones(2))
    tensor([0.5000, 0.5000])
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        if not isinstance(factor, (int, float)) or not abs(factor) <= sys.float_info.max:
            raise ValueError(f"`factor` must be a finite number, got {factor}")
        self.factor = factor  # as it is: a whole number keeps whole numbers whole

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``factor x``."""
        return x * self.factor

    def extra_repr(self) -> str:
        """Returns the factor."""
        return f"{self.factor:g}"


class Scaling(Operation):
    """Multiplication by a number, a linear map."""

    reads_input = False

    def __init__(self, module: Scale) -> None:
        self.factor = module.factor

    def apply(self, x: Tensor) -> tuple[Tensor, Memo]:
        return x * self.factor, None

    def pull(self, x: Tensor, y: Tensor, memo: Memo, g: Tensor) -> Tensor:
        return g * self.factor

    def move(
        self, x: Tensor, y: Tensor, memo: Memo, d: Tensor, x_new: Tensor
    ) -> tuple[Tensor, Tensor, Memo]:
        return d * self.factor, x_new * self.factor, None


class AvgPool2d(Operation):
    """Average pooling, a linear map."""

    def __init__(self, module: nn.AvgPool2d) -> None:
        self.module = module

    def apply(self, x: Tensor) -> tuple[Tensor, Memo]:
        return self.module(x), None

    def pull(self, x: Tensor, y: Tensor, memo: Memo, g: Tensor) -> Tensor:
        m = self.module
        sizes = (_pair(size) for size in (m.kernel_size, m.stride, m.padding))
        rest = (m.ceil_mode, m.count_include_pad, m.divisor_override)
        return torch.ops.aten.avg_pool2d_backward(g, x, *sizes, *rest)

    def move(
        self, x: Tensor, y: Tensor, memo: Memo, d: Tensor, x_new: Tensor
    ) -> tuple[Tensor, Tensor, Memo]:
        delta = self.module(d)
        return delta, y + delta, None


class MaxPool2d(Operation):
    """Max pooling; the memo holds the indices of the winners."""

    def __init__(self, module: nn.MaxPool2d) -> None:
        self.module = module

    def apply(self, x: Tensor) -> tuple[Tensor, Memo]:
        m = self.module
        sizes = (_pair(size) for size in (m.kernel_size, m.stride, m.padding, m.dilation))
        return F.max_pool2d_with_indices(x, *sizes, ceil_mode=m.ceil_mode)

    def pull(self, x: Tensor, y: Tensor, memo: Memo, g: Tensor) -> Tensor:
        assert memo is not None
        back = torch.zeros_like(x).flatten(2)
        # scatter_add: windows may overlap, and then one winner serves several outputs.
        return back.scatter_add_(2, memo.flatten(2), g.flatten(2)).view_as(x)

    def move(
        self, x: Tensor, y: Tensor, memo: Memo, d: Tensor, x_new: Tensor
    ) -> tuple[Tensor, Tensor, Memo]:
        y_new, winners = self.apply(x_new)
        assert winners is not None
        index = winners.flatten(2)
        # An unchanged winner contributes exactly its own displacement: the bracket is 0.
        moved = x.flatten(2).gather(2, index).view_as(y) - y
        return moved + d.flatten(2).gather(2, index).view_as(y), y_new, winners


class Dropout(Operation):
    """Dropout whose mask, drawn once in the free phase, serves every phase of the step."""

    def __init__(self, module: nn.Dropout) -> None:
        self.module = module

    def apply(self, x: Tensor) -> tuple[Tensor, Memo]:
        p = self.module.p
        if not self.module.training or p == 0:
            return x, None
        # Drawn in float32 whatever the dtype, so that a float64 replay meets the same mask.
        kept = torch.rand(x.shape, device=x.device) >= p
        mask = kept.to(x.dtype) / (1 - p) if p < 1 else torch.zeros_like(x)
        return x * mask, mask

    def pull(self, x: Tensor, y: Tensor, memo: Memo, g: Tensor) -> Tensor:
        return g if memo is None else g * memo

    def move(
        self, x: Tensor, y: Tensor, memo: Memo, d: Tensor, x_new: Tensor
    ) -> tuple[Tensor, Tensor, Memo]:
        delta = self.pull(x, y, memo, d)
        return delta, y + delta, memo


def _pair(size: int | tuple[int, ...]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)


def _is_plain_max_pool(module: nn.Module) -> bool:
    return type(module) is nn.MaxPool2d and not module.return_indices


def operation_of(module: nn.Module) -> Operation | None:
    """Returns the closed form of a parameter-free module, or None if it has none.

    >>> type(operation_of(nn.Flatten())).__name__
    'Reshape'
    >>> operation_of(nn.LogSoftmax(1)) is None
    True
    """
    activation = of_module(module)
    if activation is not None:
        return Pointwise(activation)
    if type(module) is nn.Flatten and module.start_dim >= 1:
        return Reshape(module)
    if type(module) is nn.Unflatten and isinstance(module.dim, int) and module.dim >= 1:
        return Reshape(module)
    if type(module) is Scale:
        return Scaling(module)
    if type(module) is nn.Dropout:
        return Dropout(module)
    if type(module) is nn.AvgPool2d:
        return AvgPool2d(module)
    if _is_plain_max_pool(module):
        return MaxPool2d(module)  # pyright: ignore[reportArgumentType]
    return None
