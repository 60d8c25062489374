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

from mep.blocks.buffers import made_again, take
from mep.kernels import sample_squares

__all__ = ["Conv2d", "Layer", "Linear", "layer_of"]


class Layer(ABC):
    """A weighted layer. Shapes: input ``a`` ``(B, *in)``, output and error ``e`` ``(B, *out)``."""

    module: nn.Module
    is_product: bool = True  # the gradient is one outer product, of ``rows``

    @property
    def weight(self) -> nn.Parameter:
        """The weight as it is now; past nn.Module's slow attribute lookup."""
        return self.module._parameters["weight"]  # pyright: ignore[reportReturnType]

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias as it is now, if there is one."""
        return self.module._parameters["bias"]

    @abstractmethod
    def apply(self, a: Tensor) -> Tensor:
        """Returns ``W a + b``."""

    @abstractmethod
    def push(self, d: Tensor) -> Tensor:
        """Returns ``W d``, the displacement of the output."""

    @abstractmethod
    def pull(self, a: Tensor, e: Tensor, weight: Tensor | None = None) -> Tensor:
        """Returns ``W^T e``, with the shape of ``a``; of another weight, if one is given."""

    @abstractmethod
    def weight_gradient(self, a: Tensor, e: Tensor, scale: float) -> Tensor:
        """Returns ``scale sum_n e_n a_n^T`` over the batch, with the shape of the weight."""

    def gradients(self, a: Tensor, e: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        """Returns the same, and the bias's gradient where that comes along with it."""
        return self.weight_gradient(a, e, scale), None

    @abstractmethod
    def rows(self, a: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Returns activity ``(N, in)`` and error ``(N, out)``, whose ``e^T a`` is the gradient."""

    @abstractmethod
    def sample_gradients(self, a: Tensor, e: Tensor, span: slice) -> Tensor:
        """Returns the weight's gradients of some samples, ``(n, *shape)``."""

    @abstractmethod
    def sample_squares(self, a: Tensor, e: Tensor) -> Tensor | None:
        """Returns the sum of their squares over all samples, where a kernel does so at once."""

    @abstractmethod
    def sample_bias_gradients(self, e: Tensor, span: slice) -> Tensor:
        """Returns the bias's gradients of some samples, ``(n, out)``."""

    def bias_rows(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the same for the bias, whose activity is 1: ``(N, 1)`` and ``(N, out)``."""
        error = self.errors(e)
        return torch.ones_like(error[:, :1]), error

    @abstractmethod
    def errors(self, e: Tensor) -> Tensor:
        """Returns the errors of all samples and positions, ``(N, out)``."""

    @abstractmethod
    def bias_gradient(self, e: Tensor, scale: float) -> Tensor:
        """Returns ``scale sum_n e_n`` over batch and positions, with the shape of the bias."""


class Linear(Layer):
    """``nn.Linear``, over any number of positions: ``(B, ..., in) -> (B, ..., out)``."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module

    def apply(self, a: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if bias is None:
            return self.push(a)
        if a.dim() != 2 or torch.is_grad_enabled():
            return F.linear(a, weight, bias)
        out = take(a, (a.shape[0], weight.shape[0]))
        return torch.addmm(bias, a, weight.t(), out=out)

    def push(self, d: Tensor) -> Tensor:
        weight = self.weight
        if d.dim() != 2 or torch.is_grad_enabled():
            return F.linear(d, weight)
        return torch.mm(d, weight.t(), out=take(d, (d.shape[0], weight.shape[0])))

    def pull(self, a: Tensor, e: Tensor, weight: Tensor | None = None) -> Tensor:
        weight = self.weight if weight is None else weight
        if e.dim() != 2 or torch.is_grad_enabled():
            return e @ weight
        return torch.mm(e, weight, out=take(e, a.shape))

    def weight_gradient(self, a: Tensor, e: Tensor, scale: float) -> Tensor:
        weight = self.weight  # beta=0: its values are not read
        a, e = self.rows(a, e)
        return torch.addmm(weight, e.t(), a, beta=0, alpha=scale, out=take(weight))

    def rows(self, a: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        return (a if a.dim() == 2 else a.flatten(0, -2)), self.errors(e)

    def sample_gradients(self, a: Tensor, e: Tensor, span: slice) -> Tensor:
        return torch.bmm(e[span].flatten(1, -2).mT, a[span].flatten(1, -2))

    def sample_squares(self, a: Tensor, e: Tensor) -> Tensor | None:
        return sample_squares(a.flatten(1, -2), e.flatten(1, -2))

    def sample_bias_gradients(self, e: Tensor, span: slice) -> Tensor:
        return e[span].flatten(1, -2).sum(1)

    def errors(self, e: Tensor) -> Tensor:
        return e if e.dim() == 2 else e.flatten(0, -2)

    def bias_gradient(self, e: Tensor, scale: float) -> Tensor:
        return self.errors(e).sum(0).mul_(scale)


class Conv2d(Layer):
    """``nn.Conv2d`` with zero padding."""

    module: nn.Conv2d

    def __init__(self, module: nn.Conv2d) -> None:
        self.module = module
        self.is_product = module.groups == 1  # else one per group

    def apply(self, a: Tensor) -> Tensor:
        return self._convolve(a, self.bias)

    def push(self, d: Tensor) -> Tensor:
        return self._convolve(d, None)

    def pull(self, a: Tensor, e: Tensor, weight: Tensor | None = None) -> Tensor:
        weight = self.weight if weight is None else weight
        key = "transposed convolution", a.shape, weight.shape, e.shape
        return made_again(key, lambda: self._backward(a, e, weight, (True, False, False))[0])

    def weight_gradient(self, a: Tensor, e: Tensor, scale: float) -> Tensor:
        return self._backward(a, e, self.weight, (False, True, False))[1].mul_(scale)

    def gradients(self, a: Tensor, e: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        _, weight, bias = self._backward(a, e, self.weight, (False, True, True))
        return weight.mul_(scale), bias.mul_(scale)

    def rows(self, a: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        return self._patches(a).mT.flatten(0, 1), self.errors(e)

    def _patches(self, a: Tensor) -> Tensor:
        """Returns what every position sees, ``(B, in of one unit, positions)``.

        One copy of a view; ``F.unfold`` takes up to four times as long.
        """
        m = self.module
        top, left = (int(size) for size in m.padding)
        a = F.pad(a, (left, left, top, top))
        for axis in (0, 1):
            reach = m.dilation[axis] * (m.kernel_size[axis] - 1) + 1
            a = a.unfold(2 + axis, reach, m.stride[axis])
        down, across = m.dilation
        return a[..., ::down, ::across].permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)

    def sample_gradients(self, a: Tensor, e: Tensor, span: slice) -> Tensor:
        # Groups are further samples of a convolution with fewer channels.
        groups = self.module.groups
        error = e[span].flatten(2).unflatten(1, (groups, -1)).flatten(0, 1)
        patches = self._patches(a[span]).unflatten(1, (groups, -1)).flatten(0, 1)
        # In this order the product takes a fifth less time than its transpose.
        return torch.bmm(patches, error.mT).mT.reshape(-1, *self.weight.shape)

    def sample_squares(self, a: Tensor, e: Tensor) -> Tensor | None:
        return sample_squares(a, e, self.module)

    def sample_bias_gradients(self, e: Tensor, span: slice) -> Tensor:
        return e[span].sum((2, 3))

    def errors(self, e: Tensor) -> Tensor:
        return e.flatten(2).mT.flatten(0, 1)

    def bias_gradient(self, e: Tensor, scale: float) -> Tensor:
        # Maps first: all axes at once take twice the time where maps are many.
        return e.sum((2, 3)).sum(0).mul_(scale)

    def _convolve(self, a: Tensor, bias: Tensor | None) -> Tensor:
        m = self.module
        how = m.stride, m.padding, m.dilation, m.groups
        key = "convolution", a.shape, self.weight.shape, how

        def make() -> Tensor:
            return F.conv2d(a, self.weight, bias, m.stride, m.padding, m.dilation, m.groups)

        return made_again(key, make)

    def _backward(
        self, a: Tensor, e: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> list[Tensor]:
        m = self.module
        return torch.ops.aten.convolution_backward(
            e, a, weight, [m.out_channels], m.stride, m.padding, m.dilation, False, (0, 0),
            m.groups, wanted,
        )  # fmt: skip


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
