"""A memory with one number per weight: ``lam/2 sum H (theta - m)^2``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["add", "gradient", "pull", "replace", "value"]

_Memory = dict[str, Any]


def pull(theta: Tensor, memory: _Memory, strength: float) -> None:
    """``theta <- (theta + eta lam H m) / (1 + eta lam H)``, with ``strength = eta lam``."""
    # An overflow would make NaN of inf / inf; from 1e30 on the pull is complete in any dtype.
    weight = (memory["curvature"] * strength).clamp_(max=1e30)
    theta.lerp_(memory["center"], weight.div_(1 + weight))


def gradient(theta: Tensor, memory: _Memory, lam: float) -> Tensor:
    """``lam H (theta - m)``."""
    return (theta - memory["center"]).mul_(memory["curvature"]).mul_(lam)


def value(theta: Tensor, memory: _Memory, lam: float) -> Tensor:
    """``lam/2 (sum H (theta - m)^2 + c)``."""
    distance = (theta - memory["center"]).square_().mul_(memory["curvature"])
    return 0.5 * lam * (distance.sum() + memory["constant"])


def add(memory: _Memory | None, curvature: Tensor, center: Tensor) -> _Memory:
    """Returns the sum of a memory and ``F (theta - theta*)^2``, which is again of its form.

    ``H' = H + F``, ``m' = (H m + F theta*) / H'`` and ``c' = c + H F / H' (m - theta*)^2``.
    """
    if memory is None:
        return replace(curvature, center)
    known, total = memory["curvature"], memory["curvature"] + curvature
    share = torch.where(total > 0, curvature / total, 1.0)
    between = (known * share).mul_((memory["center"] - center).square_())
    return {
        "curvature": total,
        "center": torch.lerp(memory["center"], center, share),
        "constant": memory["constant"] + between.sum(),
    }


def replace(curvature: Tensor, center: Tensor) -> _Memory:
    """Returns a memory of one curvature around one center."""
    constant = torch.zeros((), dtype=center.dtype, device=center.device)
    return {"curvature": curvature, "center": center.clone(), "constant": constant}
