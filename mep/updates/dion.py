"""Dion: orthonormal updates of low rank, with error feedback in the momentum."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mep.curvature import Factors
from mep.updates.rule import MatrixRule, refuse_nesterov

__all__ = ["Dion", "DionStep", "dion_step"]

Member = tuple[Tensor, Tensor, dict[str, Any]]
"""Parameter, ``B = M + G`` as a matrix, state."""


class DionStep(NamedTuple):
    """What one step of Dion makes of ``B`` ``(..., out, in)``.

    Attributes:
        left: ``P``, ``(..., out, r)``, with orthonormal columns.
        product: ``R = B^T P``, ``(..., in, r)``.
        momentum: ``B - (1 - mu) P R^T``, as ``B``.
        right: the next ``Q``, ``(..., in, r)``, with columns of norm 1.
        update: ``P Q^T`` over the columns in which there is anything of ``B``, as ``B``.
    """

    left: Tensor
    product: Tensor
    momentum: Tensor
    right: Tensor
    update: Tensor


def dion_step(total: Tensor, right: Tensor, mu: float) -> DionStep:
    """Returns one step of power iteration on ``B`` and what follows from it.

    ``P = orth(B Q)``, ``R = B^T P``, ``M = B - (1 - mu) P R^T``, ``Q <- R`` with columns of norm 1.
    A column of ``R`` that is zero, or rounding beside the others, keeps its old column of ``Q`` and
    has no part in the update: nothing orthonormal comes from nothing.

    Args:
        total: ``B``, momentum plus gradient, ``(..., out, in)``, float32 or float64.
        right: ``Q``, ``(..., in, r)``.
        mu: momentum, in [0, 1).

    >>> step = dion_step(torch.tensor([[0.0, 3.0], [0.0, 0.0]]), torch.eye(2).flip(1), 0.5)
    >>> step.update, step.momentum
    (tensor([[0., 1.],
            [0., 0.]]), tensor([[0.0000, 1.5000],
            [0.0000, 0.0000]]))

    Source: Ahn et al. 2025 (Dion), algorithm 1.
    """
    rounding = torch.finfo(total.dtype).eps * max(total.shape[-2:])
    left = torch.linalg.qr(total @ right).Q  # by reflections: orthonormal whatever the rank
    product = total.mT @ left

    # Relative to the largest entry: a norm of tiny numbers would square them away.
    shares = product / _largest(product).clamp(min=torch.finfo(total.dtype).tiny)
    norms = torch.linalg.vector_norm(shares, dim=-2, keepdim=True)
    alive = norms > rounding
    right = torch.where(alive, shares / norms, right)
    update = (left * alive) @ right.mT

    momentum = (left @ product.mT).mul_(mu - 1).add_(total)
    if mu == 0:
        # What rounding leaves of a matrix that was wholly taken must not be the next step's matrix.
        momentum *= _largest(momentum) > rounding * _largest(total)
    return DionStep(left, product, momentum, right, update)


def _largest(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, math.inf, dim=(-2, -1), keepdim=True)


@dataclass(frozen=True)
class Dion(MatrixRule):
    """``theta <- (1 - lr lambda) theta - lr sqrt(out / in) P Q^T``, orthonormal and of rank r.

    Of ``B = M + G``, momentum plus gradient, one step of power iteration from the last ``Q`` finds
    the leading directions: ``P = orth(B Q)``, ``R = B^T P``, ``Q <- R`` with columns of norm 1. The
    momentum loses only what the update could see, ``M <- B - (1 - mu) P R^T``: it carries its own
    error feedback. A gradient given as ``Factors`` is added into ``M`` and never formed.

    Matrices of one shape are treated as one batch; convolution kernels count as matrices
    ``(out, in * height * width)``. Weight decay is decoupled.

    Group numbers: ``lr``, ``lr_scale``, ``momentum`` (0.95 is the custom), ``weight_decay``.

    Args:
        rank_fraction: ``r / min(out, in)``, in (0, 1]; r is at least 1.

    Raises:
        ValueError: if the fraction is out of range.

    >>> theta = torch.zeros(2, 2)
    >>> numbers = {"lr": 1.0, "lr_scale": 1.0, "momentum": 0.5, "weight_decay": 0.0}
    >>> Dion(1.0).step([theta], [torch.eye(2)], [{}], numbers)
    >>> theta.round(decimals=3)
    tensor([[-1.,  0.],
            [ 0., -1.]])

    Source: Ahn et al. 2025 (Dion), algorithm 1.
    """

    takes_factors = True

    rank_fraction: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.rank_fraction <= 1:
            raise ValueError(
                f"`Dion(rank_fraction=...)` must be in (0, 1], got {self.rank_fraction}"
            )

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        refuse_nesterov(self, group)  # the momentum is the error feedback

    def step(
        self,
        parameters: list[Tensor],
        gradients: list[Any],
        states: list[dict[str, Any]],
        group: dict[str, Any],
    ) -> None:
        batches: dict[tuple, list[Member]] = defaultdict(list)
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            total = state["momentum_buffer"].flatten(1)
            if isinstance(gradient, Factors):
                gradient.add_to(total)
            else:
                total.add_(gradient.flatten(1))
            batches[total.shape, total.dtype, total.device].append((parameter, total, state))
        for batch in batches.values():
            self._apply(batch, group)

    def _apply(self, batch: list[Member], group: dict[str, Any]) -> None:
        out, inputs = batch[0][1].shape
        self._start([state for *_, state in batch], batch[0][1])
        dtype = torch.promote_types(batch[0][1].dtype, torch.float32)
        total = torch.stack([total for _, total, _ in batch]).to(dtype)
        right = torch.stack([state["right"] for *_, state in batch]).to(dtype)
        found = dion_step(total, right, group["momentum"])

        lr = float(group["lr"] * group["lr_scale"])
        kept, size = 1 - lr * group["weight_decay"], -lr * math.sqrt(out / inputs)
        for k, (parameter, _, state) in enumerate(batch):
            state["momentum_buffer"].copy_(found.momentum[k].view_as(parameter))
            state["right"].copy_(found.right[k])
            parameter.mul_(kept).add_(found.update[k].view_as(parameter), alpha=size)

    def _start(self, states: list[dict[str, Any]], like: Tensor) -> None:
        """Gives a ``Q`` to the states without one of the right rank: the same for every shape."""
        rank = max(1, round(self.rank_fraction * min(like.shape)))
        wanted = torch.Size((like.shape[1], rank))
        new = [s for s in states if "right" not in s or s["right"].shape != wanted]
        if new:
            generator = torch.Generator().manual_seed(0)
            start = torch.linalg.qr(torch.randn(wanted, generator=generator, dtype=torch.float64)).Q
            for state in new:
                state["right"] = start.to(like, copy=True)
