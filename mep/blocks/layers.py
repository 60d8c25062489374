"""Weighted layers in closed form: Linear and Conv2d.

A layer is linear in its input ``a``: ``f(a) = W a + b``. What Equilibrium Propagation needs of it
are the map, the map without its bias (for displacements), the transpose and the local gradient,
the product of presynaptic activity and postsynaptic error.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Conv2d", "Layer", "Linear", "layer_of"]


class Layer(ABC):
    """A weighted layer. Shapes: input ``a`` ``(B, *in)``, output and error ``e`` ``(B, *out)``."""

    module: nn.Linear | nn.Conv2d

    @abstractmethod
    def apply(self, a: Tensor) -> Tensor:
        """Returns ``W a + b``."""

    @abstractmethod
    def push(self, d: Tensor) -> Tensor:
        """Returns ``W d``, the displacement of the output."""

    @abstractmethod
    def pull(self, a: Tensor, e: Tensor) -> Tensor:
        """Returns ``W^T e``, with the shape of ``a``."""

    @abstractmethod
    def weight_gradient(self, a: Tensor, e: Tensor, scale: float) -> Tensor:
        """Returns ``scale sum_n e_n a_n^T`` over the batch, with the shape of the weight."""

    @abstractmethod
    def bias_gradient(self, e: Tensor, scale: float) -> Tensor:
        """Returns ``scale sum_n e_n`` over batch and positions, with the shape of the bias."""


class Linear(Layer):
    """``nn.Linear``, over any number of positions: ``(B, ..., in) -> (B, ..., out)``."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module

    def apply(self, a: Tensor) -> Tensor:
        return F.linear(a, self.module.weight, self.module.bias)

    def push(self, d: Tensor) -> Tensor:
        return F.linear(d, self.module.weight)

    def pull(self, a: Tensor, e: Tensor) -> Tensor:
        return e @ self.module.weight

    def weight_gradient(self, a: Tensor, e: Tensor, scale: float) -> Tensor:
        weight = self.module.weight  # beta=0: its values are not read
        return torch.addmm(weight, e.flatten(0, -2).t(), a.flatten(0, -2), beta=0, alpha=scale)

    def bias_gradient(self, e: Tensor, scale: float) -> Tensor:
        return e.flatten(0, -2).sum(0).mul_(scale)


class Conv2d(Layer):
    """``nn.Conv2d`` with zero padding."""

    def __init__(self, module: nn.Conv2d) -> None:
        self.module = module

    def apply(self, a: Tensor) -> Tensor:
        return self._convolve(a, self.module.bias)

    def push(self, d: Tensor) -> Tensor:
        return self._convolve(d, None)

    def pull(self, a: Tensor, e: Tensor) -> Tensor:
        return self._backward(a, e, (True, False, False))[0]

    def weight_gradient(self, a: Tensor, e: Tensor, scale: float) -> Tensor:
        return self._backward(a, e, (False, True, False))[1].mul_(scale)

    def bias_gradient(self, e: Tensor, scale: float) -> Tensor:
        return e.sum((0, 2, 3)).mul_(scale)

    def _convolve(self, a: Tensor, bias: Tensor | None) -> Tensor:
        m = self.module
        return F.conv2d(a, m.weight, bias, m.stride, m.padding, m.dilation, m.groups)

    def _backward(self, a: Tensor, e: Tensor, wanted: tuple[bool, bool, bool]) -> list[Tensor]:
        m = self.module
        return torch.ops.aten.convolution_backward(
            e, a, m.weight, None, m.stride, m.padding, m.dilation, False, (0, 0), m.groups, wanted
        )


def layer_of(module: nn.Module) -> Layer | None:
    """Returns the closed form of a weighted module, or None if it has none.

    >>> type(layer_of(nn.Linear(2, 3))).__name__
    'Linear'
    """
    if type(module) is nn.Linear:
        return Linear(module)
    if (
        type(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    ):
        return Conv2d(module)
    return None
