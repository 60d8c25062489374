"""Finite-difference stencils in the nudging strength.

A stencil is a table of nodes ``(beta_k, w_k)`` with ``sum w = 0`` and ``sum w beta = 1``; the
gradient estimate is ``g = sum_k w_k dF/dtheta(s^{beta_k})``, its real part where nodes are complex.
A stencil takes the largest ``|beta_k|`` and returns the table.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Stencil", "centered", "five_point", "holomorphic", "one_sided", "random_sign"]

Nodes = tuple[tuple[complex, complex], ...]
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


@dataclass(frozen=True)
class _RandomSign:
    generator: torch.Generator | None

    def __call__(self, beta: float) -> Nodes:
        drawn = torch.randint(2, (), generator=self.generator)
        return one_sided(beta if int(drawn) else -beta)


def random_sign(generator: torch.Generator | None = None) -> Stencil:
    """``one_sided`` with a nudge of either sign, drawn anew at every call: one nudged phase.

    The error of first order changes its sign with the nudge, and averages out over batches.

    Args:
        generator: on the CPU; torch's own by default.

    Returns:
        A stencil.

    >>> stencil = random_sign(torch.Generator().manual_seed(0))
    >>> sorted({stencil(0.5)[1][0] for _ in range(20)})
    [-0.5, 0.5]

    Source: Scellier & Bengio 2017, sec. 3.5.
    """
    return _RandomSign(generator)


@dataclass(frozen=True)
class _Holomorphic:
    n: int

    def __call__(self, beta: float) -> Nodes:
        table = []
        for k in range(self.n // 2 + 1):
            alone = 2 * k % self.n == 0  # on the real axis
            turn = cmath.exp(2j * math.pi * k / self.n)
            b = beta * (turn.real if alone else turn)
            table.append((b, (1 if alone else 2) / (self.n * b)))
        return tuple(table)


def holomorphic(n: int) -> Stencil:
    """``n`` complex nodes on a circle: an error of order ``n``, falling geometrically in ``n``.

    ``g = Re (1 / n beta) sum_k e^{-2 pi i k / n} dF/dtheta(beta e^{2 pi i k / n})``, a Cauchy
    integral by the trapezoidal rule. Nodes of conjugate betas have conjugate states: one of each
    pair is settled, with twice the weight.

    Args:
        n: number of nodes, >= 2; 2 is ``centered``.

    Returns:
        A stencil, for an energy whose states may be complex, such as ``mep.Hopfield()``.

    Raises:
        ValueError: if ``n`` is too small.

    >>> [(round(abs(b), 6), round(abs(w), 6)) for b, w in holomorphic(4)(0.5)]
    [(0.5, 0.5), (0.5, 1.0), (0.5, 0.5)]

    Source: Laborieux & Zenke 2022, eq. 9.
    """
    if not isinstance(n, int) or n < 2:
        raise ValueError(f"`holomorphic(n)` needs a whole number of nodes >= 2, got {n!r}")
    return _Holomorphic(n)
