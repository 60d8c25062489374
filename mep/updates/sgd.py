"""Stochastic gradient descent with momentum, Nesterov momentum and weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from mep.updates.rule import Rule, check_numbers

__all__ = ["SGD"]


@dataclass(frozen=True)
class SGD(Rule):
    """``m <- mu m + g + lambda theta``; ``theta <- theta - lr m`` (or ``g + mu m`` for Nesterov).

    Group numbers: ``lr`` >= 0, ``lr_scale`` >= 0 (multiplies it), ``momentum`` in [0, 1),
    ``weight_decay`` >= 0, ``nesterov`` (needs momentum). torch's own fused kernels do the work.

    Args:
        decoupled: True takes the weight decay out of the gradient, and so out of the momentum:
            ``theta <- (1 - lr lambda) theta`` before the step.

    >>> theta = torch.ones(1)
    >>> numbers = {"lr": 0.1, "lr_scale": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    >>> SGD().step([theta], [torch.ones(1)], [{}], {**numbers, "nesterov": False})
    >>> theta
    tensor([0.9000])

    Source: Sutskever et al. 2013, eqs. 1-2, in torch's convention for ``lr``; Loshchilov & Hutter
    2019 (decoupled decay).
    """

    decoupled: bool = False

    def check(self, group: dict[str, Any]) -> None:
        check_numbers(group)
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError("`nesterov=True` needs `momentum` > 0")

    def step(
        self,
        parameters: list[Tensor],
        gradients: list[Any],
        states: list[dict[str, Any]],
        group: dict[str, Any],
    ) -> None:
        buffers: list[Tensor | None] = [None] * len(parameters)
        if group["momentum"] != 0:
            for k, (p, state) in enumerate(zip(parameters, states, strict=True)):
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffers[k] = state["momentum_buffer"]
        lr, decay = group["lr"] * group["lr_scale"], group["weight_decay"]
        if self.decoupled and decay != 0:
            for p in parameters:
                p.mul_(1 - lr * decay)
        fused = all(map(_fusable, parameters, gradients, buffers))
        sgd(
            parameters, gradients, buffers, fused=fused,
            lr=lr, momentum=group["momentum"], dampening=0.0,
            weight_decay=0.0 if self.decoupled else decay, nesterov=group["nesterov"],
            maximize=False,
        )  # fmt: skip


def _fusable(parameter: Tensor, gradient: Tensor, momentum: Tensor | None) -> bool:
    """False where torch's fused CPU kernel (2.13) goes wrong.

    It leaves most of a bfloat16 tensor as it was, and walks through parameter, gradient and
    momentum as if they lay in memory alike.
    """
    if parameter.dtype not in (torch.float32, torch.float64):
        return False
    strides = parameter.stride()
    return gradient.stride() == strides and (momentum is None or momentum.stride() == strides)
