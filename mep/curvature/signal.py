"""The local signal of a weight: presynaptic activity and postsynaptic error.

It is what a contrast (or a backward pass) hands out, block by block. A consumer takes what it
needs: the dense gradient, the outer product's two factors, or statistics of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

__all__ = ["Factors", "Signal"]


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
            (those of a patch for a convolution). None where a gradient is no outer product.
    """

    parameter: nn.Parameter
    scale: float
    samples: int
    form: Callable[[], Tensor]
    rows: Callable[[], tuple[Tensor, Tensor]] | None = None


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
        for signal, a, e in self._rows():
            matrix.addmm_(e.t(), a, alpha=factor * signal.scale, beta=keep)
            keep = 1.0
        return matrix

    def scaled(self, factor: float) -> Factors:
        """Returns the gradient times a number."""
        return Factors(
            replace(s, scale=s.scale * factor, form=_times(s.form, factor)) for s in self.signals
        )

    def bound(self) -> Tensor:
        """Returns a bound on every entry: finite only if the gradient is."""
        norms = [
            abs(s.scale) * torch.linalg.vector_norm(a) * torch.linalg.vector_norm(e)
            for s, a, e in self._rows()
        ]
        return torch.stack(norms).sum()

    def _rows(self) -> Iterable[tuple[Signal, Tensor, Tensor]]:
        for signal in self.signals:
            assert signal.rows is not None
            yield signal, *signal.rows()


def _times(form: Callable[[], Tensor], factor: float) -> Callable[[], Tensor]:
    return lambda: form().mul_(factor)
