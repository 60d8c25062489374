"""Muon: momentum whose matrix is orthogonalised."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mep.updates.newton_schulz import COEFFICIENTS, orthogonalise
from mep.updates.rule import MatrixRule

__all__ = ["SCALES", "Muon"]

SCALES = ("original", "match_rms_adamw")


@dataclass(frozen=True)
class Muon(MatrixRule):
    """``m <- mu m + (1 - mu) g``; ``theta <- (1 - lr lambda) theta - lr c O(m)``.

    ``O(m)`` is about ``U V^T`` of ``m = U S V^T``, by Newton-Schulz iterations; Nesterov momentum
    orthogonalises ``(1 - mu) g + mu m``. Matrices of one shape are treated as one batch;
    convolution kernels count as matrices ``(out, in * height * width)``. Weight decay is decoupled.

    Group numbers: ``lr``, ``lr_scale``, ``momentum``, ``weight_decay``, ``nesterov``.

    Args:
        steps: Newton-Schulz iterations, >= 1.
        coefficients: ``"standard"`` or ``"polar-express"``.
        scale: the factor ``c``: ``"original"`` (``sqrt(max(1, out / in))``) or
            ``"match_rms_adamw"`` (``0.2 sqrt(max(out, in))``).
        ns_dtype: dtype of the iterations; None for the parameter's own. bfloat16 is the custom: it
            is fast and the iterations are far from exact anyway.

    Raises:
        TypeError, ValueError: if an option is out of range.

    >>> theta = torch.zeros(2, 2)
    >>> numbers = {"lr": 1.0, "lr_scale": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    >>> exact = Muon(8, "polar-express", ns_dtype=None)
    >>> exact.step([theta], [torch.eye(2)], [{}], {**numbers, "nesterov": False})
    >>> theta.round(decimals=3)
    tensor([[-1.,  0.],
            [ 0., -1.]])

    Source: Jordan et al. 2024; scales after Liu et al. 2025 (Moonlight), sec. 2.2.
    """

    batches: ClassVar[bool] = True

    steps: int = 5
    coefficients: str = "standard"
    scale: str = "original"
    ns_dtype: torch.dtype | None = torch.bfloat16

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"`Muon(steps=...)` must be a whole number >= 1, got {self.steps!r}")
        if self.coefficients not in tuple(COEFFICIENTS):
            raise ValueError(
                f"`Muon(coefficients=...)` must be one of {sorted(COEFFICIENTS)}, "
                f"got {self.coefficients!r}"
            )
        if self.scale not in SCALES:
            raise ValueError(f"`Muon(scale=...)` must be one of {SCALES}, got {self.scale!r}")
        floating = isinstance(self.ns_dtype, torch.dtype) and self.ns_dtype.is_floating_point
        if self.ns_dtype is not None and not floating:
            raise TypeError(
                f"`Muon(ns_dtype=...)` must be a floating dtype or None, got {self.ns_dtype!r}"
            )

    def step(
        self,
        parameters: list[Tensor],
        gradients: list[Any],
        states: list[dict[str, Any]],
        group: dict[str, Any],
    ) -> None:
        lr, mu = float(group["lr"] * group["lr_scale"]), group["momentum"]
        batches: dict[tuple, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            momentum = state["momentum_buffer"].lerp_(gradient, 1 - mu)
            wanted = gradient.lerp(momentum, mu) if group["nesterov"] else momentum
            matrix = wanted.flatten(1)
            key = matrix.shape, matrix.dtype, matrix.device
            batches[key].append((parameter, matrix))
        for batch in batches.values():
            self._apply(batch, lr, 1 - lr * group["weight_decay"])

    def _apply(self, batch: list[tuple[Tensor, Tensor]], lr: float, kept: float) -> None:
        matrices = [matrix.to(self.ns_dtype or matrix.dtype) for _, matrix in batch]
        together = torch.stack(matrices) if len(batch) > 1 else matrices[0]
        found = orthogonalise(together, self.steps, COEFFICIENTS[self.coefficients])
        size = -lr * self._scale(*matrices[0].shape)
        for (parameter, _), update in zip(batch, found.view(-1, *matrices[0].shape), strict=True):
            if kept != 1:
                parameter.mul_(kept)
            parameter.add_(update.view_as(parameter), alpha=size)

    def _scale(self, out: int, inputs: int) -> float:
        if self.scale == "original":
            return math.sqrt(max(1, out / inputs))
        return 0.2 * math.sqrt(max(out, inputs))
