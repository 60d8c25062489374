"""Finite-difference stencils in the nudging strength.

A stencil is a table of nodes ``(beta_k, w_k)`` with ``sum w = 0`` and ``sum w beta = 1``; the
gradient estimate is ``g = sum_k w_k dF/dtheta(s^{beta_k})``. Each function takes the largest
``|beta_k|`` and returns the table.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Stencil", "centered", "five_point", "one_sided"]

Nodes = tuple[tuple[float, float], ...]
Stencil = Callable[[float], Nodes]


def one_sided(beta: float) -> Nodes:
    """``(F'(beta) - F'(0)) / beta``: order of accuracy 1, one nudged phase.

    Args:
        beta: the largest ``|beta_k|``, > 0.

    Returns:
        The nodes ``(beta_k, w_k)``.

    >>> one_sided(0.5)
    ((0.0, -2.0), (0.5, 2.0))

    Source: Scellier & Bengio 2017.
    """
    return ((0.0, -1 / beta), (beta, 1 / beta))


def centered(beta: float) -> Nodes:
    """``(F'(beta) - F'(-beta)) / 2 beta``: order 2, two nudged phases.

    Args:
        beta: the largest ``|beta_k|``, > 0.

    Returns:
        The nodes ``(beta_k, w_k)``.

    >>> centered(0.5)
    ((-0.5, -1.0), (0.5, 1.0))

    Source: Laborieux et al. 2021.
    """
    return ((-beta, -1 / (2 * beta)), (beta, 1 / (2 * beta)))


def five_point(beta: float) -> Nodes:
    """Fourth-order stencil on ``+-beta/2, +-beta``, four nudged phases.

    Args:
        beta: the largest ``|beta_k|``, > 0.

    Returns:
        The nodes ``(beta_k, w_k)``.

    >>> [round(weight, 6) for _, weight in five_point(1.0)]
    [0.166667, -1.333333, 1.333333, -0.166667]

    Source: Fornberg 1988, table 1, first derivative of order 4.
    """
    h = beta / 2
    return (
        (-2 * h, 1 / (12 * h)),
        (-h, -8 / (12 * h)),
        (h, 8 / (12 * h)),
        (2 * h, -1 / (12 * h)),
    )
