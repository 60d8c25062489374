"""The output layer's energy, with ``v = s_L - f_L`` the output's own displacement.

Every layer below has the squared prediction error. The output may have another energy: what
settling needs of it is its force in ``s_L``, the local error ``-dE/df_L`` that it sends down, and
its own output equation ``dE/ds_L + beta dC/ds_L = 0``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mep.energies.costs import Cost, CrossEntropy, Widened

__all__ = ["KL", "OutputEnergy", "Squared"]


class OutputEnergy(ABC):
    """Energy of the output state; ``v`` and the prediction ``f`` have shape ``(B, *out)``."""

    @abstractmethod
    def value(self, v: Tensor, f: Tensor) -> Tensor:
        """Returns the energy per sample, shape ``(B,)``."""

    @abstractmethod
    def force(self, v: Tensor, f: Tensor) -> Tensor:
        """Returns ``dE/ds_L``."""

    @abstractmethod
    def error(self, v: Tensor, f: Tensor) -> Tensor:
        """Returns the local error ``-dE/df_L``."""

    @abstractmethod
    def respond(self, v: Tensor, f: Tensor, cost: Cost, y: Tensor, beta: float) -> Tensor:
        """Returns the next ``v`` towards ``dE/ds_L + beta dC/ds_L = 0`` at prediction ``f``."""


@dataclass(frozen=True)
class Squared(OutputEnergy):
    """``E_L = 1/2 ||v||^2``: the prediction error, as in every other layer.

    >>> Squared().value(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
    tensor([12.5000])

    Source: Whittington & Bogacz 2017.
    """

    def value(self, v: Tensor, f: Tensor) -> Tensor:
        return 0.5 * v.flatten(1).square().sum(1)

    def force(self, v: Tensor, f: Tensor) -> Tensor:
        return v

    def error(self, v: Tensor, f: Tensor) -> Tensor:
        return v

    def respond(self, v: Tensor, f: Tensor, cost: Cost, y: Tensor, beta: float) -> Tensor:
        return cost.gradient(f + v, y).mul_(-beta)


@dataclass(frozen=True)
class KL(OutputEnergy):
    """``E_L = KL(p || q)``, ``p = softmax(s_L / T)``, ``q = softmax(f_L / T)``.

    With ``delta = v / T`` and ``<.>_p`` the mean under p, the force is
    ``p (log p - log q - KL) / T = p (delta - <delta>_p) / T`` and the local error ``(p - q) / T``.

    The divergence saturates: a cross-entropy below ``T = 1`` has an equilibrium only under weak
    nudges, and a negative nudge (``centered``, ``five_point``) has none for samples whose target is
    much less likely than ``beta``. The status says so. The local error cannot carry a common shift
    of all logits, so with ``mse`` the estimate tends to the centred gradient.

    For cross-entropy at ``T = 1`` the output equation has one unknown per sample: the target's
    logit rises by ``u`` with ``u = beta / p_y(u)``, which is monotone for beta > 0. Otherwise it is
    solved by Newton steps. Outputs have shape ``(B, classes)``.

    Args:
        temperature: ``T > 0``.

    Raises:
        ValueError: if the temperature is not positive.

    >>> KL(temperature=2.0).value(torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([0.])

    Source: Pinchetti et al. 2022, "Predictive coding beyond Gaussian distributions".
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"`KL(temperature=...)` must be > 0, got {self.temperature}")

    def value(self, v: Tensor, f: Tensor) -> Tensor:
        log_p = torch.log_softmax((f + v) / self.temperature, 1)
        log_q = torch.log_softmax(f / self.temperature, 1)
        return (log_p.exp() * (log_p - log_q)).flatten(1).sum(1)

    def force(self, v: Tensor, f: Tensor) -> Tensor:
        p = torch.softmax((f + v) / self.temperature, 1)
        delta = v / self.temperature
        return p * (delta - (p * delta).sum(1, keepdim=True)) / self.temperature

    def error(self, v: Tensor, f: Tensor) -> Tensor:
        # p - q = q (e^(delta - log <e^delta>_q) - 1), without subtracting two probabilities.
        q = torch.softmax(f / self.temperature, 1)
        shift = torch.log1p((q * torch.expm1(v / self.temperature)).sum(1, keepdim=True))
        return q * torch.expm1(v / self.temperature - shift) / self.temperature

    def respond(self, v: Tensor, f: Tensor, cost: Cost, y: Tensor, beta: float) -> Tensor:
        if f.dim() != 2:
            raise ValueError(f"the KL output energy needs outputs (B, classes), got {f.dim()}-d")
        plain = cost.inner if isinstance(cost, Widened) else cost
        if isinstance(plain, CrossEntropy) and plain.classes is not None:
            raise ValueError(
                "the KL output energy takes a cost of all outputs, not "
                f"CrossEntropy(classes={plain.classes}): use energy=mep.PredictionError()"
            )
        if isinstance(plain, CrossEntropy) and self.temperature == 1.0:
            return _target_rise(f, y, beta)
        return self._newton(v, f, cost, y, beta)

    def _newton(self, v: Tensor, f: Tensor, cost: Cost, y: Tensor, beta: float) -> Tensor:
        """Damped Newton steps on ``force + beta dC = 0``, each sample on its own."""
        for _ in range(12):
            with torch.enable_grad():
                v = v.detach().requires_grad_()
                g = self.force(v, f) + beta * cost.gradient(f + v, y)
                rows = [torch.autograd.grad(g_j.sum(), v, retain_graph=True)[0] for g_j in g.T]
            # Both terms may ignore a common shift of all logits: least squares leaves it alone.
            jacobian = torch.stack(rows, 1)
            if jacobian.dtype == torch.bfloat16:
                raise TypeError("KL's Newton steps need float32 or float64; use temperature=1")
            inverse = torch.linalg.pinv(jacobian, hermitian=True)
            step = (inverse @ g.detach().unsqueeze(-1)).squeeze(-1)
            v = v.detach() - step.clamp(-self.temperature, self.temperature)
        return v


def _target_rise(f: Tensor, y: Tensor, beta: float) -> Tensor:
    """Solves ``u p_y(u) = beta`` by Newton's method and returns ``u`` on the target's logit."""
    index = y.unsqueeze(1)
    # log-odds of the target: p_y(u) = sigmoid(z + u)
    others = f.scatter(1, index, float("-inf")).logsumexp(1, keepdim=True)
    z = f.gather(1, index) - others
    u = torch.full_like(z, beta)
    for _ in range(30):
        p = torch.sigmoid(z + u)
        # of log u + log p = log beta in place of u p = beta: nearly straight, so no overshoot
        step = (torch.log(u * p / beta)) / (1 / u + 1 - p)
        u = torch.where(torch.sign(u - step) == torch.sign(u), u - step, u / 2)
    return torch.zeros_like(f).scatter_(1, index, u)
