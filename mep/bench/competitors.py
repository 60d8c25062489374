"""The competitors of ``mep bench rules``: presets by EP, torch's optimizers by backprop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mep

__all__ = ["ARMS", "BASELINE", "scheduled"]

BASELINE = "SGD, bp"

Step = Callable[[Tensor, Tensor], Any]


class _Torch:
    """torch optimizers on gradients of ``loss.backward()``, with the depth rule."""

    def __init__(self, model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizers = optimizers

    def step(self, x: Tensor, target: Tensor) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        F.cross_entropy(self.model(x), target).backward()
        for optimizer in self.optimizers:
            optimizer.step()


def _groups(model: nn.Module, lr: float, keep: Callable[[Tensor], bool]) -> list[dict[str, Any]]:
    groups = mep.param_groups(model, lr)
    kept = ([p for p in group["params"] if keep(p)] for group in groups)
    return [
        {"params": params, "lr": group["lr"] * group["lr_scale"]}
        for group, params in zip(groups, kept, strict=True)
        if params
    ]


def _sgd(model: nn.Module, lr: float) -> _Torch:
    groups = _groups(model, lr, lambda p: True)
    return _Torch(model, torch.optim.SGD(groups, lr=lr, momentum=0.9))


def _adam(model: nn.Module, lr: float) -> _Torch:
    return _Torch(model, torch.optim.Adam(_groups(model, lr, lambda p: True), lr=lr))


def _muon(model: nn.Module, lr: float) -> _Torch:
    matrices = _groups(model, lr, lambda p: p.dim() == 2)
    vectors = _groups(model, lr, lambda p: p.dim() < 2)
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0)
    return _Torch(model, muon, torch.optim.SGD(vectors, lr=lr, momentum=0.95, nesterov=True))


class _MuonBackprop(_Torch):
    def __init__(self, model: nn.Module, lr: float) -> None:
        groups = mep.param_groups(model, lr)
        super().__init__(model, mep.presets.muon_backprop(groups, lr=lr))


def _preset(name: str, model: nn.Module, lr: float, **options: Any) -> mep.EPOptimizer:
    return getattr(mep.presets, name)(model.parameters(), model=model, lr=lr, **options)


def _unbounded(model: nn.Module, lr: float) -> mep.EPOptimizer:
    """The rule of ``smep`` without its bound."""
    return mep.EPOptimizer(
        mep.param_groups(model, lr), model=model, lr=lr, momentum=0.95, nesterov=True,
        update=mep.Route(mep.Muon()),
    )  # fmt: skip


ARMS: dict[str, tuple[Callable[[nn.Module, float], Any], float]] = {
    BASELINE: (_sgd, 0.02),
    "Adam, bp": (_adam, 0.001),
    "torch Muon, bp": (_muon, 0.02),
    "muon_backprop": (_MuonBackprop, 0.02),
    "smep": (partial(_preset, "smep"), 0.02),
    "smep_fast": (partial(_preset, "smep_fast"), 0.02),
    "smep_fast, c = 0.5": (partial(_preset, "smep_fast", beta=mep.AutoBeta(0.5)), 0.02),
    "smep_fast, no bound": (_unbounded, 0.02),
    "sdmep": (partial(_preset, "sdmep"), 0.02),
    "local_ep": (partial(_preset, "local_ep"), 0.02),
    "natural_ep": (partial(_preset, "natural_ep"), 0.05),
}
"""Name -> optimizer of a model at a learning rate, and the middle of its grid."""


def scheduled(made: Any, steps: int) -> Step:
    """An update whose rate falls to zero as a cosine."""
    optimizers = made.optimizers if isinstance(made, _Torch) else [made]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, steps) for o in optimizers]

    def step(x: Tensor, y: Tensor) -> None:
        made.step(x=x, target=y)
        for schedule in schedules:
            schedule.step()

    return step
