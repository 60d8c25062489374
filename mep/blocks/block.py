"""The block: one predicted state of a chain, and the five things settling asks of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mep.curvature import Signal
from mep.kernels import rows_of

__all__ = ["Block", "parameters_of", "sample_norm"]


class Block(ABC):
    """One map ``f`` of a chain, ``s_i = f(s_{i-1})``: parameter-free parts, then a weighted layer.

    A *point* is what the block keeps of one evaluation (activities, pooling indices, masks). Only
    the block itself reads it. Shapes: input state ``s`` ``(B, *in)``, error ``e`` and prediction
    ``(B, *out)``.

    Attributes:
        name: the path of the block's weighted module in the model.
        modules: the model's modules in the order in which they are applied.
        kind: ``"closed form"`` or ``"local autograd"``.
    """

    kind: str

    def __init__(self, name: str, modules: list[nn.Module]) -> None:
        self.name = name
        self.modules = modules

    @abstractmethod
    def predict(self, s: Tensor) -> tuple[Tensor, Any]:
        """Returns ``f(s)`` and the point at ``s``."""

    def predict_checked(self, s: Tensor, x: Tensor) -> tuple[Tensor, Any]:
        """Returns the same; ``x`` is the input of the chain, for messages.

        Raises:
            ValueError: if the block cannot take its input; the message names it.
        """
        try:
            out, point = self.predict(s)
            if out.shape[:1] != x.shape[:1]:
                raise ValueError(f"the batch must stay the first dimension, got {tuple(out.shape)}")
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            if "allocate memory" in str(error):  # on CPU no error of a kind of its own
                raise
            raise ValueError(
                f"`x` of shape {tuple(x.shape)} does not fit the model: block `{self.name}` "
                f"({self.describe()}) was given shape {tuple(s.shape)} and said: {error}"
            ) from error
        return out, point

    @abstractmethod
    def product(self, point: Any, e: Tensor) -> Tensor:
        """Returns the part of ``J^T e`` that does not depend on the state (``W^T e``)."""

    def product_through(self, point: Any, e: Tensor, weight: Tensor) -> Tensor:
        """Returns the same with another matrix in the weight's place (feedback of its own)."""
        raise AssertionError("the block has no single weight: `feedback_weight` is None")

    @property
    def feedback_weight(self) -> nn.Parameter | None:
        """The weight that ``product_through`` can replace; None if there is no such one."""
        return None

    @abstractmethod
    def pull(self, point: Any, product: Tensor) -> Tensor:
        """Completes ``J(s)^T e`` at a point from the product of the same block."""

    def pull_and_square(self, point: Any, product: Tensor) -> tuple[Tensor, Tensor | float]:
        """Returns ``J(s)^T e`` and its squares, summed while it is in the cache."""
        e = self.pull(point, product)
        return e, torch.linalg.vector_norm(e).double().square_()

    def inner(self, point: Any, product: Tensor) -> Tensor | None:
        """Returns ``J^T e`` up to a leading ramp (ReLU, Hardtanh), if the block begins with one.

        A ramp has no derivative at its kinks. A unit whose error would carry it across one and
        back again comes to rest on the kink instead; ``at_rest`` finds such units.
        """
        return None

    def at_rest(self, s: Tensor, delta: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
        """Solves each unit of a leading ramp exactly: ``e`` in ``subdifferential of phi(s) inner``.

        Args:
            s: free state, ``(B, *in)``.
            delta: displacement of its prediction.
            inner: from ``inner``, times the nudging strength.

        Returns:
            The unit's displacement ``d`` and its error ``e = d - delta``. Only asked of blocks
            whose ``inner`` is not None.
        """
        raise AssertionError("the block does not begin with a ramp")

    def least_force(self, s: Tensor, e: Tensor, inner: Tensor) -> Tensor:
        """Returns the smallest of ``e - subdifferential of phi(s) inner``, unit by unit."""
        raise AssertionError("the block does not begin with a ramp")

    @abstractmethod
    def difference(self, point: Any, d: Tensor) -> tuple[Tensor, Any]:
        """Returns ``f(s + d) - f(s)`` without cancellation, and the point at ``s + d``.

        The difference is a new tensor, the caller's to change.
        """

    def advance(
        self, point: Any, d: Tensor, product: Tensor, e: Tensor, beta: float = 0.0
    ) -> tuple[Tensor, Any, Tensor]:
        """Takes ``difference``, or one as good, and looks at the force below on the way.

        Args:
            point: at the free state.
            d: its displacement, to which ``beta e`` is added in place first.
            product: of this block, with the error above.
            e: the error below.
            beta: 0 where the displacement has its share of the error already.

        Returns:
            The difference, the point at ``s + d``, and per sample ``||e - J(s + d)^T e_above||``.
        """
        if beta:
            d.add_(e, alpha=beta)
        delta, moved = self.difference(point, d)
        # Out of place: what a block without an activation pulls is the product itself, or a view.
        return delta, moved, sample_norm(self.pull(moved, product) - e)

    @abstractmethod
    def signals(self, point: Any, e: Tensor, scale: float) -> Iterator[Signal]:
        """Yields the local signals, of gradients ``scale (df/dtheta)^T e`` summed over the batch.

        Parameters with ``requires_grad=False`` are left out. Points and errors must last as long
        as the signals.
        """

    def commit(self, point: Any) -> None:
        """Makes the side effects of the free evaluation (running statistics) permanent."""
        return  # most blocks have none

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields the parameters of all modules; a shared one may come more than once."""
        return (parameter for module in self.modules for parameter in module.parameters())

    def describe(self) -> str:
        """Returns the modules on one line, as ``ReLU > Linear(512, 10)``."""
        return " > ".join(_short(m) for m in self.modules)


def parameters_of(blocks: Iterable[Block]) -> Iterator[nn.Parameter]:
    """Yields every parameter of some blocks once."""
    seen: set[int] = set()
    for block in blocks:
        for parameter in block.parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter


def sample_norm(t: Tensor) -> Tensor:
    """Returns the norm of every sample, shape ``(B,)``."""
    rows = t if t.dim() == 2 else rows_of(t)
    return torch.linalg.vector_norm(t.flatten(1) if rows is None else rows, dim=1)


def _short(module: nn.Module) -> str:
    name = type(module).__name__
    if isinstance(module, nn.Linear):
        return f"{name}({module.in_features}, {module.out_features})"
    if isinstance(module, nn.Conv2d):
        return f"{name}({module.in_channels}, {module.out_channels}, {module.kernel_size})"
    return name
