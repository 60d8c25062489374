"""The local signal of a weight: presynaptic activity and postsynaptic error.

It is what a contrast (or a backward pass) hands out, block by block. A consumer takes what it
needs: the dense gradient, the outer product's two factors, or statistics of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

__all__ = ["Factors", "Signal", "finite_products"]


@dataclass(slots=True)
class Signal:
    """One contribution to one parameter's gradient.

    Attributes:
        parameter: whose gradient it is.
        scale: weight of the sum over the batch, ``1 / B`` and what else multiplies it.
        samples: number of samples ``B``.
        form: returns the dense gradient, a new tensor of the parameter's shape.
        rows: returns activity ``a`` ``(N, in)`` and error ``e`` ``(N, out)`` with the gradient
            ``scale e^T a``; ``N`` counts samples and positions, ``in`` the inputs of one unit
            (those of a patch for a convolution), and a bias has one input, which is 1. None where
            a gradient is no outer product.
        per_sample: returns the gradients of some samples, ``(n, *shape)``, without the scale; None
            where there is one row per sample, from which they follow.
    """

    parameter: nn.Parameter
    scale: float
    samples: int
    form: Callable[[], Tensor]
    rows: Callable[[], tuple[Tensor, Tensor]] | None = None
    per_sample: Callable[[slice], Tensor] | None = None


class Factors:
    """The gradient of one matrix as a sum of outer products, never formed unless asked for.

    ``G = sum_k scale_k e_k^T a_k``, shape ``(out, in)``: a convolution's kernel is flattened.

    Args:
        signals: of one parameter, each with ``rows``.

    >>> a, e = torch.ones(3, 2), torch.ones(3, 1)
    >>> weight = nn.Parameter(torch.zeros(1, 2))
    >>> signal = Signal(weight, 0.5, 3, lambda: 0.5 * e.T @ a, lambda: (a, e))
    >>> Factors([signal]).add_to(torch.zeros(1, 2))
    tensor([[1.5000, 1.5000]])
    """

    def __init__(self, signals: Iterable[Signal] = ()) -> None:
        self.signals = list(signals)

    def dense(self) -> Tensor:
        """Returns the gradient, a new tensor of the parameter's shape."""
        total = self.signals[0].form()
        for signal in self.signals[1:]:
            total = total + signal.form()
        return total

    def add_to(self, matrix: Tensor, *, factor: float = 1.0, keep: float = 1.0) -> Tensor:
        """``M <- keep M + factor G`` in place, for a matrix ``(out, in)``; returns it."""
        for signal, a, e in self.rows():
            matrix.addmm_(e.t(), a, alpha=factor * signal.scale, beta=keep)
            keep = 1.0
        return matrix

    def scaled(self, factor: float) -> Factors:
        """Returns the gradient times a number."""
        return Factors(
            replace(s, scale=s.scale * factor, form=_times(s.form, factor)) for s in self.signals
        )

    def rows(self) -> Iterable[tuple[Signal, Tensor, Tensor]]:
        """Yields each signal with its activity and error."""
        for signal in self.signals:
            assert signal.rows is not None
            yield signal, *signal.rows()


def finite_products(gradients: Iterable[Factors]) -> bool:
    """True if all gradients are sure to be finite, without forming any.

    >>> a = torch.tensor([[1e30, 0.0]])
    >>> signal = Signal(nn.Parameter(torch.zeros(2, 2)), 1.0, 1, lambda: a.T @ a, lambda: (a, a))
    >>> finite_products([Factors([signal])])
    False
    """
    rows = [row for gradient in gradients for row in gradient.rows()]
    every = [t for _, a, e in rows for t in (a, e)]
    norm = float(torch.nn.utils.get_total_norm(every))
    # |G| <= |scale| |e| |a| for each product, and so with room to spare:
    return norm * norm * sum(abs(s.scale) for s, _, _ in rows) <= torch.finfo(every[0].dtype).max


def _times(form: Callable[[], Tensor], factor: float) -> Callable[[], Tensor]:
    return lambda: form().mul_(factor)
