"""The diagonal of a parameter's Fisher information, from its local signals."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mep.curvature.signal import Signal

__all__ = ["diagonal_fisher"]

# Samples whose gradients are formed at once, where the sum comes before the square: they stay in
# the cache; and elements of them, where even these would not.
_SAMPLES, _AT_ONCE = 8, 2**22


def diagonal_fisher(signals: Sequence[Signal]) -> Tensor:
    """Returns ``1/B sum_n g_n^2`` with ``g_n`` the gradient of one sample by itself.

    Where every sample has one position and the parameter one place in the model, this is one
    product, ``(e^2)^T (a^2) / B``. Where there are several, the sum comes before the square.

    Args:
        signals: of one parameter and one direction of the output, one for each place where the
            model uses it; their ``scale`` is undone.

    Returns:
        The diagonal, of the parameter's shape.

    >>> a, e = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0], [3.0]])
    >>> weight = torch.nn.Parameter(torch.zeros(1, 2))
    >>> diagonal_fisher([Signal(weight, 0.5, 2, lambda: 0.5 * e.T @ a, lambda: (a, e))])
    tensor([[0.5000, 6.5000]])

    Source: Kirkpatrick et al. 2017, eq. 3; Goodfellow 2015 (the product).
    """
    first = signals[0]
    per_sample = first.scale * first.samples
    if len(signals) == 1 and first.per_sample is None:
        a, e = _rows(first)
        squares = torch.mm(e.square().t(), a.square())
        return squares.mul_(per_sample**2 / first.samples).view_as(first.parameter)
    if len(signals) == 1 and first.sample_squares is not None:
        squares = first.sample_squares()
        if squares is not None:
            return squares.mul_(per_sample**2 / first.samples)
    total: Tensor | None = None
    chunk = min(_SAMPLES, max(1, _AT_ONCE // max(1, first.parameter.numel())))
    for start in range(0, first.samples, chunk):
        span = slice(start, min(start + chunk, first.samples))
        whole = _gradients(first, span)
        for signal in signals[1:]:
            whole = whole + _gradients(signal, span)
        if total is None:
            total = torch.zeros_like(whole[0])  # of its layout, whatever that is
        if whole.is_contiguous():
            total += whole.square().sum(0)
            continue
        for one in whole:  # a sum over samples would take its time in another layout
            total.addcmul_(one, one)
    assert total is not None, "a batch has samples"
    return total.mul_(per_sample**2 / first.samples).contiguous()


def _gradients(signal: Signal, span: slice) -> Tensor:
    """Returns the gradients of some samples, ``(n, *shape)``, without the scale."""
    if signal.per_sample is not None:
        return signal.per_sample(span)
    a, e = (t[span] for t in _rows(signal))
    return (e.unsqueeze(2) * a.unsqueeze(1)).view(-1, *signal.parameter.shape)


def _rows(signal: Signal) -> tuple[Tensor, Tensor]:
    assert signal.rows is not None, "a signal has rows or per-sample gradients"
    return signal.rows()
