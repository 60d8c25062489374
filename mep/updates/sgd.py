"""Stochastic gradient descent with momentum, Nesterov momentum and weight decay."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from mep.updates.rule import Rule

__all__ = ["SGD"]


class SGD(Rule):
    """``m <- mu m + g + lambda theta``; ``theta <- theta - lr m`` (or ``g + mu m`` for Nesterov).

    Group numbers: ``lr`` >= 0, ``lr_scale`` >= 0 (multiplies it), ``momentum`` in [0, 1),
    ``weight_decay`` >= 0, ``nesterov`` (needs momentum). torch's own fused kernels do the work.

    >>> theta = torch.ones(1)
    >>> numbers = {"lr": 0.1, "lr_scale": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    >>> SGD().step([theta], [torch.ones(1)], [{}], {**numbers, "nesterov": False})
    >>> theta
    tensor([0.9000])

    Source: Sutskever et al. 2013, eqs. 1-2, in torch's convention for ``lr``.
    """

    def check(self, group: dict[str, Any]) -> None:
        for name in ("lr", "lr_scale", "weight_decay"):
            if isinstance(group[name], bool) or not isinstance(group[name], (int, float, Tensor)):
                raise TypeError(f"`{name}` must be a number, got {group[name]!r}")
            if not (group[name] >= 0 and math.isfinite(group[name])):
                raise ValueError(f"`{name}` must be a finite number >= 0, got {group[name]}")
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"`momentum` must be in [0, 1), got {group['momentum']}")
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError("`nesterov=True` needs `momentum` > 0")

    def step(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        states: list[dict[str, Any]],
        group: dict[str, Any],
    ) -> None:
        buffers: list[Tensor | None] = [None] * len(parameters)
        if group["momentum"] != 0:
            for k, (p, state) in enumerate(zip(parameters, states, strict=True)):
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffers[k] = state["momentum_buffer"]
        # torch's fused CPU kernel leaves most of a bfloat16 tensor as it was (2.13).
        fused = all(p.dtype in (torch.float32, torch.float64) for p in parameters)
        sgd(
            parameters, gradients, buffers, fused=fused,
            lr=group["lr"] * group["lr_scale"], momentum=group["momentum"], dampening=0.0,
            weight_decay=group["weight_decay"], nesterov=group["nesterov"], maximize=False,
        )  # fmt: skip
