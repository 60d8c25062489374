"""Steps of a length that only the parameter's own gradient decides: nothing global."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mep.updates.rule import Rule, check_numbers, refuse_nesterov

__all__ = ["Normalised"]


@dataclass(frozen=True)
class Normalised(Rule):
    """``m <- mu m + (1 - mu) g``; ``theta <- (1 - lr lambda) theta - lr m / max(||m||, eps)``.

    Every parameter with a signal moves by ``lr`` whatever the signal's size, which falls or grows
    from layer to layer; no norm is taken over more than one parameter. Weight decay is decoupled.

    Group numbers: ``lr``, ``lr_scale``, ``momentum``, ``weight_decay``.

    Args:
        eps: least norm that counts as a signal, > 0.

    Raises:
        ValueError: if ``eps`` is out of range.

    >>> theta = torch.zeros(2)
    >>> numbers = {"lr": 1.0, "lr_scale": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    >>> Normalised().step([theta], [torch.tensor([3.0, -4.0])], [{}], numbers)
    >>> theta
    tensor([-0.6000,  0.8000])

    Source: You et al. 2017 (layer-wise rates), without the weight's norm.
    """

    eps: float = 1e-12

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise ValueError(f"`Normalised(eps=...)` must be > 0, got {self.eps}")

    def check(self, group: dict[str, Any]) -> None:
        check_numbers(group)
        refuse_nesterov(self, group)

    def step(
        self,
        parameters: list[Tensor],
        gradients: list[Any],
        states: list[dict[str, Any]],
        group: dict[str, Any],
    ) -> None:
        lr = float(group["lr"] * group["lr_scale"])
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            if group["weight_decay"] != 0:
                parameter.mul_(1 - lr * group["weight_decay"])
            least = max(self.eps, torch.finfo(momentum.dtype).tiny)
            parameter.sub_(momentum * (lr / torch.linalg.vector_norm(momentum).clamp(min=least)))
