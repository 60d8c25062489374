"""Stochastic gradient descent with momentum, Nesterov momentum and weight decay."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import (
    Tensor,
    _foreach_add_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_mul_,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.optim.sgd import sgd

from mep.curvature import Factors, stack_of
from mep.kernels import rows
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

    def effective_step(self, group: dict[str, Any]) -> float:
        return float(group["lr"] * group["lr_scale"]) / (1 - group["momentum"])

    def folds(self, parameter: Tensor) -> bool:
        return parameter.dim() == 2  # a kernel's factors are patches, many times its input

    def step(
        self,
        parameters: list[Tensor],
        gradients: list[Any],
        states: list[dict[str, Any]],
        group: dict[str, Any],
    ) -> None:
        dense: list[tuple[Tensor, Tensor, Tensor | None]] = []
        folded: dict[Any, list[tuple[Tensor, Factors, dict[str, Any]]]] = defaultdict(list)
        for p, gradient, state in zip(parameters, gradients, states, strict=True):
            if group["momentum"] != 0 and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(p)
            if isinstance(gradient, Factors):
                folded[gradient.stack].append((p, gradient, state))
            else:
                dense.append((p, gradient, state["momentum_buffer"] if group["momentum"] else None))
        for same in folded.values():
            ps, products, own = (list(values) for values in zip(*same, strict=True))
            self._fold(ps, products, own, group)
        if not dense:
            return
        if self.decoupled and group["weight_decay"] != 0:
            for p, _, _ in dense:
                p.mul_(1 - group["lr"] * group["lr_scale"] * group["weight_decay"])
        parameters, tensors, buffers = (list(values) for values in zip(*dense, strict=True))
        sgd(
            parameters, tensors, buffers, fused=all(map(_fusable, parameters, tensors, buffers)),
            lr=group["lr"] * group["lr_scale"], momentum=group["momentum"], dampening=0.0,
            weight_decay=0.0 if self.decoupled else group["weight_decay"],
            nesterov=group["nesterov"], maximize=False,
        )  # fmt: skip

    def _fold(
        self,
        parameters: list[Tensor],
        gradients: list[Factors],
        states: list[dict[str, Any]],
        group: dict[str, Any],
    ) -> None:
        """The same step with the products of ``G = sum e^T a`` added where they belong."""
        if group["momentum"] == 0:
            lr = float(group["lr"] * group["lr_scale"])
            if group["weight_decay"]:
                _foreach_mul_(parameters, 1 - lr * group["weight_decay"])
            for p, gradient in zip(parameters, gradients, strict=True):
                gradient.add_to(p, factor=-lr)
            return
        found = stack_of(gradients)
        if found is None:
            momenta = [state["momentum_buffer"] for state in states]

            def add(keep: float) -> None:
                for momentum, gradient in zip(momenta, gradients, strict=True):
                    gradient.add_to(momentum, keep=keep)

        else:
            stack, scale = found
            whole, momenta = _in_a_row(parameters, states)

            def add(keep: float) -> None:
                whole.baddbmm_(stack.errors.mT, stack.activities, beta=keep, alpha=scale)

        self._take(parameters, momenta, add, group)

    def _take(
        self,
        parameters: list[Tensor],
        momenta: list[Tensor],
        add: Callable[[float], None],
        group: dict[str, Any],
    ) -> None:
        """Takes the step with gradients that are never formed.

        Args:
            parameters: what is changed.
            momenta: their momenta.
            add: takes a factor ``keep`` and does ``m <- keep m + G`` for all momenta.
            group: the numbers, ``momentum`` > 0.
        """
        lr = float(group["lr"] * group["lr_scale"])
        mu, decay = group["momentum"], group["weight_decay"]
        if decay and self.decoupled:
            _foreach_mul_(parameters, 1 - lr * decay)
        in_gradient, keep = 0.0 if self.decoupled else decay, mu
        if group["nesterov"]:
            # g + mu m' = (1 + mu) m' - mu m: the old momentum first, and no g of its own. The
            # weight that decays in m' has moved by then, which its factor makes up for.
            _foreach_add_(parameters, momenta, alpha=lr * mu)
            keep = mu * (1 - lr * in_gradient)
        add(keep)
        if in_gradient:
            _foreach_add_(momenta, parameters, alpha=in_gradient)
        _foreach_add_(parameters, momenta, alpha=-lr * (1 + mu if group["nesterov"] else 1))


def _in_a_row(
    parameters: list[Tensor], states: list[dict[str, Any]]
) -> tuple[Tensor, list[Tensor]]:
    """Returns the momenta of two or more parameters of one shape, ``(k, *shape)``, and one by one.

    That they lie next to each other is seen to once.
    """
    found = [state.get("momentum_buffer") for state in states]
    known = [momentum for momentum in found if momentum is not None]
    joined = [*rows(known)] if len(known) == len(found) else []
    if len(joined) != 1:
        pairs = zip(parameters, found, strict=True)
        joined = [torch.stack([torch.zeros_like(p) if m is None else m for p, m in pairs])]
        known = [*joined[0].unbind()]
        for state, momentum in zip(states, known, strict=True):
            state["momentum_buffer"] = momentum
    return joined[0], known


def _fusable(parameter: Tensor, gradient: Tensor, momentum: Tensor | None) -> bool:
    """False where torch's fused CPU kernel (2.13) goes wrong.

    It leaves most of a bfloat16 tensor as it was, and walks through parameter, gradient and
    momentum as if they lay in memory alike.
    """
    if parameter.dtype not in (torch.float32, torch.float64):
        return False
    if parameter.is_contiguous() and gradient.is_contiguous():  # a stride takes longer to ask for
        return momentum is None or momentum.is_contiguous()
    strides = parameter.stride()
    return gradient.stride() == strides and (momentum is None or momentum.stride() == strides)
