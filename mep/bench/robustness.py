"""What noise, coarse weights and unequal feedback do to a net that settles."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import mep
from mep.couplings import Couplings, Linear, Unit
from mep.energies import Relaxation, forward_start
from mep.settling import settle
from mep.training import accuracy

__all__ = ["BITS", "NOISE", "UNEQUAL", "robustness"]

NOISE, BITS, UNEQUAL = "noise in activities", "bits per weight", "unequal feedback"
LEVELS: dict[str, tuple[float, ...]] = {
    NOISE: (0.0, 0.05, 0.1, 0.2, 0.4, 0.8),
    BITS: (8, 6, 5, 4, 3, 2),
    UNEQUAL: (0.0, 0.1, 0.2, 0.4, 0.8),
}
# Noise never comes to rest: every net gets as many rounds.
_ROUNDS = 20


class _Net(nn.Module):
    """Disturbed couplings of a model, with its parameters; settles for a fixed number of rounds."""

    def __init__(self, model: nn.Module, net: Couplings) -> None:
        super().__init__()
        self.model = model
        self._net = net

    def couplings(self) -> Couplings:
        """Returns the disturbed ones."""
        return self._net

    def forward(self, x: Tensor) -> Tensor:
        net = self._net
        problem = Relaxation(forward_start(net, x), None, None, 0.0, 1.0)
        return settle(problem, mep.FixedPoint(_ROUNDS, None)).configuration.output


@dataclass(frozen=True)
class _Noisy:
    """A unit whose activity is never read twice alike."""

    unit: Unit
    deviation: float
    box: ClassVar[None] = None  # it does not act as it is

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unit, name)

    def activity(self, s: Tensor) -> Tensor:
        a = self.unit.activity(s)
        return a + self.deviation * torch.randn_like(a)

    def activity_if_kept(self, s: Tensor) -> Tensor:
        return self.activity(s)


def robustness(
    model: mep.models.EquilibriumNet,
    feedforward: nn.Sequential,
    x: Tensor,
    y: Tensor,
    gradients: Callable[[nn.Module], Tensor],
    truth: Tensor,
) -> list[dict[str, Any]]:
    """Measures accuracy, and where feedback differs also the gradient, under every disturbance.

    Args:
        model: a trained equilibrium net.
        feedforward: a trained net without feedback, for comparison.
        x: test inputs.
        y: their labels.
        gradients: of a model, the EP gradient of one batch, in a row.
        truth: the gradient by backprop that it is compared with.

    Returns:
        A row per kind, level and net: ``accuracy``, and ``cosine`` or None.
    """
    rows = []
    for kind, levels in LEVELS.items():
        for level in levels:
            torch.manual_seed(0)  # every net and level meets the same draws
            for name, net, cosine in _disturbed(kind, level, model, feedforward, gradients, truth):
                found = accuracy(net, x, y)
                rows.append({"kind": kind, "level": level, "net": name, "accuracy": found,
                             "cosine": cosine})  # fmt: skip
    return rows


def _disturbed(
    kind: str,
    level: float,
    model: mep.models.EquilibriumNet,
    feedforward: nn.Sequential,
    gradients: Callable[[nn.Module], Tensor],
    truth: Tensor,
) -> Iterator[tuple[str, nn.Module, float | None]]:
    net = model.couplings()
    if kind == NOISE:
        # Where the other net has activations: in hidden layers.
        units: list[Any] = [u if isinstance(u, Linear) else _Noisy(u, level) for u in net.units]
        yield "equilibrium", _Net(model, Couplings(units, net.interactions, net.readout)), None
        layers = [_with_noise(layer, level) for layer in feedforward]
        yield "feedforward", nn.Sequential(*layers), None
    elif kind == BITS:
        for name, whole in (("equilibrium", model), ("feedforward", feedforward)):
            coarse: Any = copy.deepcopy(whole)
            _round_weights(coarse, int(level))
            settles = isinstance(coarse, mep.models.EquilibriumNet)
            yield name, _Net(coarse, coarse.couplings()) if settles else coarse, None
    else:
        unequal = [replace(c, feedback=_changed(c.block.layer, level)) for c in net.interactions]
        bent = _Net(model, Couplings(net.units, unequal, net.readout))
        cosine = torch.cosine_similarity(gradients(bent), truth, 0)
        yield "equilibrium", bent, float(cosine)


def _changed(layer: Any, level: float) -> Tensor:
    weight = layer.weight.detach()
    return weight + level * weight.std() * torch.randn_like(weight)


def _with_noise(layer: nn.Module, level: float) -> nn.Module:
    return nn.Sequential(layer, _Noise(level)) if isinstance(layer, nn.ReLU) else layer


class _Noise(nn.Module):
    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.deviation = deviation

    def forward(self, x: Tensor) -> Tensor:
        return x + self.deviation * torch.randn_like(x)


@torch.no_grad()
def _round_weights(model: nn.Module, bits: int) -> None:
    """Rounds every matrix and kernel to ``2^bits - 1`` levels, evenly spaced about zero."""
    for p in model.parameters():
        if p.dim() > 1:
            step = p.abs().max().clamp(min=1e-30) / (2 ** (bits - 1) - 1)
            p.copy_((p / step).round() * step)
