"""What lies between two products of dense blocks: activation, slope, displaced activation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mep.blocks.activations import Activation
from mep.blocks.buffers import shelf
from mep.kernels import kernels_of

if TYPE_CHECKING:
    from mep.kernels.cpu import Kernels

__all__ = ["Elementwise", "elementwise_of"]


class Elementwise:
    """One activation on vectors ``(B, n)``, into given tensors: by torch, the reference.

    Args:
        activation: which; it must take ``out=``.
    """

    def __init__(self, activation: Activation) -> None:
        self.activation = activation

    def activate(self, s: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """``s <- s + bias``, ``y <- phi(s)``."""
        if bias is not None:
            s.add_(bias)
        self.activation.value(s, out=y)

    def move(self, s: Tensor, y: Tensor, d: Tensor, change: Tensor, y_new: Tensor) -> None:
        """``change <- phi(s + d) - phi(s)`` without cancellation, ``y_new <- phi(s + d)``."""
        spare = shelf(s)
        s_new = torch.add(s, d, out=spare.take())
        self.activation.move(s, y, d, s_new, room=(change, y_new, s_new))
        spare.give(s_new)

    def pull(self, s: Tensor, y: Tensor, product: Tensor, e: Tensor) -> None:
        """``e <- phi'(s) product``."""
        self.activation.pull(s, y, product, out=e)

    def pull_and_square(self, s: Tensor, y: Tensor, product: Tensor, e: Tensor) -> Tensor | float:
        """The same; returns ``||e||^2``."""
        self.pull(s, y, product, e)
        return torch.linalg.vector_norm(e).double().square_()

    def nudge(
        self,
        s: Tensor,
        y: Tensor,
        d: Tensor,
        beta: float,
        product: Tensor,
        e: Tensor,
        change: Tensor,
        y_new: Tensor,
        norm: Tensor,
    ) -> None:
        """Moves the state by ``d <- d + beta e``.

        ``change <- phi(s + d) - phi(s)`` without cancellation, ``y_new <- phi(s + d)``, and per
        sample ``norm <- ||phi'(s + d) product - e||``, the force below.
        """
        if beta:
            d.add_(e, alpha=beta)
        spare = shelf(s)
        s_new = torch.add(s, d, out=spare.take())
        self.activation.move(s, y, d, s_new, room=(change, y_new, s_new))
        force = self.activation.pull(s_new, y_new, product, out=s_new).sub_(e)
        torch.linalg.vector_norm(force, dim=1, out=norm)
        spare.give(s_new)


class _Fused(Elementwise):
    """The same by fused kernels, for contiguous tensors."""

    def __init__(self, activation: Activation, kernels: Kernels) -> None:
        super().__init__(activation)
        self.kernels = kernels

    def activate(self, s: Tensor, bias: Tensor | None, y: Tensor) -> None:
        if bias is not None and not (bias.is_contiguous() and bias.shape == s.shape[1:]):
            s.add_(bias)
            bias = None
        at = 0 if bias is None else bias.data_ptr()
        self.kernels.activate(s.data_ptr(), at, y.data_ptr(), *s.shape)

    def move(self, s: Tensor, y: Tensor, d: Tensor, change: Tensor, y_new: Tensor) -> None:
        self.kernels.move(
            s.data_ptr(), y.data_ptr(), d.data_ptr(), change.data_ptr(), y_new.data_ptr(), *s.shape
        )

    def pull(self, s: Tensor, y: Tensor, product: Tensor, e: Tensor) -> None:
        self.pull_and_square(s, y, product, e)

    def pull_and_square(self, s: Tensor, y: Tensor, product: Tensor, e: Tensor) -> Tensor | float:
        return self.kernels.pull(y.data_ptr(), product.data_ptr(), e.data_ptr(), *y.shape)

    def nudge(
        self,
        s: Tensor,
        y: Tensor,
        d: Tensor,
        beta: float,
        product: Tensor,
        e: Tensor,
        change: Tensor,
        y_new: Tensor,
        norm: Tensor,
    ) -> None:
        self.kernels.nudge(
            s.data_ptr(), y.data_ptr(), d.data_ptr(), beta, product.data_ptr(), e.data_ptr(),
            change.data_ptr(), y_new.data_ptr(), norm.data_ptr(), *s.shape,
        )  # fmt: skip


def elementwise_of(activation: Activation, like: Tensor) -> Elementwise:
    """Returns the arithmetic of an activation for contiguous tensors like this one."""
    kernels = kernels_of(activation.name, like)
    return Elementwise(activation) if kernels is None else _Fused(activation, kernels)
