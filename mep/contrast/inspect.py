"""Public windows into the phases: free states, energy, state gradients, a settling by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mep.contrast.mixed import mixed
from mep.contrast.phases import chain_of, check_input, energy_of, free_phase
from mep.contrast.settings import settings
from mep.contrast.strength import AutoBeta, strength_of
from mep.energies import Cost, Energy, cost_of
from mep.settling import Settled, Solver
from mep.settling import settle as run

__all__ = ["energy", "free_states", "settle", "state_gradients"]


def free_states(model: nn.Module, x: Tensor, *, energy: Energy | None = None) -> list[Tensor]:
    """Returns the free equilibrium.

    For the prediction error ``s_i = f_i(s_{i-1})``, the states of the forward pass, without any
    settling; for symmetric couplings the states that a forward pass settles to.

    Args:
        model: any model that ``mep.trace`` can read, or one with ``couplings()``.
        x: input, shape ``(B, *in)``.
        energy: ``mep.PredictionError(output=...)`` or ``mep.Hopfield()``; by the model.

    Returns:
        ``s_1 ... s_L``, each ``(B, *units)``; the last one is the output, but for a read-out.

    Raises:
        TypeError, ValueError: if the input does not fit.

    >>> [tuple(s.shape) for s in free_states(nn.Linear(3, 2), torch.zeros(4, 3))]
    [(4, 2)]

    Source: Whittington & Bogacz 2017.
    """
    how = energy_of(model, energy)
    chain = chain_of(model, energy=how)
    check_input(chain, x)
    return how.free_states(chain, x)


def energy(
    model: nn.Module,
    x: Tensor,
    states: list[Tensor],
    target: Tensor,
    *,
    beta: float,
    cost: str | Cost = "cross_entropy",
    energy: Energy | None = None,
) -> Tensor:
    """Returns the total energy ``F_beta(s) = E(s) + beta C(s_L, y)`` per sample at any states.

    Args:
        model: any model that ``mep.trace`` can read.
        x: input, ``(B, *in)``.
        states: ``s_1 ... s_L`` with the shapes of ``free_states``.
        target: what the cost takes.
        beta: nudging strength, any number.
        cost: name or object.
        energy: ``mep.PredictionError(output=...)`` or ``mep.Hopfield()``; by the model.

    Returns:
        Shape ``(B,)``, differentiable in states and parameters.

    Raises:
        TypeError, ValueError: if an argument does not fit.

    >>> model, x = nn.Linear(3, 2), torch.zeros(1, 3)
    >>> energy(model, x, free_states(model, x), torch.tensor([0]), beta=0.0).tolist()
    [0.0]

    Source: Scellier & Bengio 2017.
    """
    how, which = energy_of(model, energy), cost_of(cost)
    chain = chain_of(model, energy=how)
    check_input(chain, x)
    _check_states(how, chain, x, states)
    y = which.prepare(target, how.result(chain, x, states))
    return how.value(chain, x, states, y, which, beta)


def state_gradients(
    model: nn.Module,
    x: Tensor,
    states: list[Tensor],
    target: Tensor,
    *,
    beta: float,
    cost: str | Cost = "cross_entropy",
    method: str = "analytic",
    energy: Energy | None = None,
) -> list[Tensor]:
    """Returns the forces ``dF/ds_i`` of the per-sample energy (no division by the batch).

    ``dF/ds_i = e_i - J_{i+1}(s_i)^T e_{i+1}``, and ``dF/ds_L = dE_L/ds_L + beta dC/ds_L``.

    Args:
        model: any model that ``mep.trace`` can read.
        x: input, ``(B, *in)``.
        states: ``s_1 ... s_L``, any values, with the shapes of ``free_states``.
        target: what the cost takes.
        beta: nudging strength, any number.
        cost: name or object.
        method: ``"analytic"`` (block by block) or ``"autograd"`` (of the total energy).
        energy: ``mep.PredictionError(output=...)`` or ``mep.Hopfield()``; by the model.

    Returns:
        One tensor per state, of its shape.

    Raises:
        TypeError, ValueError: if an argument does not fit.

    >>> model, x = nn.Linear(3, 2), torch.zeros(1, 3)
    >>> forces = state_gradients(model, x, free_states(model, x), torch.tensor([0]), beta=0.0)
    >>> [float(f.norm()) for f in forces]
    [0.0]

    Source: Whittington & Bogacz 2017.
    """
    if method not in ("analytic", "autograd"):
        raise ValueError(f"`method` must be 'analytic' or 'autograd', got {method!r}")
    how, which = energy_of(model, energy), cost_of(cost)
    chain = chain_of(model, method, how)
    check_input(chain, x)
    _check_states(how, chain, x, states)
    y = which.prepare(target, how.result(chain, x, states))
    if method == "analytic":
        return how.forces(chain, x, states, y, which, beta)
    leaves = [s.detach().requires_grad_() for s in states]
    with torch.enable_grad():
        total = how.value(chain, x, leaves, y, which, beta).sum()
    return list(torch.autograd.grad(total, leaves))


def settle(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    cost: str | Cost = "cross_entropy",
    beta: float | str | AutoBeta = "auto",
    settler: Solver | None = None,
    energy: Energy | None = None,
    gradient_method: str = "analytic",
) -> Settled:
    """Settles one nudged phase and returns it, without touching any gradient.

    Args:
        model: any model that ``mep.trace`` can read.
        x: input, ``(B, *in)``.
        target: what the cost takes.
        cost: name or object.
        beta: nudging strength: ``"auto"``, a number > 0, or ``mep.AutoBeta(c)``.
        settler: ``mep.Sweep()`` by default, ``mep.FixedPoint()`` for ``mep.Hopfield()``.
        energy: ``mep.PredictionError(output=...)`` or ``mep.Hopfield()``; by the model.
        gradient_method: ``"analytic"`` or ``"autograd"`` forces.

    Returns:
        States, displacements, residuals, steps, status and the history of the median residual.

    Raises:
        TypeError, ValueError: if an argument does not fit.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> settle(model, torch.ones(2, 3), torch.tensor([0, 1])).status
    'converged'

    Source: Scellier & Bengio 2017, sec. 3.1.
    """
    how = settings(
        cost=cost, beta=beta, settler=settler, energy=energy_of(model, energy),
        gradient_method=gradient_method,
    )  # fmt: skip
    with torch.no_grad(), mixed(x):
        free = free_phase(model, x, target, how)
        return run(how.energy.nudged(free, strength_of(how.beta, lambda: free.gain)), how.settler)


def _check_states(how: Energy, chain: Any, x: Tensor, states: list[Tensor]) -> None:
    expected = how.shapes(chain, x)
    given = [tuple(s.shape) for s in states]
    if given != expected:
        raise ValueError(f"`states` must have the shapes {expected}, one per state, got {given}")
