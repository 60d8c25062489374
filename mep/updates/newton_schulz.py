"""Orthogonalisation by matrix products alone: Newton-Schulz iterations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["COEFFICIENTS", "orthogonalise"]

Quintic = tuple[float, float, float]


def _with_margin(*steps: Quintic, margin: float = 1.01) -> tuple[Quintic, ...]:
    """Shrinks what every step but the last is given: beyond 1 these polynomials run away.

    A matrix of rank one starts at 1, and bfloat16 may round it up. The first step takes the
    margin of the norm that its matrix was divided by as well.
    """
    margins = [margin**2, *(margin for _ in steps[1:-1]), 1.0]
    return tuple((a / m, b / m**3, c / m**5) for (a, b, c), m in zip(steps, margins, strict=True))


COEFFICIENTS: dict[str, tuple[Quintic, ...]] = {
    # One polynomial for every step: steep at 0, and then about 1 within +-0.3.
    "standard": ((3.4445, -4.7750, 2.0315),),
    # The best polynomial for what the steps before have left; the last one is repeated.
    "polar-express": _with_margin(
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        (1.875, -1.25, 0.375),
    ),
}


def orthogonalise(
    matrix: Tensor, steps: int, coefficients: Sequence[Quintic], eps: float = 1e-7
) -> Tensor:
    """Returns about ``U V^T`` for ``U S V^T`` a matrix or each of a batch.

    ``X <- a X + (b X X^T + c (X X^T)^2) X`` from ``X / ||X||_F``, on the smaller side.

    Args:
        matrix: ``(..., m, n)``, in the dtype of the computation.
        steps: number of iterations, >= 1.
        coefficients: ``(a, b, c)`` of each step; the last one serves all further steps.
        eps: least norm divided by.

    Returns:
        A new tensor of the same shape, with singular values around 1.

    >>> orthogonalise(2 * torch.eye(2), 8, COEFFICIENTS["polar-express"]).round(decimals=3)
    tensor([[1., -0.],
            [-0., 1.]])

    Source: Jordan et al. 2024 (Muon); Amsel et al. 2025 (Polar Express), algorithm 1.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    # addmm for one matrix: the same kernel, and so the same bits, as torch.optim.Muon
    multiply = torch.addmm if x.dim() == 2 else torch.baddbmm
    for k in range(steps):
        a, b, c = coefficients[min(k, len(coefficients) - 1)]
        gram = x @ x.mT
        x = multiply(x, multiply(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
