"""Kronecker factors of a weight's Fisher information, from its local signals."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mep.curvature.signal import Signal

__all__ = ["activity_factor", "error_factor", "kronecker_factors"]


def kronecker_factors(signals: Sequence[Signal]) -> tuple[Tensor, Tensor]:
    """Returns ``A`` and ``G`` with ``F ~ A (x) G`` for a weight ``(out, in)``.

    ``A = 1/B sum_n sum_t a_nt a_nt^T`` and ``G = 1/(B T) sum_n sum_t sum_k e_ntk e_ntk^T`` over
    samples ``n``, positions ``t`` (one for a plain Linear) and the directions ``k`` of the output,
    one signal each. Exact if activity and error are independent, and for a linear chain.

    Args:
        signals: of one weight, each with ``rows``; their ``scale`` is undone, so that ``e`` is
            the error of a sample by itself.

    Returns:
        ``A`` ``(in, in)`` and ``G`` ``(out, out)``.

    >>> a, e = torch.eye(2), torch.ones(2, 1)
    >>> weight = torch.nn.Parameter(torch.zeros(1, 2))
    >>> kronecker_factors([Signal(weight, 0.5, 2, lambda: 0.5 * e.T @ a, lambda: (a, e))])
    (tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]]), tensor([[1.]]))

    Source: Martens & Grosse 2015, eq. 1; Grosse & Martens 2016, theorem 1 (convolutions).
    """
    activities = [activity_factor(signal) for signal in signals]
    return torch.stack(activities).mean(0), torch.stack([*map(error_factor, signals)]).sum(0)


def activity_factor(signal: Signal) -> Tensor:
    """Returns ``A`` ``(in, in)`` of one signal: the same for every direction of the output."""
    a, _ = _rows(signal)
    return torch.mm(a.t(), a) / signal.samples


def error_factor(signal: Signal) -> Tensor:
    """Returns the part of ``G`` ``(out, out)`` that one direction of the output adds."""
    _, e = _rows(signal)
    return torch.mm(e.t(), e) * ((signal.scale * signal.samples) ** 2 / len(e))


def _rows(signal: Signal) -> tuple[Tensor, Tensor]:
    assert signal.rows is not None
    a, e = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in signal.rows())
    return a, e
