"""The estimator: free phase, one nudged phase per stencil node, local gradients to a sink."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mep.contrast.mixed import mixed, owned
from mep.contrast.phases import energy_of, free_phase
from mep.contrast.settings import Settings, settings
from mep.contrast.stencils import Stencil, one_sided
from mep.contrast.strength import AutoBeta, strength_of
from mep.curvature import Signal
from mep.energies import Cost, Energy, Phase
from mep.memory import label, phase
from mep.settling import (
    CONVERGED,
    DIVERGED,
    LIMIT,
    NOT_SETTLED,
    Measured,
    Residual,
    Settled,
    Solver,
    settle,
)

__all__ = ["Estimate", "Sink", "contrast", "estimate", "refused", "summary"]

Sink = Callable[[Signal], None]


@dataclass(frozen=True)
class Estimate(Measured):
    """What one estimate found, besides the gradients.

    Attributes:
        loss: batch mean of the cost at the free equilibrium, a scalar tensor.
        balance: residuals, the worst over the nudged phases; read ``residual`` (per sample,
            ``(B,)``), ``median``, ``q95`` and ``aggregate``.
        sweeps: steps or sweeps taken, the most over the nudged phases.
        status: ``"converged"``, ``"not settled"``, ``"diverged"`` (then no gradient was written,
            unless updates go block by block) or ``"limit"`` (backprop by another name).
        beta: the largest nudging strength of the stencil.
    """

    loss: Tensor
    balance: Residual
    sweeps: int
    status: str
    beta: float

    @property
    def converged(self) -> bool:
        """True if every nudged phase reached its tolerance."""
        return self.status == CONVERGED


def estimate(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    cost: str | Cost = "cross_entropy",
    beta: float | str | AutoBeta = "auto",
    settler: Solver | None = None,
    stencil: Stencil = one_sided,
    energy: Energy | None = None,
    gradient_method: str = "analytic",
    weight: float = 1.0,
) -> Estimate:
    """The counterpart of ``loss.backward()``: adds the gradient estimate to every ``.grad``.

    ``g = (1/B) sum_k w_k dF/dtheta(s^{beta_k})`` with ``dF/dtheta_i = -(df_i/dtheta_i)^T e_i``,
    the batch mean, from the settled states of each node of the stencil.

    Args:
        model: any model that ``mep.trace`` can read, or one with ``couplings()``.
        x: input, shape ``(B, *in)``.
        target: what the cost takes: classes ``(B,)`` or ``(B, *positions)``, or real values.
        cost: ``"cross_entropy"``, ``"mse"`` or a cost object.
        beta: nudging strength: ``"auto"``, a number > 0, or ``mep.AutoBeta(c)``.
        settler: how phases are settled; ``mep.Sweep()`` by default, ``mep.FixedPoint()`` for
            ``mep.Hopfield()``.
        stencil: ``mep.one_sided``, ``mep.centered``, ``mep.five_point``, ``mep.random_sign()`` or,
            for ``mep.Hopfield()``, ``mep.holomorphic(n)``.
        energy: ``mep.PredictionError(output=...)`` or ``mep.Hopfield()``; by the model.
        gradient_method: ``"analytic"`` (closed forms) or ``"autograd"`` (the reference).
        weight: factor on what is added, ``n_i / N`` for unequal micro-batches. They add up to the
            full batch exactly at a fixed ``beta``; an automatic one is chosen batch by batch.

    Returns:
        Loss, residuals and status. If a phase diverged, no ``.grad`` has been touched.

    Raises:
        TypeError, ValueError: if an argument does not fit; nothing has changed then.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> found = estimate(model, torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1]))
    >>> found.status, tuple(found.residual.shape), model[0].weight.grad is not None
    ('converged', (5,), True)

    Source: Scellier & Bengio 2017; Laborieux et al. 2021 (centered).
    """
    if not math.isfinite(weight):
        raise ValueError(f"`weight` must be a finite number, got {weight}")
    how = settings(
        cost=cost, beta=beta, settler=settler, stencil=stencil, energy=energy_of(model, energy),
        gradient_method=gradient_method,
    )  # fmt: skip
    with mixed(x):
        free = free_phase(model, x, target, how)
        found = contrast(free, how, _add_to_grad, weight=weight)
        if found.status != DIVERGED:
            free.commit()
    return found


def _add_to_grad(signal: Signal) -> None:
    parameter = signal.parameter
    if parameter.grad is None:
        parameter.grad = label(signal.form(), "gradients")
    else:
        parameter.grad += signal.form()


@torch.no_grad()
def contrast(free: Any, how: Settings, sink: Sink, *, weight: float = 1.0) -> Estimate:
    """Settles every node of the stencil, gives a verdict, then sends the gradients to a sink.

    Args:
        free: the free phase of a batch.
        how: the strategy.
        sink: receives the local signals, block by block; there may be several of one parameter,
            whose gradient is the sum.
        weight: factor on all gradients.

    Returns:
        The estimate. The sink was not called if a phase diverged or the loss is not finite.
        Running statistics are the caller's to commit, once the gradients have been used.
    """
    with phase("mep: settle"):
        beta = strength_of(how.beta, lambda: free.gain)
    nodes = how.nodes(beta)
    with phase("mep: settle"):
        phases = [_settled(free, b, how) for b, _ in nodes]
    found = summary(free, phases, nodes)
    advice = how.energy.advice(free, how.settler, phases[0], found.status)
    if found.status == DIVERGED:
        warnings.warn(_divergence(found, advice or _remedy(how)), stacklevel=3)
        return found
    if advice is not None:
        warnings.warn(advice, stacklevel=3)
    with phase("mep: contrast"):
        ends = [Phase(end, b, w) for end, (b, w) in zip(phases, nodes, strict=True)]
        for signal in how.energy.signals(free, ends, weight / len(free.loss)):
            sink(owned(free, signal))
    return found


def _settled(free: Any, beta: Any, how: Settings) -> Settled:
    """Settles one node; at 0 the free phase has been settled already."""
    if beta == 0:
        return free.settled
    settled = settle(how.energy.nudged(free, beta), how.settler)
    free.learn(beta, settled)
    return settled


def refused(loss: Tensor, beta: float) -> Estimate:
    """Returns the verdict on a batch whose loss or errors are not finite: nothing was sent."""
    nothing = torch.full_like(loss, torch.inf)
    return Estimate(loss.mean(), Residual(nothing, nothing), 0, DIVERGED, abs(beta))


def summary(free: Any, phases: list[Settled], nodes: list[tuple[complex, complex]]) -> Estimate:
    """Returns the verdict on a batch: the worst over its phases, the free one if it was settled."""
    phases = [*phases, *free.settlings]
    statuses = {phase.status for phase in phases}
    loss = free.mean
    worst = next(s for s in (DIVERGED, NOT_SETTLED, LIMIT, CONVERGED) if s in statuses)
    per_sample = phases[0].residual
    for other in phases[1:]:
        per_sample = torch.maximum(per_sample, other.residual)
    return Estimate(
        loss=loss,
        balance=Residual(per_sample, phases[0].balance.nudge),
        sweeps=max(phase.steps for phase in phases),
        status=worst if math.isfinite(float(loss)) else DIVERGED,
        beta=max(abs(b) for b, _ in nodes),
    )


def _remedy(how: Settings) -> str:
    return (
        "the chain does not settle even under a relative nudge: lower `c`, or start from an "
        "isometric initialiser (mep.init.orthogonal_, mep.init.identity_)"
        if isinstance(how.beta, AutoBeta)
        else f"beta={how.beta} is too strong here: use beta='auto' and settler=mep.Sweep()"
    )


def _divergence(found: Estimate, remedy: str) -> str:
    return (
        f"settling diverged (median residual {found.median:.2g}); no gradient was written. {remedy}"
    )
