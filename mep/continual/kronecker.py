"""A memory of a whole matrix: ``lam/2 vec(D)^T [A (x) G / T] vec(D)`` with ``D = W - W*``.

``A`` and ``G`` are sums over tasks, ``T`` is their number. A kernel counts as the matrix
``(out, in)`` of its patches, a bias as the weight of one input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["add", "gradient", "pull", "value"]

_Memory = dict[str, Any]


def pull(theta: Tensor, memory: _Memory, strength: float) -> None:
    """``theta <- theta - Qg [ w / (1 + w) Qg^T D Qa ] Qa^T``, ``w = strength lg la^T / T``.

    The eigenbases of both factors turn the proximal step into one of numbers. As a difference, so
    that what is hardly pulled is not rounded; ``strength = eta lam``.
    """
    at, an, basis, spread = _at(theta, memory)
    sizes = memory["activity_sizes"] * (strength / memory["tasks"])
    weight = torch.outer(memory["error_sizes"], sizes).clamp_(max=1e30)
    inner = (spread.mT @ (at - an) @ basis).mul_(weight.div_(1 + weight))
    theta.sub_((spread @ inner @ basis.mT).view_as(theta))


def gradient(theta: Tensor, memory: _Memory, lam: float) -> Tensor:
    """``lam G D A / T``."""
    at, an, basis, spread = _at(theta, memory)
    inner = spread.mT @ (at - an) @ basis
    inner.mul_(torch.outer(memory["error_sizes"], memory["activity_sizes"]))
    return (spread @ inner @ basis.mT).mul_(lam / memory["tasks"]).view_as(theta)


def value(theta: Tensor, memory: _Memory, lam: float) -> Tensor:
    """``lam/2 <D, G D A> / T``."""
    at, an, basis, spread = _at(theta, memory)
    inner = (spread.mT @ (at - an) @ basis).square_()
    inner.mul_(torch.outer(memory["error_sizes"], memory["activity_sizes"]))
    return inner.sum() * (0.5 * lam / memory["tasks"])


def add(
    memory: _Memory | None,
    factors: tuple[Tensor, Tensor],
    center: Tensor,
    gamma: float,
    damping: float,
) -> _Memory:
    """Returns the memory with another task's factors, around its optimum.

    Args:
        memory: of the tasks before, if any.
        factors: ``A`` and ``G`` of the task.
        center: its optimum.
        gamma: what is kept of the tasks before, in (0, 1].
        damping: relative; the factors become ``A + sqrt(d) (tr A / n) I`` in the basis.
    """
    found: _Memory = {"center": center.clone(), "tasks": 1.0}
    if memory is not None:
        found["tasks"] += gamma * memory["tasks"]
    for name, factor in zip(("activity", "error"), factors, strict=True):
        total = factor if memory is None else memory[f"{name}_factor"] * gamma + factor
        sizes, basis = torch.linalg.eigh(total.double())
        sizes = sizes.clamp(min=0) + damping**0.5 * sizes.mean().clamp(min=0)
        found[f"{name}_factor"] = total.to(center)
        found[f"{name}_sizes"], found[f"{name}_basis"] = sizes.to(center), basis.to(center)
    return found


def _at(theta: Tensor, memory: _Memory) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = len(memory["error_sizes"])
    matrix, center = theta.reshape(rows, -1), memory["center"].reshape(rows, -1)
    return matrix, center, memory["activity_basis"], memory["error_basis"]
